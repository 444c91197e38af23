"""Each built-in alert is fired by a training run on two ranks that fails that way."""

import json

import pytest

from b2t.monitor.rules import BUILT_IN

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(training, tiny):
    """Alerts (rule, severity, step) and last step of each case, statuses of both ranks."""
    config = tiny(
        phases=[{"name": "all", "steps": 16, "lr": 1e-3, "warmup_steps": 2}],
        monitor={"window": 4},
        codebook_start={"after_steps": 0, "frames_per_code": 8},
    )
    config["data"]["augment"] = {"enabled": False}
    config["model"]["text_decoder"] = {"enabled": False}
    config["model"]["quantizer"]["decay"] = 0.5
    done = training.run("alerts", config=config, script="tests/distributed/alerts_driver.py")
    return done.folder


def alerts(runs, case):
    lines = (runs / case / "metrics.jsonl").read_text("utf-8").splitlines()
    found = [json.loads(line).get("alert") for line in lines]
    return {alert["rule"]: alert for alert in found if alert and alert["lasting"]}


def statuses(runs, case):
    return [json.loads((runs / f"statuses-{rank}.json").read_text())[case] for rank in range(2)]


def state(runs, case):
    return json.loads((runs / case / "status.json").read_text())


def test_a_healthy_run_raises_nothing_but_that_it_is_warm(runs):
    assert statuses(runs, "healthy") == [0, 0]
    assert list(alerts(runs, "healthy")) == ["ema-warm"]


WARNINGS = [
    ("learning rate", "gradient-spike"),
    ("learning rate", "low-perplexity"),
    ("learning rate", "low-utilization"),
    ("learning rate", "snr-falls"),
    ("restless revival", "revival-churn"),
    ("codes that do not follow", "vq-ratio"),
    ("rule of a GPU", "missing-metrics"),
    ("few frames", "phonemes-left-out"),
    ("few frames", "texts-left-out"),
]

CRITICALS = [
    ("learning rate", "codebook-collapse"),
    ("loss weights", "zero-gradients"),
    ("cut graph", "zero-gradients"),
    ("overflow", "loss-not-finite"),
    ("codes alike", "codebook-shrunk"),
    ("ranks apart", "ranks-differ"),
]


@pytest.mark.parametrize(("case", "rule"), WARNINGS)
def test_warning(runs, case, rule):
    alert = alerts(runs, case)[rule]
    assert alert["severity"] == "warning"
    assert alert["message"] and alert["cause"] and alert["remedy"]


@pytest.mark.parametrize("case", ["restless revival", "codes that do not follow", "rule of a GPU"])
def test_a_run_that_only_warns_is_trained_to_its_end(runs, case):
    assert statuses(runs, case) == [0, 0]
    assert state(runs, case)["state"] == "finished"


@pytest.mark.parametrize(("case", "rule"), CRITICALS)
def test_critical_ends_all_ranks_with_a_checkpoint(runs, case, rule):
    alert = alerts(runs, case)[rule]
    assert alert["severity"] == "critical"
    assert alert["cause"] and alert["remedy"]
    assert statuses(runs, case) == [3, 3]
    ended = state(runs, case)
    assert ended["state"].startswith("failed: ") and alert["message"] in ended["state"]
    assert ended["step"] == alert["step"]
    assert (runs / case / "checkpoints" / f"step-{alert['step']:08d}").is_dir()


def test_the_report_of_a_failed_run_shows_why(runs):
    page = (runs / "loss weights" / "report" / "report.html").read_text("utf-8")
    assert alerts(runs, "loss weights")["zero-gradients"]["remedy"] in page


def test_skipped_trials_are_named(runs):
    message = alerts(runs, "overflow")["loss-not-finite"]["message"]
    assert "loss/reconstruction" not in message and "loss/total" in message
    assert message.count("t15.") == 4  # 2 trials of each of 2 ranks


def test_every_built_in_rule_has_been_fired(runs):
    cases = {"healthy", *(case for case, _ in [*WARNINGS, *CRITICALS])}
    fired = {rule for case in cases for rule in alerts(runs, case)}
    built_in = {rule.name for rule in BUILT_IN}
    assert fired == built_in | {"missing-metrics"}
    assert {rule for _, rule in [*WARNINGS, *CRITICALS]} | {"ema-warm"} == fired
