"""Where a run is: clocks that only applied steps move, and what has been best so far."""

from dataclasses import asdict, dataclass, field
from typing import Any

from b2t.config import EarlyStoppingConfig


@dataclass
class Best:
    """The best value of a metric so far.

    Attributes:
        mode: `min` or `max`.
        min_delta: smallest change that counts.
        value: best value, None before the first.
        step: when it was seen.
        waited: values since then.
    """

    mode: str = "min"
    min_delta: float = 0.0
    value: float | None = None
    step: int = 0
    waited: int = 0

    def update(self, value: float, step: int) -> bool:
        """Take a value in; True where it is an improvement (NaN never is)."""
        sign = 1.0 if self.mode == "min" else -1.0
        better = value == value and (
            self.value is None or sign * (self.value - value) > self.min_delta
        )
        if better:
            self.value, self.step, self.waited = value, step, 0
        else:
            self.waited += 1
        return better


@dataclass
class Progress:
    """Clocks of a run.

    Attributes:
        phase: number of the phase, from 0.
        phase_step: applied steps in this phase.
        step: applied steps over all phases.
        consumed: global batches taken in this phase, skipped steps included.
        skipped: skipped steps over all phases; `consecutive_skips` of them just now.
        validated: step of the last validation.
        seconds: wall time of training over all sessions.
        best: what `checkpoints/best` holds; starts anew in each phase, whose losses differ.
        stopping: early stopping of this phase.
        finished: all phases are done.
    """

    phase: int = 0
    phase_step: int = 0
    step: int = 0
    consumed: int = 0
    skipped: int = 0
    consecutive_skips: int = 0
    validated: int = -1
    seconds: float = 0.0
    best: Best = field(default_factory=Best)
    stopping: Best = field(default_factory=Best)
    finished: bool = False

    def enter_phase(self, number: int, best_mode: str, rule: EarlyStoppingConfig | None) -> None:
        """Start the clocks of a phase."""
        self.phase, self.phase_step, self.consumed = number, 0, 0
        self.best = Best(mode=best_mode)
        self.stopping = (
            Best(mode=rule.mode, min_delta=rule.min_delta) if rule is not None else Best()
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the clocks as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Progress":
        """Restore what `to_dict` returned."""
        return cls(
            **{**values, "best": Best(**values["best"]), "stopping": Best(**values["stopping"])}
        )
