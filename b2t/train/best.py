"""The best value of a validation metric so far, which `checkpoints/best` holds."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass
class Best:
    """Remembers the best value of a metric.

    Make one per phase: losses of different phases cannot be compared.

    Attributes:
        metric: name of the metric.
        mode: whether `min` or `max` is better.
        best: best value so far, None before the first finite one.
        best_step: step of the best value.
    """

    metric: str = "val/loss"
    mode: Literal["min", "max"] = "min"
    best: float | None = None
    best_step: int = 0

    def update(self, value: float, step: int) -> bool:
        """Take in one evaluation; return whether it is the best so far."""
        if not self.improved(value):
            return False
        self.best, self.best_step = value, step
        return True

    def improved(self, value: float, min_delta: float = 0.0) -> bool:
        """Whether ``value`` is better by more than ``min_delta``; not where it is not finite."""
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        gain = self.best - value if self.mode == "min" else value - self.best
        return gain > min_delta
