"""When a validation metric has stopped improving."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass
class EarlyStopping:
    """Counts evaluations without improvement.

    Make one per phase: losses of different phases cannot be compared.

    Attributes:
        metric: name of the metric, for messages.
        mode: whether `min` or `max` is better.
        patience: evaluations without improvement before `should_stop`.
        min_delta: smallest change that counts as an improvement.
        best: best value so far, None before the first finite one.
        best_step: step of the best value.
        waited: evaluations since then; a value that is not finite never improves.
    """

    metric: str = "val/loss"
    mode: Literal["min", "max"] = "min"
    patience: int = 5
    min_delta: float = 0.0
    best: float | None = None
    best_step: int = 0
    waited: int = 0

    def update(self, value: float, step: int) -> bool:
        """Take in one evaluation; return whether it is the best so far."""
        improved = math.isfinite(value) and (
            self.best is None or self._gain(value) > self.min_delta
        )
        if improved:
            self.best, self.best_step, self.waited = value, step, 0
        else:
            self.waited += 1
        return improved

    @property
    def should_stop(self) -> bool:
        """Whether the patience is used up."""
        return self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the memory; rule and patience stay as configured."""
        for name in ("best", "best_step", "waited"):
            setattr(self, name, state[name])

    def _gain(self, value: float) -> float:
        assert self.best is not None
        return self.best - value if self.mode == "min" else value - self.best
