"""Mean and deviation of blocks, sessions or recordings, merged trial by trial."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from b2t.counted import counted
from b2t.data.sources import Source
from b2t.data.sources.processed import recording_of
from b2t.errors import UserError
from b2t.log import logger

FILE = "statistics.npz"
"""Beside the splits of a prepared dataset: what its signals were z-scored by."""
ALL = "*"
"""Name of the statistics over all training trials."""


class TrialMoments(NamedTuple):
    """Bins, mean [C] and sum of squared deviations [C] of one trial, in float64."""

    bins: int
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, signal: np.ndarray) -> "TrialMoments":
        """Measure ``signal`` [T, C]."""
        mean = signal.mean(axis=0, dtype=np.float64)
        squares = ((signal - mean) ** 2).sum(axis=0, dtype=np.float64)
        return cls(len(signal), mean, squares)


@dataclass
class Moments:
    """Mean and sum of squared deviations [C] of the bins seen so far."""

    bins: int = 0
    mean: Any = 0.0
    squares: Any = 0.0

    def add(self, trial: TrialMoments) -> None:
        """Merge a trial (Chan, Golub and LeVeque 1979: no cancellation)."""
        bins, mean, squares = trial
        total = self.bins + bins
        self.squares = self.squares + squares + (mean - self.mean) ** 2 * self.bins * bins / total
        self.mean = self.mean + (mean - self.mean) * bins / total
        self.bins = total

    def deviation(self) -> np.ndarray:
        """Return the standard deviation [C], 1 for a channel that never moves."""
        deviation = np.sqrt(self.squares / self.bins)
        return np.where(deviation > 1e-6 * np.abs(self.mean), deviation, 1.0)


Scale = dict[str, tuple[np.ndarray, np.ndarray]]
"""Mean [C] and deviation [C] by the name of a block, session or recording."""


def unit_of(source: Source, index: int, by: str) -> str:
    """Name what a trial is z-scored within: its `block`, `session` or `recording`."""
    info = source.trials[index]
    if by == "recording":
        return recording_of(source, index)
    return f"{info.session}/{info.block}" if by == "block" else info.session


class Blocks:
    """Moments of all blocks, sessions or recordings of a source.

    Args:
        source: whose trials are counted.
        by: `block`, `session` or `recording`.
        splits: of every trial.
        statistics: `train` counts training trials alone, `all` every trial.
        known: scales of an earlier dataset, which are taken as they are.
    """

    def __init__(
        self,
        source: Source,
        by: str,
        splits: Sequence[str],
        statistics: str = "train",
        known: Scale | None = None,
    ) -> None:
        self.source = source
        self.by = by
        self._splits = splits
        self._all = statistics == "all"
        self._known = known or {}
        self._moments: dict[str, Moments] = defaultdict(Moments)
        self._of_sessions: dict[str, Moments] = defaultdict(Moments)
        self._whole = Moments()
        self._met: dict[str, str] = {}
        """The session of every unit."""

    def add(self, index: int, trial: TrialMoments) -> None:
        """Count a trial towards its block."""
        unit = unit_of(self.source, index, self.by)
        session = self.source.trials[index].session
        self._met[unit] = session
        if self._all or self._splits[index] == "train":
            for moments in (self._moments[unit], self._of_sessions[session], self._whole):
                moments.add(trial)

    def scale(self) -> Scale:
        """Return what brings each block to mean 0 and deviation 1.

        One without training trials takes the scale of its session, and a session without any that
        of all training trials; both are told.

        Raises:
            UserError: no trial for training at all.
        """
        found, borrowed = {}, []
        for unit, session in self._met.items():
            if self._own(unit) is None:
                borrowed.append(unit)
            of_session = self._own(session) or self._of(self._of_sessions.get(session))
            found[unit] = self._own(unit) or of_session or self._pooled()
        if borrowed:
            logger(__name__).warning(
                "%d of %d %ss hold no training trial and are z-scored by those of their session, "
                "or of all (%s%s); `--statistics all` takes their own",
                len(borrowed),
                len(self._met),
                self.by,
                ", ".join(borrowed[:3]),
                " …" if len(borrowed) > 3 else "",
            )
        return found

    def kept(self) -> Scale:
        """Return all scales that another dataset or a stream may go by: `ALL`, sessions, units."""
        sessions = {name: self._of(each) for name, each in self._of_sessions.items()}
        units = {name: self._of(each) for name, each in self._moments.items()}
        scales = {ALL: self._pooled(), **sessions, **units, **self._known}
        return {name: scale for name, scale in scales.items() if scale is not None}

    def _own(self, unit: str) -> tuple[np.ndarray, np.ndarray] | None:
        return self._known.get(unit) or self._of(self._moments.get(unit))

    def _pooled(self) -> tuple[np.ndarray, np.ndarray]:
        found = self._known.get(ALL) or self._of(self._whole if self._whole.bins else None)
        if found is None:
            raise UserError("no trial is left for training: there is nothing to z-score by")
        return found

    @staticmethod
    def _of(moments: Moments | None) -> tuple[np.ndarray, np.ndarray] | None:
        return None if moments is None else (moments.mean, moments.deviation())

    def say_flat(self, absent: Sequence[int] = ()) -> None:
        """Warn of channels that never move in a block; those known to be ``absent`` aside."""
        for unit, moments in self._moments.items():
            still = np.setdiff1d(np.flatnonzero(moments.squares == 0), absent)
            if len(still):
                names = ", ".join(self.source.channels[index] for index in still[:5])
                logger(__name__).warning(
                    "%s: %s without any movement (%s%s), written as 0",
                    unit,
                    counted(len(still), "channel"),
                    names,
                    " …" if len(still) > 5 else "",
                )


def save_statistics(folder: Path, scales: Scale) -> None:
    """Write `statistics.npz` into a prepared folder."""
    arrays = {
        "names": np.array(json.dumps(list(scales))),
        "mean": np.array([mean for mean, _ in scales.values()]),
        "deviation": np.array([deviation for _, deviation in scales.values()]),
    }
    with (folder / FILE).open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub has one keyword alone


def read_statistics(folder: Path) -> Scale:
    """Return what the signals of a prepared folder were z-scored by.

    Raises:
        UserError: it holds no statistics, or they are damaged.
    """
    place = folder / FILE
    if not place.is_file():
        raise UserError(
            f"{folder} holds no {FILE}: its signals were not z-scored by `b2t prepare`, or by an "
            "earlier version; prepare it again with --normalize block, session or recording"
        )
    try:
        with np.load(place, allow_pickle=False) as file:
            names = json.loads(str(file["names"]))
            return {
                name: (mean, deviation)
                for name, mean, deviation in zip(
                    names, file["mean"], file["deviation"], strict=True
                )
            }
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{place} is damaged ({error}): prepare the data again") from None
