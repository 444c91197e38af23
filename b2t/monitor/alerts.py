"""Alerts: rules over metrics, what a violation probably means, and what to do about it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from b2t.config.alert_rules import AlertRule


@dataclass
class Alert:
    """Something a person should act on.

    Attributes:
        severity: `info`, `warning` or `critical`; a critical one ends the run.
        message: what was seen.
        remedy: what to try.
        values: the metrics that decided.
        cause: what it probably means.
        rule: name of the rule.
        step: applied step.
        lasting: checks for which the violation has lasted, 0 where it is over.
    """

    severity: str
    message: str
    remedy: str = ""
    values: dict[str, float] = field(default_factory=dict)
    cause: str = ""
    rule: str = ""
    step: int = 0
    lasting: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        record = asdict(self)
        record["values"] = {k: v if math.isfinite(v) else None for k, v in self.values.items()}
        return record

    def text(self) -> str:
        """Return one line for a person."""
        parts = [self.message]
        if self.cause:
            parts.append(f"likely cause: {self.cause}")
        if self.remedy:
            parts.append(f"try: {self.remedy}")
        return " — ".join(parts)


@dataclass
class _RuleState:
    violations: int = 0
    told: int = 0
    next_telling: int = 0
    arrived: bool = False
    escalated: bool = False


class AlertEngine:
    """Checks rules at every log step and says what is new.

    A rule fires after ``patience`` violating checks in a row, again while the violation lasts (at
    ever longer intervals), and once more when it is over. A check in which a rule's metric is
    absent changes nothing for that rule. A rule whose metric has not come in ``arrival_checks``
    checks is reported once.

    Args:
        rules: what to watch; names must be unique.
        arrival_checks: checks to wait for a metric.
    """

    def __init__(self, rules: Iterable[AlertRule], arrival_checks: int = 40) -> None:
        self.rules = list(rules)
        names = [rule.name for rule in self.rules]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two alert rules named {sorted(twice)[0]!r}; names must be unique")
        self.arrival_checks = arrival_checks
        self.checks = 0
        self._states = {name: _RuleState() for name in names}

    def check(self, step: int, metrics: Mapping[str, float]) -> list[Alert]:
        """Return the alerts that this log step raises, the most severe first."""
        self.checks += 1
        raised = [
            alert
            for rule in self.rules
            if (alert := self._check_rule(rule, self._states[rule.name], step, metrics))
        ]
        if self.checks == self.arrival_checks:
            raised += self._missing(step)
        order = {"critical": 0, "warning": 1, "info": 2}
        return sorted(raised, key=lambda alert: order[alert.severity])

    def _check_rule(
        self, rule: AlertRule, state: _RuleState, step: int, metrics: Mapping[str, float]
    ) -> Alert | None:
        found = rule.find(metrics)
        if found is None:
            return None
        state.arrived = True
        others = [condition.find(metrics) for condition in rule.also]
        violated = rule.violated(found[1]) and all(
            other is not None and condition.violated(other[1])
            for condition, other in zip(rule.also, others, strict=True)
        )
        values = dict([found, *[other for other in others if other is not None]])
        if not violated:
            return self._recovered(rule, state, step, values, found)
        state.violations += 1
        if state.violations < rule.patience or (rule.once and state.told):
            return None
        escalating = (
            rule.escalate_after is not None
            and state.violations >= rule.escalate_after
            and not state.escalated
        )
        if state.violations < state.next_telling and not escalating:
            return None
        state.escalated |= escalating
        state.told += 1
        wait = rule.repeat * 2 ** max(0, state.told - 1)
        state.next_telling = state.violations + wait
        return self._alert(rule, state, step, values, found)

    def _alert(
        self,
        rule: AlertRule,
        state: _RuleState,
        step: int,
        values: dict[str, float],
        found: tuple[str, float],
    ) -> Alert:
        message = _fill(rule, found)
        if state.violations > rule.patience:
            message += f" (for {state.violations} log steps now)"
        return Alert(
            severity="critical" if state.escalated else rule.severity,
            message=message,
            remedy=rule.remedy,
            values=values,
            cause=rule.cause,
            rule=rule.name,
            step=step,
            lasting=state.violations,
        )

    def _recovered(
        self,
        rule: AlertRule,
        state: _RuleState,
        step: int,
        values: dict[str, float],
        found: tuple[str, float],
    ) -> Alert | None:
        had_fired = state.told > 0 and not rule.once
        state.violations = state.next_telling = 0
        state.escalated = False
        if not had_fired:
            return None
        state.told = 0
        return Alert(
            severity="info",
            message=f"{rule.name} is over: {found[0]} is {found[1]:.4g}",
            values=values,
            rule=rule.name,
            step=step,
            lasting=0,
        )

    def _missing(self, step: int) -> list[Alert]:
        silent = [
            rule for rule in self.rules if rule.expected and not self._states[rule.name].arrived
        ]
        if not silent:
            return []
        watched = ", ".join(f"{rule.name} ({rule.metric})" for rule in silent)
        return [
            Alert(
                severity="warning",
                message=f"alert rules that cannot fire, their metrics never came: {watched}",
                cause="a misspelt metric, a component that this model lacks, or a monitor that is "
                "switched off",
                remedy="correct or remove the rules, or set expected: false",
                rule="missing-metrics",
                step=step,
            )
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return counters as JSON values."""
        rules = {name: asdict(state) for name, state in self._states.items()}
        return {"checks": self.checks, "rules": rules}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting; rules that are new since then start anew."""
        self.checks = state["checks"]
        for name, values in state["rules"].items():
            if name in self._states:
                self._states[name] = _RuleState(**values)


def _fill(rule: AlertRule, found: tuple[str, float]) -> str:
    name, value = found
    threshold = "" if rule.threshold is None else f"{rule.threshold:.4g}"
    text = rule.message.replace("{metric}", name).replace("{threshold}", threshold)
    return text.replace("{percent}", f"{100 * value:.1f} %").replace("{value}", f"{value:.4g}")
