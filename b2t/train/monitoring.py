"""Monitors and alerts as hooks of the trainer."""

from collections.abc import Mapping
from typing import Any

from b2t.config import AlertRule, Config, MonitorConfig
from b2t.errors import UserError
from b2t.monitor.codebook import CodebookMonitor
from b2t.monitor.context import Monitor, StepContext
from b2t.monitor.monitors import Monitors
from b2t.monitor.reconstruction import ReconstructionMonitor
from b2t.monitor.rules import RULE_SETS
from b2t.monitor.rvq import RVQMonitor
from b2t.monitor.training import TrainingMonitor
from b2t.train.build import Materials
from b2t.train.callback import Callback, Run
from b2t.train.flops import StepFlops
from b2t.train.metric_names import fitting_rules
from b2t.train.ranks import Ranks


def alert_rules(config: MonitorConfig) -> list[AlertRule]:
    """Return the rules that a configuration asks for.

    Raises:
        UserError: a disabled rule that does not exist.
    """
    rules = {rule.name: rule for rule in RULE_SETS[config.rules]}
    unknown = set(config.disabled_rules) - set(rules)
    if unknown:
        raise UserError(
            f"monitor.disabled_rules: no rule named {sorted(unknown)[0]!r}; "
            f"the {config.rules} rules are {', '.join(sorted(rules))}"
        )
    rules.update({rule.name: rule for rule in config.extra_rules})
    return [rule for name, rule in rules.items() if name not in config.disabled_rules]


def build_monitors(
    run: Config, materials: Materials, ranks: Ranks, flops: Mapping[str, StepFlops] | None = None
) -> Monitors:
    """Make the monitors that fit a model; ``flops`` of each phase add MFU and HFU.

    Raises:
        UserError: a rule of the user's watches what this run never logs.
    """
    config, quantizer = run.monitor, materials.model.quantizer
    if not config.enabled:
        found: dict[str, Monitor] = {"codebook": CodebookMonitor(config.window)}
        return Monitors(found if quantizer is not None else {}, ())
    found = {
        "training": TrainingMonitor(
            window=config.window,
            flops_per_frame={name: step.per_frame for name, step in (flops or {}).items()},
            recomputed={name: step.recomputed for name, step in (flops or {}).items()},
            device=ranks.device,
            world=ranks.world,
        ),
        "reconstruction": ReconstructionMonitor(materials.info.sampling_rate, window=config.window),
    }
    if quantizer is not None:
        found["quantizer"] = RVQMonitor(quantizer, config.window)
    own = [rule.name for rule in config.extra_rules]
    return Monitors(found, fitting_rules(alert_rules(config), run, materials, own))


class Watch(Callback):
    """Updates the monitors at each step, adds their metrics to each record, raises alerts.

    All ranks run it: some metrics are compared or pooled over ranks.
    """

    collective = True
    key = "Watch"

    def __init__(self, monitors: Monitors) -> None:
        self.monitors = monitors

    def on_step(self, trainer: Run, context: StepContext) -> None:
        """Take in the step."""
        self.monitors.update(context)

    def on_log(self, trainer: Run, record: dict[str, float]) -> None:
        """Add the metrics, and check the rules."""
        record.update(self.monitors.metrics())
        for alert in self.monitors.check(trainer.progress.step, record):
            trainer.raise_alert(alert)

    def state_dict(self) -> dict[str, Any]:
        """Keep windows and counters."""
        return self.monitors.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore windows and counters."""
        self.monitors.load_state_dict(state)
