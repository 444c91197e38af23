"""The loops that throughput is compared with take the trainer's steps; the columns are right."""

import sys

import numpy as np
import pytest
import torch

from b2t.quantize.distributed import PendingSum
from b2t.train.callbacks import Callback
from tests.script_modules import script
from tests.train.small_runs import SMALL, zero2

SETTINGS = """
    codebook_start.frames_per_code=2 model.adapter.dropout=0 model.encoder.dropout=0
    model.text_decoder.dropout=0 model.phoneme_head.dropout=0 evaluation.max_trials=2
    phases.2.warmup_steps=1
""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def bench(repository):
    with script(repository, "bench_train") as module:
        yield module


class Losses(Callback):
    def __init__(self):
        self.of_step = []

    def on_step(self, trainer, context):
        weights = context.weights.items()
        self.of_step.append(sum(w * float(context.losses[n]) for n, w in weights if w))


@pytest.mark.parametrize(("against", "accumulation"), [("ddp", 1), ("hf", 2)])
def test_the_peer_takes_the_same_steps(
    bench, against, accumulation, tiny_trials, tmp_path, one_rank, monkeypatch
):
    losses, clocks = Losses(), []
    monkeypatch.setattr(bench, "main_callbacks", lambda *_: [losses])
    made = bench.Waits.__post_init__
    monkeypatch.setattr(
        bench.Waits, "__post_init__", lambda clock: clocks.append(clock) or made(clock)
    )
    ds_path = zero2(tmp_path, 4 // accumulation, accumulation).path
    options = bench.arguments(
        ["--data", str(tiny_trials), "--deepspeed_config", str(ds_path), "--segments", "3",
         "--warmup", "1", *SMALL, *SETTINGS, "phases.2.exact_regularizers=false"]
    )  # fmt: skip
    case = bench.Case(2, against, "kernels", "off", "off")
    line = bench.measure(options, case, one_rank, str(tmp_path))
    assert len(losses.of_step) == 8 and len(set(losses.of_step)) == 8
    if accumulation == 1:  # the peers' last loss is that of one micro-batch
        np.testing.assert_allclose(clocks[0].losses, losses.of_step[1::2], rtol=1e-5)
    assert len(clocks[0].theirs) == 4
    assert line.phase == "joint" and line.mfu is None and 0 < line.data_wait < 1
    assert 0 < line.sync < 0.5
    assert line.frames_per_s / line.steps_per_s > 4  # frames of a step


@pytest.mark.parametrize("against", ["ddp", "hf"])
def test_steps_that_fp16_skips_leave_pairs_whole(
    bench, against, tiny_trials, tmp_path, one_rank, monkeypatch
):
    """The first loss scale overflows: the trainer makes up for what it skips, untimed."""
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed refuses fp16 on CPUs; its engine and loss scaler work there all the same.
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    monkeypatch.setattr(bench, "main_callbacks", lambda *_: [])
    fp16 = {"enabled": True, "initial_scale_power": 30, "hysteresis": 1}
    ds_path = zero2(tmp_path, 4, 1, fp16=fp16).path
    options = bench.arguments(
        ["--data", str(tiny_trials), "--deepspeed_config", str(ds_path), "--segments", "3",
         "--warmup", "1", *SMALL, *SETTINGS]
    )  # fmt: skip
    clocks, made = [], bench.Waits.__post_init__
    monkeypatch.setattr(
        bench.Waits, "__post_init__", lambda clock: clocks.append(clock) or made(clock)
    )
    case = bench.Case(2, against, "kernels", "off", "off")
    line = bench.measure(options, case, one_rank, str(tmp_path))
    (clock,) = clocks
    assert clock.trainer.progress.skipped > 0 and clock.taken > 8
    assert len(clock.ours) == len(clock.theirs) == 4 and line.ratio > 0


def test_one_by_one_changes_one_thing_at_a_time(bench):
    options = bench.arguments(
        ["--data", "x", "--one-by-one", "--phases", "1", "--against", "hf", "ddp",
         "--checkpointing", "off", "on", "--compile", "off", "on"]
    )  # fmt: skip
    assert [(c.against, c.checkpointing, c.compiled) for c in bench.cases(options)] == [
        ("hf", "off", "off"), ("ddp", "off", "off"), ("hf", "off", "on"), ("hf", "on", "off"),
    ]  # fmt: skip


def test_a_case_switches_what_it_names(bench, tmp_path):
    options = bench.arguments(["--data", "x"])
    for asked, every in (("on", 1), ("off", 0)):
        case = bench.Case(0, "ddp", "kernels", asked, asked)
        config = bench.case_config(options, case, str(tmp_path), 7)
        found = config.model.activation_checkpointing
        assert (found.encoder, found.signal_decoder, found.text_decoder) == (every,) * 3
        assert config.model.compile_blocks is (asked == "on")
        assert [phase.steps for phase in config.phases] == [7]


def test_the_table_has_a_column_for_each_number(bench):
    line = bench.Line(
        "joint", "ddp", "kernels", "off", "on", 2, 4.0, 1234.5, 0.05, 0.02, 0.3, 0.4, 0.97, 0.9, 1,
        0.96,
    )  # fmt: skip
    head, row = bench.table([line]).splitlines()
    assert " ".join(head.split()).startswith(
        "phase against kernels ckpt compile ranks steps/s frames/s"
    )
    assert " ".join(row.split()) == (
        "joint ddp kernels off on 2 4.00 1,234 5.0 % 2.0 % 30.0 % 40.0 % "
        "0.970 (0.900 – 1.000) 0.960"
    )


def test_only_what_the_trainer_sums_over_ranks_is_timed(bench, monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(now)))
    begin, wait = PendingSum.__init__, PendingSum.wait
    with bench.QuantizerSync() as sync:
        PendingSum([torch.ones(2)]).wait()
        assert sync.seconds == 2  # a tick in each
        with sync.paused():
            PendingSum([torch.ones(2)]).wait()
        assert sync.seconds == 2
    assert (PendingSum.__init__, PendingSum.wait) == (begin, wait)


def test_a_part_of_a_step_is_without_those_inside_of_it(bench, monkeypatch):
    """The table adds up to the step, and says how much more of theirs each part of ours takes."""
    clock = iter([[0, 0], [1, 1], [4, 2], [9, 5], [20, 20], [22, 21]])
    module = sys.modules[bench.Shares.__module__]
    monkeypatch.setattr(module, "_now", lambda: np.array(next(clock), dtype=float))
    shares = bench.Shares()
    inner = shares._timed(lambda: None, "optimizer")
    outer = shares._timed(inner, "backward")
    inner()  # before the first pair that is timed
    shares.on = True
    outer()  # from 0 to 9 by the clock, of which 1 to 4 are the optimizer's
    with shares.of_the_other():
        inner()
    told = shares.table(np.array([20.0, 10.0]), np.array([10.0, 5.0]), 1000)
    rows = {line[:34].strip(): line[34:].split() for line in told.splitlines()[1:]}
    assert rows["backward"] == ["6.0", "0.0", "4.0", "0.0", "+80.0", "%"]
    assert rows["optimizer"] == ["3.0", "2.0", "1.0", "1.0", "+0.0", "%"]
    assert rows["rest, and other threads"] == ["11.0", "8.0", "5.0", "4.0", "+20.0", "%"]
    assert rows["a step"] == ["20.0", "10.0", "10.0", "5.0", "+100.0", "%"]


def test_nothing_stays_timed(bench):
    """All that is timed is there in the DeepSpeed and torch that are installed."""
    module = sys.modules[bench.Shares.__module__]
    before = [getattr(owner, name) for owner, name, _ in module._PARTS]
    with bench.Shares():
        assert all(
            getattr(o, n) is not b for (o, n, _), b in zip(module._PARTS, before, strict=True)
        )
    assert [getattr(owner, name) for owner, name, _ in module._PARTS] == before
