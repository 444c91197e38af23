import json
import math

import pytest
from pydantic import ValidationError

from b2t.config import AlertRule, Condition
from b2t.monitor.alerts import AlertEngine
from b2t.monitor.rules import BUILT_IN, RULE_SETS, STRICT


def rule(**changes):
    fields = {"name": "low", "metric": "x", "threshold": 0.5, "message": "{metric} is {value}"}
    return AlertRule(**{**fields, **changes})


def run(engine, values, metric="x"):
    return [
        [(a.severity, a.rule, a.lasting) for a in engine.check(step, {metric: value})]
        for step, value in enumerate(values, 1)
    ]


def fired(outcome):
    return [step for step, alerts in enumerate(outcome, 1) if alerts]


def test_a_rule_fires_at_its_patience_in_a_row_only():
    outcome = run(AlertEngine([rule(patience=3)]), [0.1, 0.1, 0.9, 0.1, 0.1, 0.1])
    assert fired(outcome) == [6]
    assert outcome[5] == [("warning", "low", 3)]


def test_a_lasting_violation_is_told_at_doubling_intervals():
    outcome = run(AlertEngine([rule(repeat=4)]), [0.1] * 40)
    assert fired(outcome) == [1, 5, 13, 29]


def test_the_end_of_a_violation_is_told_once_and_a_new_one_anew():
    outcome = run(AlertEngine([rule(patience=2)]), [0.1, 0.1, 0.9, 0.9, 0.1, 0.1])
    assert fired(outcome) == [2, 3, 6]
    assert outcome[2] == [("info", "low", 0)]
    assert outcome[5] == [("warning", "low", 2)]


def test_a_violation_that_never_fired_ends_silently():
    assert fired(run(AlertEngine([rule(patience=3)]), [0.1, 0.1, 0.9])) == []


def test_a_lasting_warning_escalates_where_asked():
    outcome = run(AlertEngine([rule(repeat=100, escalate_after=4)]), [0.1] * 6)
    assert fired(outcome) == [1, 4]
    assert outcome[3] == [("critical", "low", 4)]


def test_once_is_once():
    engine = AlertEngine([rule(once=True, severity="info", repeat=1)])
    assert fired(run(engine, [0.1, 0.1, 0.9, 0.1, 0.1])) == [1]


def test_thresholds_are_not_violated_by_equality_or_nan():
    low, high = (
        Condition(metric="x", threshold=1.0),
        Condition(metric="x", threshold=1.0, comparison=">"),
    )
    assert not low.violated(1.0) and not high.violated(1.0)
    assert low.violated(0.999) and high.violated(1.001)
    assert not low.violated(math.nan) and not high.violated(math.nan)
    finite = Condition(metric="x", comparison="not_finite")
    assert finite.violated(math.nan) and finite.violated(-math.inf) and not finite.violated(3.0)


def test_a_star_takes_the_worst_match_and_non_finite_before_all():
    below = Condition(metric="u/*", threshold=0.5)
    above = Condition(metric="u/*", threshold=0.5, comparison=">")
    metrics = {"u/0": 0.7, "u/1": 0.2, "u/2": 0.9, "v/0": -3.0}
    assert below.find(metrics) == ("u/1", 0.2)
    assert above.find(metrics) == ("u/2", 0.9)
    assert Condition(metric="u/*", comparison="not_finite").find({**metrics, "u/3": math.inf}) == (
        "u/3",
        math.inf,
    )
    assert below.find({"w": 1.0}) is None


def test_all_further_conditions_must_hold():
    engine = AlertEngine([rule(also=[{"metric": "frames", "comparison": ">", "threshold": 4}])])
    assert engine.check(1, {"x": 0.1, "frames": 3.0}) == []
    assert engine.check(2, {"x": 0.1}) == []
    (alert,) = engine.check(3, {"x": 0.1, "frames": 5.0})
    assert alert.values == {"x": 0.1, "frames": 5.0}


def test_metrics_that_never_come_are_reported_once_by_name():
    rules = [rule(), rule(name="typo", metric="lost/totl"), rule(name="maybe", expected=False)]
    engine = AlertEngine([*rules[:2], rules[2].model_copy(update={"metric": "y"})], 3)
    raised = [engine.check(step, {"x": 0.9}) for step in range(1, 8)]
    assert [len(alerts) for alerts in raised] == [0, 0, 1, 0, 0, 0, 0]
    message = raised[2][0].message
    assert "typo (lost/totl)" in message and "low" not in message and "maybe" not in message


def test_the_most_severe_comes_first():
    rules = [rule(name="a"), rule(name="b", severity="critical"), rule(name="c", severity="info")]
    assert [a.rule for a in AlertEngine(rules).check(1, {"x": 0.0})] == ["b", "a", "c"]


@pytest.mark.parametrize("stop", range(0, 12))
def test_resume_goes_on_exactly(stop):
    values = [0.1, 0.1, 0.1, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.9, 0.1]
    rules = [rule(patience=2, repeat=2, escalate_after=5), rule(name="gone", metric="y")]
    straight = run(AlertEngine(rules, 6), values)
    first = AlertEngine(rules, 6)
    before = run(first, values[:stop])
    second = AlertEngine(rules, 6)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + run(second, values[stop:]) == straight


def test_a_rule_removed_or_added_between_sessions_does_no_harm():
    first = AlertEngine([rule(), rule(name="old")])
    run(first, [0.1])
    second = AlertEngine([rule(), rule(name="new")])
    second.load_state_dict(first.state_dict())
    assert [a.rule for a in second.check(2, {"x": 0.1})] == ["new"]


def test_misconfigured_rules_are_refused():
    with pytest.raises(ValidationError, match="Extra inputs"):
        rule(treshold=3)
    with pytest.raises(ValidationError, match="a threshold belongs to"):
        rule(threshold=None)
    with pytest.raises(ValidationError, match="a threshold belongs to"):
        rule(comparison="not_finite")
    with pytest.raises(ValueError, match="names must be unique"):
        AlertEngine([rule(), rule()])


def test_alerts_are_json_whatever_their_values():
    engine = AlertEngine([rule(comparison="not_finite", threshold=None)])
    (alert,) = engine.check(3, {"x": math.nan})
    record = json.loads(json.dumps(alert.to_dict(), allow_nan=False))
    assert record["values"] == {"x": None} and record["message"] == "x is nan"


HEALTHY = {
    "loss/total": 1.0,
    "loss/vq_ratio": 0.4,
    "optim/grad_norm": 1.2,
    "codebook/utilization": 0.99,
    "codebook/utilization_worst": 0.985,
    "codebook/perplexity_worst_fraction": 0.78,
    "codebook/perplexity_fraction": 0.85,
    "codebook/frames_per_code": 40.0,
    "codebook/dead": 0.02,
    "ema/code_variance_min": 0.01,
    "ema/revived_per_step": 1.0,
    "ema/revived_fraction": 0.0003,
    "ema/ranks_differ": 0.0,
    "ema/warm": 1.0,
    "reconstruction/snr_drop_db": 0.3,
    "reconstruction/snr_db": 12.0,
    "reconstruction/cosine": 0.97,
    "phoneme/left_out_fraction": 0.02,
}
FAILURES = {
    "loss-not-finite": {"loss/reconstruction": math.nan},
    "zero-gradients": {"optim/grad_norm": 0.0},
    "codebook-collapse": {"codebook/utilization_worst": 0.01},
    "codebook-shrunk": {"ema/code_variance_min": 1e-9},
    "ranks-differ": {"ema/ranks_differ": 1.0},
    "low-utilization": {"codebook/utilization_worst": 0.45},
    "low-perplexity": {"codebook/perplexity_worst_fraction": 0.05},
    "vq-ratio": {"loss/vq_ratio": 12.0},
    "revival-churn": {"ema/revived_per_step": 40.0, "ema/revived_fraction": 0.02},
    "gradient-spike": {"optim/grad_norm": 50.0},
    "snr-falls": {"reconstruction/snr_drop_db": 4.0},
    "phonemes-left-out": {"phoneme/left_out_fraction": 0.3},
    "texts-left-out": {"text/left_out_fraction": 0.3},
    "ema-warm": {"ema/warm": 1.0},
}


def test_every_built_in_rule_has_its_failure_here():
    assert {rule.name for rule in BUILT_IN} == FAILURES.keys()


@pytest.mark.parametrize("name", FAILURES)
def test_built_in_rules_fire_on_their_failure_and_name_a_remedy(name):
    engine = AlertEngine(BUILT_IN)
    raised = [a for step in range(6) for a in engine.check(step, {**HEALTHY, **FAILURES[name]})]
    (alert,) = [a for a in raised if a.rule == name]
    assert "{" not in alert.message
    if alert.severity != "info":
        assert alert.cause and alert.remedy


@pytest.mark.parametrize(
    ("name", "metric", "silent", "fires"),
    [
        ("zero-gradients", "optim/grad_norm", 1.01e-8, 0.99e-8),
        ("codebook-collapse", "codebook/utilization_worst", 0.101, 0.099),
        ("codebook-shrunk", "ema/code_variance_min", 1.01e-6, 0.99e-6),
        ("low-utilization", "codebook/utilization_worst", 0.501, 0.499),
        ("low-perplexity", "codebook/perplexity_worst_fraction", 0.201, 0.199),
        ("vq-ratio", "loss/vq_ratio", 9.99, 10.01),
        ("revival-churn", "ema/revived_per_step", 4.99, 5.01),
        ("gradient-spike", "optim/grad_norm", 9.99, 10.01),
        ("snr-falls", "reconstruction/snr_drop_db", 2.99, 3.01),
        ("phonemes-left-out", "phoneme/left_out_fraction", 0.099, 0.101),
        ("texts-left-out", "text/left_out_fraction", 0.099, 0.101),
    ],
)
def test_built_in_thresholds_are_those_of_the_alert_table(name, metric, silent, fires):
    # Many revivals are churn where they are many of the codes too.
    others = {**HEALTHY, "ema/revived_fraction": 0.0101}

    def raised(value):
        engine = AlertEngine(BUILT_IN)
        checks = [engine.check(step, {**others, metric: value}) for step in range(6)]
        return {alert.rule for alerts in checks for alert in alerts}

    assert name in raised(fires) and name not in raised(silent)


def test_built_in_rules_are_silent_on_a_healthy_run():
    engine = AlertEngine(BUILT_IN, arrival_checks=10)
    raised = [a.rule for step in range(200) for a in engine.check(step, HEALTHY)]
    assert raised == ["ema-warm"]


def test_built_in_rules_wait_until_the_codebooks_have_settled():
    unsettled = {
        "ema/warm": 0.0,
        "codebook/utilization_worst": 0.05,
        "codebook/perplexity_worst_fraction": 0.01,
        "ema/revived_per_step": 20.0,
        "ema/revived_fraction": 0.02,
    }
    engine = AlertEngine(BUILT_IN)
    assert [a for step in range(9) for a in engine.check(step, {**HEALTHY, **unsettled})] == []


@pytest.mark.parametrize(("frames_per_code", "fires"), [(4.0, False), (4.01, True)])
def test_codes_are_judged_only_where_there_are_frames_enough(frames_per_code, fires):
    """At 4 frames per code uniform use leaves out exp(-4), 2 % of the codes; at 1, 37 %."""
    few = {"codebook/utilization_worst": 0.05, "codebook/perplexity_worst_fraction": 0.01}
    metrics = {**HEALTHY, **few, "codebook/frames_per_code": frames_per_code}
    engine = AlertEngine(BUILT_IN)
    raised = {a.rule for step in range(9) for a in engine.check(step, metrics)} - {"ema-warm"}
    assert raised == (
        {"codebook-collapse", "low-utilization", "low-perplexity"} if fires else set()
    )


@pytest.mark.parametrize(
    ("metric", "silent", "fires"),
    [
        ("codebook/utilization", 0.401, 0.399),
        ("codebook/perplexity_fraction", 50.1 / 256, 49.9 / 256),
        ("codebook/dead", 0.399, 0.401),
        ("reconstruction/snr_db", 10.1, 9.9),
        ("reconstruction/cosine", 0.801, 0.799),
        ("optim/grad_norm", 1.01e-6, 0.99e-6),
    ],
)
def test_strict_thresholds_are_those_of_the_monitoring_table(metric, silent, fires):
    def raised(value):
        engine = AlertEngine([each for each in STRICT if each not in BUILT_IN])
        checks = [engine.check(step, {**HEALTHY, metric: value}) for step in range(6)]
        return {each.rule for alerts in checks for each in alerts} - {"utilization > 0.95"}

    assert len(raised(fires)) == 1 and raised(silent) == set()


def test_strict_rules_add_the_tables_bounds_literally():
    engine = AlertEngine(STRICT)
    raised = [a.rule for step in range(5) for a in engine.check(step, HEALTHY)]
    assert raised == ["ema-warm", "utilization > 0.95"]
    assert RULE_SETS["strict"] is STRICT
