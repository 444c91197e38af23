"""Mean and deviation of every block, merged trial by trial."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from b2t.data.sources import Source, TrialInfo
from b2t.log import logger


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


Block = tuple[str, int]
Scale = dict[Block, tuple[np.ndarray, np.ndarray]]
"""Mean [C] and deviation [C] of each block."""


def block_of(info: TrialInfo) -> Block:
    """Name the block of a trial: its session and number."""
    return info.session, info.block


class Blocks:
    """Moments of all blocks of a source."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._moments: dict[Block, Moments] = defaultdict(Moments)

    def add(self, index: int, trial: TrialMoments) -> None:
        """Count a trial towards its block."""
        self._moments[block_of(self.source.trials[index])].add(trial)

    def scale(self) -> Scale:
        """Return what brings each block to mean 0 and deviation 1."""
        return {block: (each.mean, each.deviation()) for block, each in self._moments.items()}

    def say_flat(self, absent: Sequence[int] = ()) -> None:
        """Warn of channels that never move in a block; those known to be ``absent`` aside."""
        for (session, block), moments in self._moments.items():
            still = np.setdiff1d(np.flatnonzero(moments.squares == 0), absent)
            if len(still):
                names = ", ".join(self.source.channels[index] for index in still[:5])
                logger(__name__).warning(
                    "%s, block %d: %d channels never move (%s%s): they become 0",
                    session,
                    block,
                    len(still),
                    names,
                    " …" if len(still) > 5 else "",
                )
