"""The first quarter of an hour on a GPU, tried where there is none."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from tests.script_modules import script


@pytest.fixture(scope="module")
def trial(repository):
    with script(repository, "try_gpu") as module:
        yield module


def test_steps_run_in_processes_of_their_own(trial, tmp_path):
    options = ["--device", "cpu", "--dry", "--patience", "9"]
    assert trial.main([*options, "--only", "device", "correct", "--out", str(tmp_path)]) == 0
    found = {each["step"]: each for each in json.loads((tmp_path / "summary.json").read_text())}
    assert found["device"]["found"]["torch"] == torch.__version__
    assert found["device"]["found"]["product, TFLOP/s"]["float32"] > 0
    assert " passed" in found["correct"]["found"]["pytest"]
    assert "| correct | passed |" in (tmp_path / "summary.md").read_text()


def test_all_steps_but_those_by_name_fit_eight_minutes(trial):
    limits = {name: limit for name, (_, limit) in trial.STEPS.items()}
    assert sum(limits.values()) - sum(limits[name] for name in trial.BY_NAME) == 8 * 60


def test_checks_that_fail_are_named(trial, tmp_path, monkeypatch):
    log = "FAILED tests/a.py::test_b[3-4] - assert 1 == 2\n1 failed, 2 passed in 3.0s\n"
    (tmp_path / "correct.log").write_text(log)
    monkeypatch.setattr(trial.Trial, "run", lambda *_: 1)
    with pytest.raises(
        RuntimeError, match=r"^1 failed, 2 passed in 3.0s, tests/a.py::test_b\[3-4\]$"
    ):
        trial.correct_step(trial.Trial(tmp_path, "cpu", True), 1)


def test_a_failure_is_told_and_the_others_go_on(trial, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("out of luck")

    def hangs(place, limit):
        place.run("bench", [sys.executable, "-c", "import time; time.sleep(60)"], 0.2)

    steps = {"device": (fails, 1), "bench": (hangs, 1), "correct": (lambda *_: {"fine": 1}, 1)}
    monkeypatch.setattr(trial, "STEPS", steps)
    monkeypatch.setattr(sys, "argv", ["try_gpu.py"])
    only = ["--only", "device", "bench", "correct"]
    assert trial.main(["--device", "cpu", "--out", str(tmp_path), *only]) == 1
    outcomes = json.loads((tmp_path / "summary.json").read_text())
    assert [each["status"] for each in outcomes] == ["failed", "cut off", "passed"]
    assert "out of luck" in outcomes[0]["found"]["why"]


def test_only_a_gpu_may_write_results(trial, tmp_path):
    with pytest.raises(SystemExit):
        trial.main(["--device", "cpu", "--write", "--out", str(tmp_path)])


def test_results_name_the_device_and_hold_the_benchmark(trial, tmp_path):
    (tmp_path / "bench_kernels.md").write_text("- exact over fast, at most 1.15: 1.09 (met)\n")
    outcomes = [
        trial.Outcome("device", "passed", 1.0, {"device": "A5500"}),
        trial.Outcome("bench", "passed", 9.0, {}),
    ]
    text = trial.measured(outcomes, tmp_path)
    assert "device A5500" in text and "1.09 (met)" in text and "| bench | passed | 9.0 |" in text
    outcomes[1].status = "failed"
    assert "1.09" not in trial.measured(outcomes, tmp_path)


def test_runs_that_went_apart_are_refused(trial, tmp_path):
    def checkpoint(run, weights):
        place = tmp_path / run / "checkpoints" / "step-00000048"
        place.mkdir(parents=True, exist_ok=True)
        save_file(weights, place / "weights.safetensors")
        return tmp_path / run

    weights = {"a": torch.ones(4), "b": torch.arange(4.0)}
    alone = checkpoint("alone", weights)
    same = trial.differences(alone, checkpoint("stopped", weights))
    assert same == {"tensors": 2, "bitwise equal": 2, "greatest relative difference": 0.0}
    with pytest.raises(RuntimeError, match="went apart"):
        trial.differences(alone, checkpoint("stopped", {**weights, "a": torch.ones(4) * 1.1}))
    with pytest.raises(RuntimeError, match=r"other tensors: \['b'\]"):
        trial.differences(alone, checkpoint("stopped", {"a": torch.ones(4)}))


def test_a_run_is_asked_to_leave_once_it_is_ready(trial):
    code = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(75)); time.sleep(60)"
    waits = [sys.executable, "-c", code]
    polls = iter([False, False] + [True] * 99)

    def ready():
        return next(polls)

    with subprocess.Popen(waits) as process:
        status = trial.leave_when(process, ready, 30)
    assert status in (75, -signal.SIGTERM)  # the latter where it came before the handler stood
