"""Where a run is: clocks that only applied steps move, and what has been best so far."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from b2t.config import EarlyStoppingConfig, PhaseConfig
from b2t.train.best import Best
from b2t.train.early_stopping import EarlyStopping


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
        phase_seconds: time of this phase that its `minutes` count.
        best: what `checkpoints/best` holds; starts anew in each phase, whose losses differ.
        stopping: early stopping of this phase, None without.
        streams: where each rank is in a streamed dataset, as last saved; empty without one.
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
    phase_seconds: float = 0.0
    best: Best = field(default_factory=Best)
    stopping: EarlyStopping | None = None
    streams: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False

    def enter_phase(
        self,
        number: int,
        metric: str,
        mode: Literal["min", "max"],
        rule: EarlyStoppingConfig | None,
    ) -> None:
        """Start the clocks of a phase.

        Args:
            number: of the phase.
            metric: that chooses the best model.
            mode: `min` or `max` of it.
            rule: early stopping of the phase.
        """
        self.phase, self.phase_step, self.consumed = number, 0, 0
        self.phase_seconds = 0.0
        self.best = Best(metric, mode)
        self.stopping = None if rule is None else EarlyStopping(**rule.model_dump())

    def planned(self, phases: Sequence[PhaseConfig]) -> int:
        """Return the step that this would be, had no phase before stopped early.

        What anneals over the training goes by it: an early stop would bend it.
        """
        return sum(phase.steps for phase in phases[: self.phase]) + self.phase_step

    @property
    def restorable(self) -> int:
        """Step whose weights this phase goes on with if it stops early now; −1 the last ones."""
        rule = self.stopping
        if rule is None or not rule.restore_best or rule.best is None:
            return -1
        return rule.best_step

    def choose_best_by(self, metric: str, mode: Literal["min", "max"]) -> Best | None:
        """Follow the metric that is configured now; return the best so far that is given up.

        None where the metric is the one that has chosen all along.
        """
        if (self.best.metric, self.best.mode) == (metric, mode):
            return None
        former, self.best = self.best, Best(metric, mode)
        return former

    def to_dict(self) -> dict[str, Any]:
        """Return the clocks as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Progress":
        """Restore what `to_dict` returned, in this version or one that kept more of the best."""
        stopping = values["stopping"]
        best = {f.name: values["best"][f.name] for f in fields(Best)}
        return cls(
            **{
                **values,
                "best": Best(**best),
                "stopping": None if stopping is None else EarlyStopping(**stopping),
            }
        )
