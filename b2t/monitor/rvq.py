"""The quantizer's monitors as one, with a summary of health."""

from typing import Any

from b2t.monitor.codebook import CodebookMonitor
from b2t.monitor.context import StepContext
from b2t.monitor.ema import EMAMonitor
from b2t.monitor.health import GRADES, TABLE, verdict
from b2t.quantize import ResidualVQ


class RVQMonitor:
    """Everything about the quantizer: `CodebookMonitor`, `EMAMonitor`, and a summary of health.

    Metrics: those of both, and `codebook/health`, 0 healthy, 1 concerning, 2 critical by ``TABLE``.

    Args:
        quantizer: the `ResidualVQ` to watch.
        window: updates looked back on.
    """

    def __init__(self, quantizer: ResidualVQ, window: int = 100) -> None:
        self.usage = CodebookMonitor(window)
        self.codes = EMAMonitor(quantizer)

    def update(self, context: StepContext) -> None:
        """Take in one applied step."""
        self.usage.update(context)
        self.codes.update(context)

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the class docstring. Collective: every rank must call."""
        found = {**self.usage.metrics(), **self.codes.metrics()}
        rows = tuple(row for row in TABLE if row.metric.startswith("codebook/"))
        grade = verdict(found, rows)
        if grade is not None:
            found["codebook/health"] = float(GRADES.index(grade))
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both."""
        return {"usage": self.usage.state_dict(), "codes": self.codes.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both; call after the codebooks were restored."""
        self.usage.load_state_dict(state["usage"])
        self.codes.load_state_dict(state["codes"])
