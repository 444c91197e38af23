"""All monitors of a run and the alerts on what they say, as one object for the trainer."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist

from b2t.config import AlertRule
from b2t.monitor.alerts import Alert, AlertEngine
from b2t.monitor.context import Monitor, StepContext
from b2t.monitor.rules import BUILT_IN


class Monitors:
    """Updates monitors once per applied step, reads them at log steps, and checks the rules.

    Args:
        monitors: by name; the names key their state in checkpoints.
        rules: alert rules.
        group: ranks that must act on alerts together.
    """

    def __init__(
        self,
        monitors: Mapping[str, Monitor],
        rules: Iterable[AlertRule] = BUILT_IN,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.monitors = dict(monitors)
        self.alerts = AlertEngine(rules)
        self.group = group

    def update(self, context: StepContext) -> None:
        """Take in one applied step; every rank must call."""
        for monitor in self.monitors.values():
            monitor.update(context)

    def metrics(self) -> dict[str, float]:
        """Return the metrics of all monitors; every rank must call."""
        found: dict[str, float] = {}
        for monitor in self.monitors.values():
            found.update(monitor.metrics())
        return found

    def check(self, step: int, metrics: Mapping[str, float]) -> list[Alert]:
        """Return the alerts of this log step: decided on rank 0, the same on every rank.

        Every rank must call. ``metrics`` of rank 0 decide.
        """
        raised = self.alerts.check(step, metrics)
        if dist.is_available() and dist.is_initialized():
            shared: list[Any] = [raised]
            dist.broadcast_object_list(shared, group=self.group, group_src=0)
            raised = shared[0]
        return raised

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all monitors and rules."""
        states = {name: monitor.state_dict() for name, monitor in self.monitors.items()}
        return {"monitors": states, "alerts": self.alerts.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what is known by name; call after the model's buffers were restored."""
        for name, monitor in self.monitors.items():
            if name in state["monitors"]:
                monitor.load_state_dict(state["monitors"][name])
        self.alerts.load_state_dict(state["alerts"])
