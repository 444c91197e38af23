"""Channels that carry no brain: dead, stuck, clipping, or with values far out."""

from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np

from b2t.evaluate.audit.findings import NOTE, WARNING, Finding, listed
from b2t.evaluate.audit.reading import Trial

DEAD, CONSTANT, CLIPPING, OUTLIERS = "dead channels", "constant", "clipping", "outliers"
_STUCK_BINS, _STUCK_SHARE = 16, 0.25
"""Equal values in a row, in bins and as a share of the trial, that are no chance."""
_RUN = 3
"""Values in a row at a trial's extreme that count as clipped."""
_CLIPPED_SHARE, _CLIPPED_BINS = 1e-3, 8
_FAR, _FAR_DISCRETE = 30.0, 100.0
"""Deviations from the median (half of the width between the quantiles 0.16 and 0.84)."""
_LOUD = 10.0
_EXAMPLES = 8


class TrialNumbers(NamedTuple):
    """Of one trial, one number per channel, [C] each.

    Attributes:
        deviation: standard deviation.
        spread: half of the width between the quantiles 0.16 and 0.84.
        farthest: largest distance from the median.
        place: its bin.
        clipped: bins in runs of 3 or more at the largest or smallest value.
        still: longest run of equal values between the extremes, or all bins of a flat trial.
        few: whether the values are few different ones, as counts are.
    """

    deviation: np.ndarray
    spread: np.ndarray
    farthest: np.ndarray
    place: np.ndarray
    clipped: np.ndarray
    still: np.ndarray
    few: np.ndarray


def look_at(signal: np.ndarray) -> TrialNumbers:
    """Measure a finite signal [T, C]."""
    bins = len(signal)
    ordered = np.sort(signal, axis=0)
    low, centre, high = (ordered[round(q * (bins - 1))] for q in (0.16, 0.5, 0.84))
    distinct = 1 + (np.diff(ordered, axis=0) != 0).sum(0)
    away = np.abs(signal - centre)
    extremes = (signal == ordered[0]), (signal == ordered[-1])
    flat = ordered[0] == ordered[-1]
    clipped = np.where(flat, 0, sum(_in_runs(mask) for mask in extremes))
    equal = (signal[1:] == signal[:-1]) & ~(extremes[0] | extremes[1])[1:]
    return TrialNumbers(
        signal.std(0, dtype=np.float64),
        (high - low) / 2,
        away.max(0),
        away.argmax(0),
        clipped,
        np.where(flat, bins, _longest_run(equal)),
        distinct < min(bins / 2, 16 + bins / 16),
    )


def _in_runs(mask: np.ndarray) -> np.ndarray:
    """Count the bins of each channel that lie in runs of `_RUN` or more True ones, [C]."""
    if len(mask) < _RUN:
        return np.zeros(mask.shape[1], int)
    three = mask[2:] & mask[1:-1] & mask[:-2]
    inside = np.zeros_like(mask)
    for start in range(_RUN):
        inside[start : start + len(three)] |= three
    return np.asarray(inside.sum(0))


def _longest_run(equal: np.ndarray) -> np.ndarray:
    """Return the most values in a row that equal the one before, [C], with the first of them."""
    if not len(equal):
        return np.zeros(equal.shape[1], int)
    count = np.cumsum(equal, axis=0)
    before = np.maximum.accumulate(np.where(equal, 0, count), axis=0)
    longest = np.asarray((count - before).max(0))
    return np.where(longest > 0, longest + 1, 0)


def _loudness(numbers: TrialNumbers) -> np.ndarray:
    """Return how far each trial's median channel moves, in units of the usual trial, [trials]."""
    levels = np.median(numbers.deviation, axis=1)
    usual = np.median(levels)
    return np.asarray(levels / usual if usual else np.zeros_like(levels))


class ChannelChecks:
    """Gathers numbers of trials by session, then judges.

    Args:
        channels: C names.
        absent: channels that are known to rest, by the beginning of sessions' names; "" is all.
    """

    def __init__(self, channels: list[str], absent: dict[str, list[str]] | None = None) -> None:
        self.channels = channels
        self._absent = absent or {}
        self._trials: dict[str, list[tuple[str, int]]] = defaultdict(list)
        self._numbers: dict[str, list[TrialNumbers]] = defaultdict(list)

    def add(self, trial: Trial) -> None:
        """Measure one finite trial."""
        self._trials[trial.session].append((trial.name, len(trial.signal)))
        self._numbers[trial.session].append(look_at(trial.signal))

    def deviations(self) -> dict[str, np.ndarray]:
        """Return the median standard deviation of each channel by session, [C]; 0 where dead."""
        return {
            session: np.median([each.deviation for each in numbers], axis=0)
            for session, numbers in sorted(self._numbers.items())
        }

    def findings(self) -> list[Finding]:
        """Judge what was added."""
        places: dict[str, list[dict[str, Any]]] = defaultdict(list)
        few = np.median([n.few for some in self._numbers.values() for n in some], axis=0) > 0.5
        for session in sorted(self._numbers):
            stacked = TrialNumbers(*map(np.stack, zip(*self._numbers[session], strict=True)))
            bins = np.array([count for _, count in self._trials[session]])
            dead = (stacked.still == bins[:, None]).all(0)
            places[DEAD] += self._dead(session, dead)
            for channel in np.flatnonzero(~dead & ~few).tolist():
                places[CONSTANT] += self._stuck(session, channel, stacked, bins)
                places[CLIPPING] += self._clipping(session, channel, stacked, bins)
            loudness = _loudness(stacked)
            for channel in np.flatnonzero(~dead).tolist():
                quiet = loudness <= _LOUD
                places[OUTLIERS] += self._far(session, channel, stacked, quiet, bool(few[channel]))
            places[OUTLIERS] += self._loud(session, loudness)
        return [_finding(check, places[check], f"{len(self._numbers)} sessions") for check in _SAID]

    def _dead(self, session: str, dead: np.ndarray) -> list[dict[str, Any]]:
        known = {
            channel
            for source, lacking in self._absent.items()
            if not source or session.startswith(f"{source}:")
            for channel in lacking
        }
        names = [self.channels[channel] for channel in np.flatnonzero(dead)]
        return [
            {"session": session, "channel": name, "said": "never moves"}
            for name in names
            if name not in known
        ]

    def _stuck(
        self, session: str, channel: int, numbers: TrialNumbers, bins: np.ndarray
    ) -> list[dict[str, Any]]:
        still = numbers.still[:, channel]
        least = np.minimum(bins, np.maximum(_STUCK_BINS, _STUCK_SHARE * bins))
        stuck = np.flatnonzero(still >= least)
        if not len(stuck):
            return []
        names = [self._trials[session][index][0] for index in stuck]
        said = f"stands still for {still[stuck[0]]} of {bins[stuck[0]]} bins of {names[0]}"
        if len(names) > 1:
            said += f" and in {len(names) - 1} more trials"
        return [self._place(session, channel, said, names)]

    def _clipping(
        self, session: str, channel: int, numbers: TrialNumbers, bins: np.ndarray
    ) -> list[dict[str, Any]]:
        clipped = numbers.clipped[:, channel]
        share = clipped.sum() / bins.sum()
        if share < _CLIPPED_SHARE or clipped.sum() < _CLIPPED_BINS:
            return []
        names = [self._trials[session][index][0] for index in np.flatnonzero(clipped)]
        said = f"{100 * share:.1f} % of its values stand at a trial's limit, first in {names[0]}"
        return [self._place(session, channel, said, names)]

    def _far(
        self, session: str, channel: int, numbers: TrialNumbers, quiet: np.ndarray, few: bool
    ) -> list[dict[str, Any]]:
        spread = np.median(numbers.spread[:, channel])
        if few or spread == 0:
            spread = np.sqrt(np.mean(np.square(numbers.deviation[:, channel])))
        ratio = np.where(quiet, numbers.farthest[:, channel] / spread, 0.0)
        far = np.flatnonzero(ratio > (_FAR_DISCRETE if few else _FAR))
        if not len(far):
            return []
        most = int(ratio.argmax())
        names = [self._trials[session][index][0] for index in far]
        said = (
            f"{ratio[most]:.0f} deviations from its median in {self._trials[session][most][0]}, "
            f"bin {numbers.place[most, channel]}"
        )
        return [self._place(session, channel, said, names)]

    def _loud(self, session: str, loudness: np.ndarray) -> list[dict[str, Any]]:
        places = []
        for index in np.flatnonzero(loudness > _LOUD):
            name = self._trials[session][index][0]
            said = f"{loudness[index]:.0f} times as loud in {name} as in the session's other trials"
            places.append({**self._place(session, 0, said, [name]), "channel": "most channels"})
        return places

    def _place(self, session: str, channel: int, said: str, trials: list[str]) -> dict[str, Any]:
        name = self.channels[channel]
        return {"session": session, "channel": name, "trials": trials, "said": said}


_SAID = {
    DEAD: (
        "never move in a whole session",
        "leave them out with `b2t prepare --channels`, or mark them bad in the recording",
    ),
    CONSTANT: (
        "stand still for long within trials",
        "look for loose contacts there (`b2t inspect --row TRIAL`); leave the channels or the "
        "trials out",
    ),
    CLIPPING: (
        "reach the limit of their amplifier or converter",
        "record with a smaller gain; leave the channels out where it is much",
    ),
    OUTLIERS: (
        "have values far from all others",
        "look at the trials (`b2t inspect --row TRIAL`); cut artefacts out, or leave trials out",
    ),
}


def _finding(check: str, places: list[dict[str, Any]], looked: str) -> Finding:
    what, remedy = _SAID[check]
    if not places:
        return Finding(check, NOTE, f"no channels {what} ({looked})", {"places": []})
    by_session: dict[str, list[str]] = defaultdict(list)
    for place in places:
        by_session[place["session"]].append(place["channel"])
    if check == DEAD:
        examples = [f"{name}: {listed(some)}" for name, some in by_session.items()]
    else:
        examples = [f"{place['session']}, {place['channel']}: {place['said']}" for place in places]
    count = len({(place["session"], place["channel"]) for place in places})
    text = f"{count} channels of {len(by_session)} sessions {what}"
    return Finding(check, WARNING, text, {"places": places}, examples[:_EXAMPLES], remedy)
