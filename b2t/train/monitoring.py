"""Monitors as hooks of the trainer."""

from typing import Any

from b2t.monitor.codebook import CodebookMonitor
from b2t.train.callbacks import Callback


class CodebookWatch(Callback):
    """Adds codebook use over a sliding window to each log record."""

    def __init__(self, window: int = 100) -> None:
        self.monitor = CodebookMonitor(window)

    def on_step(self, trainer: Any, context: Any) -> None:
        """Take in the counts of the step."""
        self.monitor.update(context)

    def on_log(self, trainer: Any, record: dict[str, float]) -> None:
        """Add the metrics."""
        record.update(self.monitor.metrics())

    def state_dict(self) -> dict[str, Any]:
        """Keep the window."""
        return self.monitor.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the window."""
        self.monitor.load_state_dict({"counts": None, "course": None, **state})
