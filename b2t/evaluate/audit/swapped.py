"""Channels that stand in each other's place in one session."""

from collections import defaultdict

import numpy as np

from b2t.evaluate.audit.findings import NOTE, WARNING, Finding
from b2t.evaluate.audit.reading import Trial

SWAPPED = "swapped channels"
_TRIALS = 32
"""Of a session: correlations of channels need no more."""
_FEWEST_BINS, _FEWEST_CHANNELS = 500, 6
_BETTER, _UNUSUAL = 0.25, 4.0
"""A swap explains a pair's correlations so much better, and without it they are so unusual."""

_COMPARABLE = 0.8
"""Correlation between two sessions' tables of correlations from which on they can be compared."""


class SwapCheck:
    """Compares which channels go together in a session with the dataset's other sessions.

    A swap of channels i and j swaps rows i and j of the session's matrix of correlations: their
    distances from the usual rows are then large where they stand and small when swapped.
    """

    def __init__(self, channels: list[str]) -> None:
        self._channels = channels
        self._sums: dict[str, np.ndarray] = {}
        self._bins: dict[str, int] = defaultdict(int)
        self._trials: dict[str, int] = defaultdict(int)

    def add(self, trial: Trial) -> None:
        """Add one finite trial."""
        if self._trials[trial.session] == _TRIALS or len(self._channels) < _FEWEST_CHANNELS:
            return
        centred = trial.signal - trial.signal.mean(0)
        product = centred.T @ centred
        self._sums[trial.session] = self._sums.get(trial.session, 0.0) + product
        self._trials[trial.session] += 1
        self._bins[trial.session] += len(centred)

    def finding(self) -> Finding:
        """Judge what was added."""
        usable = [name for name in sorted(self._sums) if self._bins[name] >= _FEWEST_BINS]
        if len(usable) < 2:
            return Finding(
                SWAPPED,
                NOTE,
                f"needs two sessions of {_FEWEST_BINS} bins and {_FEWEST_CHANNELS} channels: "
                "not looked at",
            )
        matrices = np.stack([_correlations(self._sums[name]) for name in usable])
        usual = np.median(matrices, axis=0) if len(usable) > 2 else matrices[0]
        places, unlike = [], 0
        for name, matrix in zip(usable, matrices, strict=True):
            if len(usable) == 2 and name == usable[0]:
                continue
            found = swaps(matrix, usual)
            unlike += not found and not _comparable(matrix, usual)
            for first, second in found:
                pair = [self._channels[first], self._channels[second]]
                places.append({"session": name, "channel": pair[0], "channels": pair})
        if not places:
            text = f"no two channels are swapped in {len(usable)} sessions"
            if unlike:
                text += f"; of these, {unlike} are too unlike the others to tell"
            return Finding(SWAPPED, NOTE, text, {"places": []})
        against = "the other sessions" if len(usable) > 2 else usable[0]
        return Finding(
            SWAPPED,
            WARNING,
            f"{len(places)} pairs of channels stand in each other's place, against {against}",
            {"places": places},
            [f"{p['session']}: {p['channels'][0]} and {p['channels'][1]}" for p in places[:8]],
            "compare the session's montage or cables; correct the names, then prepare again",
        )


def _correlations(sums: np.ndarray) -> np.ndarray:
    """Return correlations [C, C] from products of centred channels; 0 of channels that rest."""
    scale = np.sqrt(np.diag(sums))
    outer = np.outer(scale, scale)
    return np.divide(sums, outer, out=np.zeros_like(sums), where=outer > 0)


def swaps(matrix: np.ndarray, usual: np.ndarray) -> list[tuple[int, int]]:
    """Find pairs of channels whose swap brings a matrix of correlations to the usual one.

    Args:
        matrix: of the session, [C, C].
        usual: of the other sessions, [C, C].

    Returns:
        Disjoint pairs (i, j), i < j, those that explain most first.
    """
    usable = (np.diag(matrix) > 0) & (np.diag(usual) > 0)
    matrix, chosen = matrix.copy(), []
    while True:
        staying, crossing = _distances(matrix, usual)
        # Half is enough at first: other pairs that are still swapped blur this one.
        found = (crossing < 0.5 * staying) & usable[:, None] & usable[None, :]
        gain = np.where(np.triu(found, 1), staying - crossing, 0.0)
        first, second = map(int, np.unravel_index(gain.argmax(), gain.shape))
        if not gain[first, second]:
            break
        order = np.arange(len(matrix))
        order[[first, second]] = second, first
        matrix = matrix[np.ix_(order, order)]
        usable[[first, second]] = False
        chosen.append((first, second))
    pairs = np.triu_indices(len(matrix), 1)
    if not chosen or not _comparable(matrix, usual):
        return []  # another head or array altogether: nothing can be told from it
    staying, crossing = _distances(matrix, usual)  # of the repaired matrix
    typical = float(np.median(staying[pairs]))
    least = np.maximum(staying / _BETTER, _UNUSUAL * typical)
    return [pair for pair in chosen if crossing[pair] > least[pair]]


def _comparable(matrix: np.ndarray, usual: np.ndarray) -> bool:
    """Whether channels go together in a session about as they do in the others."""
    pairs = np.triu_indices(len(matrix), 1)
    x, y = matrix[pairs] - matrix[pairs].mean(), usual[pairs] - usual[pairs].mean()
    return bool(x @ y >= _COMPARABLE * np.sqrt((x @ x) * (y @ y)))


def _distances(matrix: np.ndarray, usual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return squared distances of the rows of pairs from the usual ones, [C, C] each.

    The entries of the pair itself are left out.

    Returns:
        |m_i − u_i|² + |m_j − u_j|² where both stay, |m_i − u_j|² + |m_j − u_i|² where they cross.
    """
    norms = np.square(matrix).sum(1)[:, None] + np.square(usual).sum(1)[None, :]
    distance = norms - 2 * (matrix @ usual.T)
    one, other = np.diag(matrix)[:, None], np.diag(usual)[None, :]
    across = distance - np.square(one - usual.T) - np.square(matrix - other)
    stay = np.diag(distance)[:, None] - np.square(matrix - usual)
    return stay + stay.T, across + across.T
