"""Mean and deviation of a signal while it comes, for z-scores without the whole recording."""

import numpy as np

_LEAST = 1e-6


class RunningStatistics:
    """Exponentially forgetting mean and deviation of every channel.

    The weighted form of Welford's recursion (West 1979, doi 10.1145/359146.359153): without
    forgetting they are those of all bins so far.

    Args:
        channels: C.
        bins: time constant of forgetting, in bins; infinity never forgets.
        mean: [C] to start from, in the unit of the signal.
        deviation: [C] to start from.
        weight: bins that the start counts for; at most ``bins``.
    """

    def __init__(
        self,
        channels: int,
        bins: float = np.inf,
        *,
        mean: np.ndarray | None = None,
        deviation: np.ndarray | None = None,
        weight: float = 0.0,
    ) -> None:
        self._keep = 0.0 if bins <= 0 else float(np.exp(-1 / bins))
        known = mean is not None and deviation is not None
        self._weight = min(weight, bins) if known else 0.0
        self.mean = np.zeros(channels) if mean is None else np.array(mean, np.float64)
        self._squares = np.zeros(channels)
        if deviation is not None:
            self._squares = self._weight * np.square(deviation, dtype=np.float64)

    @property
    def deviation(self) -> np.ndarray:
        """Standard deviation [C], 1 for a channel that has not moved."""
        found = np.sqrt(self._squares / max(self._weight, 1.0))
        return np.where(found > _LEAST * np.abs(self.mean), found, 1.0)

    def push(self, bins: np.ndarray) -> np.ndarray:
        """Z-score the next bins [n, C] float32, each by all bins up to it."""
        scored = np.empty(bins.shape, np.float32)
        for place, values in enumerate(np.asarray(bins, np.float64)):
            self._weight = self._keep * self._weight + 1
            step = values - self.mean
            self.mean = self.mean + step / self._weight
            self._squares = self._keep * self._squares + step * (values - self.mean)
            scored[place] = (values - self.mean) / self.deviation
        return scored
