"""Alert rules: a comparison of metrics, and what to tell when it holds."""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Comparison = Literal["<", ">", "not_finite"]
Severity = Literal["info", "warning", "critical"]


class Condition(BaseModel):
    """A comparison of one metric with a threshold."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, frozen=True, allow_inf_nan=False
    )

    metric: str
    """Name as in metrics.jsonl; `*` stands for any text, the worst match counts."""
    comparison: Comparison = "<"
    """`<` and `>` violate beyond the threshold; `not_finite` is NaN or infinity."""
    threshold: float | None = None
    """Bound, in the metric's unit."""

    @model_validator(mode="after")
    def _has_a_threshold(self) -> "Condition":
        if (self.threshold is None) != (self.comparison == "not_finite"):
            raise ValueError(
                f"{self.metric}: a threshold belongs to < and >, and to nothing else; found "
                f"{self.comparison} with {self.threshold}"
            )
        return self

    def find(self, metrics: Mapping[str, float]) -> tuple[str, float] | None:
        """Return the name and value that decide, None where the metric is not there."""
        names = (
            [self.metric]
            if "*" not in self.metric
            else [name for name in metrics if fnmatchcase(name, self.metric)]
        )
        found = [(name, metrics[name]) for name in names if metrics.get(name) is not None]
        if not found:
            return None
        broken = [pair for pair in found if not math.isfinite(pair[1])]
        if broken:
            return broken[0]
        choose = min if self.comparison == "<" else max
        return choose(found, key=lambda pair: pair[1])

    def violated(self, value: float) -> bool:
        """Whether ``value`` lies beyond the threshold; NaN violates `not_finite` only."""
        if self.comparison == "not_finite":
            return not math.isfinite(value)
        assert self.threshold is not None
        return value < self.threshold if self.comparison == "<" else value > self.threshold


class AlertRule(Condition):
    """When to tell a person, how urgently, and what to say."""

    name: str
    """Unique name."""
    severity: Severity = "warning"
    """`critical` ends the run after a checkpoint, `warning` and `info` are told."""
    patience: int = Field(default=1, ge=1)
    """Checks in a row that must violate before the rule fires."""
    also: tuple[Condition, ...] = ()
    """Conditions that must hold too."""
    message: str
    """What was seen; `{value}`, `{metric}` and `{threshold}` are filled in."""
    cause: str = ""
    """What it probably means."""
    remedy: str = ""
    """What to try."""
    repeat: int = Field(default=20, ge=1)
    """Checks of lasting violation before it is told again; doubles each time."""
    escalate_after: int | None = Field(default=None, ge=1)
    """Checks of lasting violation after which a warning becomes critical; null never."""
    once: bool = False
    """Told a single time in a run."""
    expected: bool = True
    """Whether it is worth a message that the metric never arrives."""
