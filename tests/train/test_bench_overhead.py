"""The bare loop that the trainer is timed against takes the same steps, and the sums are right."""

from types import SimpleNamespace

import numpy as np
import pytest

from b2t.train.callbacks import Callback
from b2t.train.step_clock import StepClock
from tests.script_modules import script
from tests.train.small_runs import SMALL, zero2

SETTINGS = """
    codebook_start.frames_per_code=2 model.adapter.dropout=0 model.encoder.dropout=0
    model.text_decoder.dropout=0 model.phoneme_head.dropout=0 log.every=2 evaluation.max_trials=2
    phases.2.warmup_steps=1
""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def bench(repository):
    with script(repository, "bench_overhead") as module:
        yield module


class Losses(Callback):
    def __init__(self):
        self.of_step = []

    def on_step(self, trainer, context):
        self.of_step.append(
            sum(
                weight * float(context.losses[n]) for n, weight in context.weights.items() if weight
            )
        )


def watched(bench, monkeypatch):
    """The clock and the trainer's losses of the next measurement."""
    losses, clocks = Losses(), []
    monkeypatch.setattr(bench, "main_callbacks", lambda *_: [losses])
    summary = bench.Turns.summary
    monkeypatch.setattr(
        bench.Turns, "summary", lambda clock, *a: clocks.append(clock) or summary(clock, *a)
    )
    return losses, clocks


@pytest.mark.parametrize("against", ["torch", "deepspeed"])
def test_both_loops_take_the_same_steps(
    bench, against, tiny_trials, tmp_path, one_rank, monkeypatch
):
    losses, clocks = watched(bench, monkeypatch)
    ds_path = zero2(tmp_path, 4, 1).path
    options = bench.arguments(
        ["--data", str(tiny_trials), "--deepspeed_config", str(ds_path), "--against", against,
         "--segments", "3", "--warmup", "1", "--length", "2", "--saves", "2", *SMALL, *SETTINGS]
    )  # fmt: skip
    found = bench.measure(options, one_rank, str(tmp_path))
    (clock,) = clocks
    assert len(losses.of_step) == 8 and len(set(losses.of_step)) == 8
    np.testing.assert_allclose(clock.losses, losses.of_step[1::2], rtol=1e-5)
    assert found["pairs"] == 3 and found["steps_per_segment"] == 2
    assert found["checkpoint_bytes"] > found["parameters"] * 4


def bare_clock(bench, **fields):
    clock = object.__new__(bench.Turns)
    clock.__dict__.update(length=2, checkpoint_bytes=1, **fields)
    return clock


def test_the_sums(bench):
    clock = bare_clock(
        bench,
        ours=[np.array([9.0, 9.0]), np.array([2.0, 1.0]), np.array([4.0, 2.0])],
        theirs=[np.array([1.0, 1.0]), np.array([1.8, 0.9]), np.array([4.0, 2.0])],
        logs=[0.2, 0.4, 0.3],
        saves=[3.0, 1.0, 2.0],
        stalls=[1.5, 0.2, 0.6],
    )
    found = clock.summary(warmup=1, log_every=10, checkpoint_every=100)
    # Steps of 1 and 2 s, 0.03 s of logging and 0.02 s of saving in each; 0.9 and 2 s bare.
    ratios = [0.9 / 1.05, 2.0 / 2.05]
    assert found["ratio"] == pytest.approx(np.mean(ratios))
    assert found["ratio_of_totals"] == pytest.approx(2.9 / 3.1)
    assert found["ratio_of_processor_time"] == pytest.approx(0.95)
    assert found["trainer_step_s"] == pytest.approx(1.53)
    assert found["checkpoint_share"] == pytest.approx(2.0 / (500 * 1.53))
    text = bench.describe(
        {"against": "torch", "ranks": 1, "device": "cpu", "threads": 1, "parameters": 10,
         "log_every": 10, "checkpoint_every": 100, **found}
    )  # fmt: skip
    assert "stands still for 600 ms of it (median; 200 – 1500), 30.0 %" in text
    assert "target ≥ 0.95: MISSED" in text and "target ≤ 2 %: reached" in text


def test_turns_go_a_b_b_a(bench, monkeypatch):
    turns = []
    trainer = SimpleNamespace(clock=StepClock())
    bare = SimpleNamespace(
        start=lambda _: None, batches=SimpleNamespace(close=lambda: None), segment=None
    )
    clock = bare_clock(
        bench, trainer=trainer, bare=bare, pairs=4, wanted_saves=0, taken=0, ours=[], theirs=[],
        saves=[], stalls=[], logged=np.zeros(2), started=np.zeros(2),
    )  # fmt: skip
    clock.inner = SimpleNamespace(__next__=None, close=lambda: None)
    monkeypatch.setattr(bench.Turns, "_now", lambda _: np.zeros(2))
    monkeypatch.setattr(bench.Turns, "_let_bare", lambda _: turns.append("bare"))
    for _ in range(4):
        for _ in range(clock.length):
            if clock.taken % clock.length == 0:
                clock._turn(clock.taken // clock.length)
            clock.taken += 1
        turns.append("ours")
    clock.close()
    assert turns == ["ours", "bare", "bare", "ours", "ours", "bare", "bare", "ours"]
