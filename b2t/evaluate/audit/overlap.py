"""Signals that occur twice: whole trials, or stretches that two trials share."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset

from b2t.data.trials import read_signal, row_ids
from b2t.evaluate.audit.findings import CRITICAL, NOTE, WARNING, Finding
from b2t.evaluate.audit.reading import Trial

OVERLAP = "shared signals"
_BITS = 512
"""Signs of change that a window holds: few enough to be short, enough to be met once only."""
_SHORTEST, _LONGEST = 16, 64
"""Bins of a window."""
_MOVING = 0.125
"""Share of a window's values that change; stiller ones look alike without being the same."""
_KEPT = 2_000_000
_OFTEN = 64
_MOST_PAIRS = 4096
_ALIKE = 0.999
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def window_length(channels: int) -> int:
    """Return the bins of a window over so many channels."""
    return int(np.clip(-(-_BITS // max(1, channels)), _SHORTEST, _LONGEST))


def change_codes(signal: np.ndarray) -> np.ndarray:
    """Hash how every channel changes from bin to bin: up, down or not, uint64 [T − 1].

    Scaling and shifting channels leaves it as it is: a trial that was z-scored with another block
    is still found.
    """
    change = np.diff(signal, axis=0)
    bits = np.concatenate((np.packbits(change > 0, axis=1), np.packbits(change < 0, axis=1)), 1)
    padded = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 8)))
    words = np.ascontiguousarray(padded).view(np.uint64)
    factors = np.random.default_rng(0).integers(0, 2**63, words.shape[1], np.uint64) * 2 + 1
    mixed = _mix(words * factors)
    return np.asarray(_mix(mixed.sum(1, dtype=np.uint64)))


def window_hashes(signal: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Hash every window of a signal [T, C] in which enough moves.

    Args:
        signal: of one trial; one shorter than a window is a window itself.
        length: bins.

    Returns:
        Hashes uint64 and the bins that the windows begin at.
    """
    steps = min(length, len(signal)) - 1
    if steps < 1:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    codes = change_codes(signal)
    count = len(codes) - steps + 1
    hashes = np.full(count, np.uint64(steps))
    for step in range(steps):
        hashes = hashes * _FACTOR + codes[step : step + count]
    moving = np.concatenate(([0], np.cumsum((np.diff(signal, axis=0) != 0).sum(1))))
    enough = moving[steps:] - moving[:-steps] >= _MOVING * steps * signal.shape[1]
    return _mix(hashes)[enough], np.flatnonzero(enough)


def _mix(words: np.ndarray) -> np.ndarray:
    words = (words ^ (words >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return np.asarray(words ^ (words >> np.uint64(32)))


class OverlapCheck:
    """Gathers hashes of windows, then finds trials that share some.

    Windows are kept by their content, one in so many: those of two copies are the same ones,
    wherever they lie, and the memory is bounded.

    Args:
        splits: rows by split, to look at again where hashes agree.
        bins: of all trials together.
        channels: C.
        meant: share of a window that the next one repeats, as `b2t prepare --overlap` cut it.
    """

    def __init__(
        self, splits: Mapping[str, Dataset], bins: int, channels: int, meant: float = 0.0
    ) -> None:
        self.length = window_length(channels)
        self._splits = splits
        self._meant = meant
        self._every = np.uint64(max(1, -(-bins // _KEPT)))
        self._places: list[tuple[str, int]] = []
        self._hashes: list[np.ndarray] = []
        self._starts: list[np.ndarray] = []

    def add(self, trial: Trial) -> None:
        """Add one finite trial."""
        hashes, starts = window_hashes(trial.signal, self.length)
        kept = hashes % self._every == 0
        self._places.append((trial.split, trial.row))
        self._hashes.append(hashes[kept])
        self._starts.append(starts[kept])

    def findings(self) -> list[Finding]:
        """Judge what was added: between splits, and within them."""
        if not any(map(len, self._hashes)):
            return [Finding(OVERLAP, NOTE, "too few channels move to tell signals apart")]
        shared = [each for each in self._candidates() if each["bins"]]
        names = {split: row_ids(dataset) for split, dataset in self._splits.items()}
        for each in shared:
            each["trials"] = [names[split][row] for split, row in each.pop("rows")]
        between = [each for each in shared if each["splits"][0] != each["splits"][1]]
        within = [each for each in shared if each["splits"][0] == each["splits"][1]]
        return [self._between(between), self._within(within)]

    def _between(self, shared: list[dict[str, Any]]) -> Finding:
        if len(self._splits) < 2:
            only = ", ".join(self._splits)
            return Finding(OVERLAP, NOTE, f"{only} is the only split: nothing to compare it with")
        if not shared:
            text = f"no stretch of {self.length} bins occurs in two splits"
            return Finding(OVERLAP, NOTE, text, {"places": []})
        trials = {(each["splits"][1], each["trials"][1]) for each in shared}
        return Finding(
            OVERLAP,
            CRITICAL,
            f"{len(trials)} trials share a signal with a trial of another split",
            {"places": shared},
            _examples(shared),
            "split by session or block (`b2t prepare --split-by session`), or remove the copies: "
            "scores would be of signals trained on",
        )

    def _within(self, shared: list[dict[str, Any]]) -> Finding:
        if not shared:
            text = f"no stretch of {self.length} bins occurs twice in a split"
            return Finding(OVERLAP, NOTE, text, {"places": []})
        text = f"{len(shared)} pairs of trials of one split share a signal"
        if self._meant:
            text += f", as windows do that overlap by {100 * self._meant:g} %"
            return Finding(OVERLAP, NOTE, text, {"places": shared}, _examples(shared))
        return Finding(
            OVERLAP,
            WARNING,
            text,
            {"places": shared},
            _examples(shared),
            "remove copied trials or files; a stretch that occurs twice counts twice",
        )

    def _candidates(self) -> list[dict[str, Any]]:
        """Return pairs of trials in which the same hashes occur, with what they truly share."""
        hashes = np.concatenate(self._hashes)
        starts = np.concatenate(self._starts)
        trials = np.repeat(np.arange(len(self._hashes)), [len(each) for each in self._hashes])
        order = np.argsort(hashes, kind="stable")
        hashes, starts, trials = hashes[order], starts[order], trials[order]
        first = np.flatnonzero(np.concatenate(([True], hashes[1:] != hashes[:-1])))
        sizes = np.diff(np.append(first, len(hashes)))
        votes: Counter[tuple[int, int, int]] = Counter()
        for begin, size in zip(first[sizes > 1], sizes[sizes > 1], strict=True):
            if size > _OFTEN:  # a pattern, as of a test signal, not a copy
                continue
            group = slice(begin, begin + size)
            for one, other, shift in _neighbours(trials[group], starts[group]):
                votes[one, other, shift] += 1
        chosen: dict[tuple[int, int], tuple[int, int]] = {}
        for (one, other, shift), count in votes.items():
            chosen[one, other] = max(chosen.get((one, other), (0, 0)), (count, shift))
        pairs = sorted(chosen, key=lambda pair: (-chosen[pair][0], pair))[:_MOST_PAIRS]
        return [self._compared(one, other, chosen[one, other][1]) for one, other in pairs]

    def _compared(self, one: int, other: int, shift: int) -> dict[str, Any]:
        """Return what two trials share where the second lies ``shift`` bins later."""
        rows = [self._places[one], self._places[other]]
        signals = [read_signal(self._splits[s].with_format("arrow")[row]) for s, row in rows]
        bins = common_bins(signals[0], signals[1], shift, self.length)
        whole = bool(bins == len(signals[0]) == len(signals[1]))
        return {"splits": [split for split, _ in rows], "rows": rows, "bins": bins, "whole": whole}


def _neighbours(trials: np.ndarray, starts: np.ndarray) -> list[tuple[int, int, int]]:
    """Pair each trial of a group with the next one, and how much later it begins there."""
    return [
        (int(trials[i]), int(trials[i + 1]), int(starts[i] - starts[i + 1]))
        for i in range(len(trials) - 1)
        if trials[i] != trials[i + 1]
    ]


def common_bins(one: np.ndarray, other: np.ndarray, shift: int, length: int) -> int:
    """Return the longest stretch that two signals [T, C] share, scales apart; 0 below a window.

    Args:
        one: a signal.
        other: one whose bin t is bin t + ``shift`` of the first.
        shift: in bins.
        length: bins of a window.
    """
    begin, end = max(0, shift), min(len(one), len(other) + shift)
    x, y = one[begin:end], other[begin - shift : end - shift]
    if len(x) < 2:
        return 0
    same = np.concatenate(([0], change_codes(x) == change_codes(y), [0]))
    edges = np.flatnonzero(np.diff(same))
    if not len(edges):
        return 0
    runs = edges[1::2] - edges[::2]
    longest = int(runs.argmax())
    start, bins = int(edges[::2][longest]), int(runs[longest]) + 1
    if bins < min(length, len(one), len(other)):
        return 0
    return bins if _proportional(x[start : start + bins], y[start : start + bins]) else 0


def _proportional(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether every moving channel of two signals [T, C] is the same but for scale and offset."""
    x, y = x - x.mean(0, dtype=np.float64), y - y.mean(0, dtype=np.float64)
    power = np.sqrt(np.square(x).sum(0) * np.square(y).sum(0))
    moving = power > 0
    alike = (x * y).sum(0)[moving] / power[moving]
    return bool(moving.any() and (alike > _ALIKE).all())


def _examples(shared: list[dict[str, Any]]) -> list[str]:
    return [
        f"{each['trials'][1]} ({each['splits'][1]}) and {each['trials'][0]} ({each['splits'][0]}): "
        f"{'the same ' if each['whole'] else ''}{each['bins']} bins"
        for each in shared[:5]
    ]
