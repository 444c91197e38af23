"""Phases that end by their time."""

from types import SimpleNamespace

import pytest

from b2t.config import PhaseConfig, load_config
from b2t.records import read_jsonl
from b2t.train import budget
from b2t.train.budget import PhaseBudget
from b2t.train.build import build
from b2t.train.callbacks import MetricsFile
from b2t.train.progress import Progress
from b2t.train.schedule import lr_factor
from b2t.train.trainer import Stopped, Trainer
from tests.train.small_runs import SMALL, zero2

LIMITS = [
    "phases.0.steps=1000",
    "phases.0.minutes=1",
    "phases.0.min_lr_fraction=0",
    "phases.1.steps=2",
    "phases.2.steps=1",
    "codebook_start.after_steps=1",
    "evaluation.every=100",
    "evaluation.max_trials=4",
    "checkpoint.every=100",
    "log.every=1",
]


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by ten seconds with every step of a budgeted phase."""
    time = SimpleNamespace(now=0.0)

    def read():
        time.now += 10.0
        return time.now

    monkeypatch.setitem(budget._CLOCKS, "wall", read)
    return time


@pytest.fixture
def trainer_of(tiny_trials, tmp_path, one_rank, clock):
    def make(name, *overrides):
        places = [f"data.path={tiny_trials}", f"run.dir={tmp_path / name}"]
        config = load_config("demo", [*places, *SMALL, *LIMITS, *overrides])
        stop = SimpleNamespace(requested=False)
        hooks = [MetricsFile(config.run.dir)]
        trainer = Trainer(config, zero2(tmp_path, 4, 1), build(config), one_rank, hooks, stop)
        config.run.dir.mkdir(exist_ok=True)
        found = trainer.store.load()
        if found is not None:
            trainer.restore(found)
        return trainer

    return make


def rates(trainer):
    rows = read_jsonl(trainer.config.run.dir / "metrics.jsonl").records
    return {row["step"]: row["optim/lr/encoder"] for row in rows if "optim/lr/encoder" in row}


def test_a_phase_ends_with_its_minutes_and_its_rate_follows_them(trainer_of):
    trainer = trainer_of("timed", "phases.0.warmup_steps=0", "phases.0.schedule=linear")
    trainer.fit()
    # Six times ten seconds in the first phase; the others have steps alone.
    assert trainer.progress.finished and trainer.progress.step == 6 + 2 + 1
    assert trainer.store.load().state["progress"]["phase"] == 2
    found = rates(trainer)
    peak = trainer.config.phases[0].lr
    assert [found[step] for step in range(1, 7)] == pytest.approx(
        [peak * (1 - step / 6) for step in range(1, 7)], abs=1e-12
    )


def test_a_resumed_phase_has_the_time_that_was_left(trainer_of):
    trainer = trainer_of("cut")
    original = trainer._after_applied

    def stopping(*arguments):
        original(*arguments)
        trainer.stop.requested = trainer.progress.step == 2

    trainer._after_applied = stopping
    with pytest.raises(Stopped):
        trainer.fit()
    stopped_at, spent = trainer.progress.step, trainer.progress.phase_seconds
    assert spent == 10.0 * stopped_at > 0
    again = trainer_of("cut")
    assert again.progress.phase_seconds == spent
    again.fit()
    assert again.progress.step == 6 + 2 + 1


def test_steps_end_a_phase_before_its_minutes(trainer_of):
    trainer = trainer_of("short", "phases.0.steps=3")
    trainer.fit()
    assert trainer.progress.step == 3 + 2 + 1


def phase(**changes):
    return PhaseConfig(**{"name": "p", "steps": 100, "warmup_steps": 10, **changes})


def test_the_rate_follows_what_is_further_of_steps_and_minutes():
    linear = phase(schedule="linear", min_lr_fraction=0.0)
    assert lr_factor(55, linear, time_done=0.25) == pytest.approx(0.5)
    assert lr_factor(55, linear, time_done=0.75) == pytest.approx(0.25)
    assert lr_factor(4, linear, time_done=0.75) == pytest.approx(0.5), "warm-up goes by steps"


def test_processor_time_does_not_pass_in_sleep(monkeypatch):
    progress = Progress()
    kept = PhaseBudget(phase(minutes=1, minutes_of="processor"), progress)
    kept.elapsed()
    import time

    time.sleep(0.05)
    slept = kept.elapsed()
    used = time.process_time()
    while time.process_time() < used + 0.05:
        pass
    assert slept < 0.04 and kept.elapsed() >= 0.05
    assert PhaseBudget(phase(), progress).elapsed() == 0.0


@pytest.mark.parametrize(
    ("minutes", "seconds", "left"),
    [
        (None, 0.0, 3.0 * 950),
        (10, 0.0, 3.0 * 950),  # nothing is known of the time yet
        (10, 150.0, 450.0),  # 50 steps took a quarter of the minutes
        (1000, 150.0, 3.0 * 950),  # steps end it first
    ],
)
def test_what_is_left_is_that_of_steps_or_minutes_whichever_ends_first(minutes, seconds, left):
    progress = Progress(phase_step=50, phase_seconds=seconds)
    budget = PhaseBudget(phase(steps=1000, minutes=minutes), progress)
    assert budget.seconds_left(3.0) == pytest.approx(left)
