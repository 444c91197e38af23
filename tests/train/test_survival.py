"""One rank that meets full disks and requests to stop, and what becomes of it."""

import errno
import hashlib
import os
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from b2t.errors import UserError
from b2t.quantize.schedules import anneal
from b2t.records import JsonlSink, read_jsonl
from b2t.train import checkpoint as checkpoints
from b2t.train.callbacks import Callback, MetricsFile
from b2t.train.monitoring import Watch
from b2t.train.trainer import Stopped
from tests.train.interrupted import FP16, ask_to_stop, assert_same_end, end_of


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_stopped_between_two_records(start, ds_file, orders, precision):
    """Records are means over three steps; the stops fall after one or two of them."""
    file = ds_file(fp16=FP16) if precision == "fp16" else ds_file()
    workers = "data.workers=2"
    whole = start("whole", file, workers)
    whole.fit()
    assert len([r for r in end_of(whole)[2] if "loss/total" in r]) == 6
    scales = {r["optim/loss_scale"] for r in end_of(whole)[2] if "loss/total" in r}
    assert (len(scales) > 1) == (precision == "fp16"), "the scaler is at work"
    for step in (1, 4, 9):
        orders[step] = ask_to_stop
        with pytest.raises(Stopped):
            start("again", file, workers).fit()
        del orders[step]
    again = start("again", file, workers)
    assert again.progress.step == 10
    again.fit()
    assert_same_end(end_of(again), end_of(whole))


def test_phase_ends_are_kept_and_other_checkpoints_go(start, ds_file):
    trainer = start("run", ds_file(fp16=FP16), "checkpoint.every=3")
    trainer.fit()
    assert trainer.store.steps() == [8, 9, 10, 12], "ends of phases, and the newest besides"
    between = start("run", ds_file(fp16=FP16))
    assert between.progress.finished
    assert_frozen(*(weights_at(trainer, step) for step in (8, 9, 10, 12)))


def weights_at(trainer, step):
    folder = trainer.store.folder / f"step-{step:08d}"
    return load_file(folder / "weights.safetensors")


def digest(weights, component):
    text = hashlib.sha256()
    for name in sorted(weights):
        if name.startswith(f"{component}."):
            text.update(weights[name].numpy().tobytes())
    return text.hexdigest()


def assert_frozen(before, within, after, end):
    """The second phase freezes two components; weight decay and momentum must not move them."""
    for component in ("adapter", "encoder"):
        seen = [digest(weights, component) for weights in (before, within, after, end)]
        assert seen[0] == seen[1] == seen[2] != seen[3], component
    assert digest(before, "signal_decoder") != digest(within, "signal_decoder")
    encoder = {name: value for name, value in before.items() if name.startswith("encoder.")}
    assert any(not value.half().float().equal(value) for value in encoder.values())


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def log_lines(monkeypatch):
    from b2t.train import callbacks

    said = []
    for level in ("error", "warning"):
        monkeypatch.setattr(
            callbacks.logger(callbacks.__name__), level, lambda text, *a: said.append(text % a)
        )
    return said


def broken(*_, **__):
    raise RuntimeError("the figure has no axes")


@pytest.mark.parametrize("fail", [full, broken])
@pytest.mark.parametrize("collective", [False, True])
def test_a_hook_that_fails(start, ds_file, collective, fail):
    class Hook(Callback):
        """Fails; where it meets the other ranks inside, they would wait for it."""

        def on_step(self, trainer, context):
            fail()

        def state_dict(self):
            fail()

    Hook.collective = collective
    trainer = start("run", ds_file())
    trainer.callbacks.append(Hook())
    if collective:
        with pytest.raises((OSError, RuntimeError), match=r"No space left|no axes"):
            trainer.fit()
    else:
        trainer.fit()
    assert trainer.progress.finished is not collective
    assert Watch.collective and not MetricsFile.collective


def test_a_disk_that_is_full_for_a_while(start, ds_file, orders, monkeypatch, log_lines):
    trainer = start("run", ds_file(), "log.every=1", "checkpoint.every=2", "checkpoint.keep=3")
    write, save = JsonlSink.write, checkpoints.write_safetensors

    def fill(_):
        trainer.wait_for_checkpoint()
        monkeypatch.setattr(JsonlSink, "write", full)
        monkeypatch.setattr(checkpoints, "write_safetensors", full)

    def free(_):
        trainer.wait_for_checkpoint()
        monkeypatch.setattr(JsonlSink, "write", write)
        monkeypatch.setattr(checkpoints, "write_safetensors", save)

    orders.update({3: fill, 6: free})
    trainer.fit()
    assert trainer.progress.finished
    records = read_jsonl(trainer.config.run.dir / "metrics.jsonl").records
    assert [r["step"] for r in records if "loss/total" in r] == [1, 2, 3, *range(7, 13)]
    assert next(r for r in records if r["step"] == 7)["lost_records"] == 3
    assert len([text for text in log_lines if "records are lost" in text]) == 1
    assert any("3 records were lost" in text for text in log_lines)
    assert trainer.store.steps() == [2, 8, 10, 12], "steps 4 and 6 were not written"


def test_a_small_disk(start, ds_file, orders, tmp_path, mounted):
    """The same on a real one: it is filled to the last byte, and freed again."""
    run = mounted("size=24m")
    trainer = start("run", ds_file(), f"run.dir={run}", "log.every=1", "checkpoint.every=2")

    def fill(_):
        trainer.wait_for_checkpoint()
        with (run / "ballast").open("wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(1 << 12))

    def free(_):
        trainer.wait_for_checkpoint()
        (run / "ballast").unlink()

    orders.update({3: fill, 6: free})
    trainer.fit()
    records = read_jsonl(run / "metrics.jsonl")
    steps = [r["step"] for r in records.records if "loss/total" in r]
    lost = 12 - len(steps)
    assert lost > 0 and records.malformed == []
    assert [r["lost_records"] for r in records.records if "lost_records" in r] == [lost]
    assert 4 not in trainer.store.steps() and trainer.store.steps()[-1] == 12


def test_a_run_folder_that_turns_read_only(start, ds_file, orders, monkeypatch):
    trainer = start("run", ds_file(), "log.every=1", "checkpoint.every=2", "checkpoint.keep=9")

    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def lock(_):
        trainer.wait_for_checkpoint()
        monkeypatch.setattr(JsonlSink, "write", read_only)
        monkeypatch.setattr(type(trainer.store.folder), "mkdir", read_only)

    orders[5] = lock
    trainer.fit()
    assert trainer.progress.finished
    monkeypatch.undo()
    assert trainer.store.steps() == [2, 4]
    assert trainer.store.load().state["progress"]["step"] == 4


PHASES = """[
  {name: signal, steps: 2, trainable: [adapter, encoder, quantizer, signal_decoder],
   warmup_steps: 0, losses: {generation: 0, phoneme: 0}},
  {name: long, steps: 40, trainable: [signal_decoder], warmup_steps: 0,
   early_stopping: {metric: val/reconstruction, patience: 1, min_delta: 1000,
                    restore_best: false},
   losses: {generation: 0, phoneme: 0}},
  {name: phones, steps: 2, trainable: [phoneme_head], warmup_steps: 0, evaluate_every: 1},
  {name: text, steps: 1, trainable: [text_decoder, quantizer], warmup_steps: 0, decode_trials: 2},
  {name: all, steps: 2, warmup_steps: 0, temperature: {start: 4, end: 1, schedule: linear}}
]"""


FIVE = [f"phases={PHASES}", "evaluation.every=2", "log.every=4"]


def test_five_phases_of_which_one_stops_early(start, ds_file, orders):
    trainer = start("run", ds_file(), *FIVE)
    first = {name: weight.clone() for name, weight in trainer.masters.items()}
    trainer.fit()
    assert trainer.progress.finished and trainer.progress.step == 2 + 4 + 2 + 1 + 2
    assert trainer.store.steps() == [2, 6, 8, 9, 11]
    records = [r for r in end_of(trainer)[2] if "loss/total" in r]
    assert [(r["step"], r["phase"]) for r in records] == [
        (2, "signal"), (4, "long"), (6, "long"), (8, "phones"), (9, "text"), (11, "all"),
    ]  # fmt: skip
    validated = [r["step"] for r in end_of(trainer)[2] if "val/loss" in r]
    assert validated == [2, 4, 6, 7, 8, 9, 10, 11], "step 7 is the third phase's own"
    decoded = [r["step"] for r in end_of(trainer)[2] if "val/wer" in r]
    assert decoded == [9], "the fourth phase alone decodes"
    assert records[-1]["codebook/temperature"] == 2.5, "half-way, before its second step"
    assert records[-2]["codebook/temperature"] == pytest.approx(anneal(2.0, 0.5, 44 / 47))
    points = [first, *(weights_at(trainer, step) for step in (2, 6, 8, 9, 11))]
    moved = [
        {name.split(".")[0] for name in first if not torch.equal(before[name], after[name])}
        for before, after in pairwise(points)
    ]
    assert moved == [
        {"adapter", "encoder", "signal_decoder"},
        {"signal_decoder"},
        {"phoneme_head"},
        {"text_decoder"},
        {"adapter", "encoder", "signal_decoder", "phoneme_head", "text_decoder"},
    ]
    orders[5] = ask_to_stop  # heard in the evaluation after which the rule holds
    with pytest.raises(Stopped):
        start("again", ds_file(), *FIVE).fit()
    again = start("again", ds_file(), *FIVE)
    assert (again.progress.step, again.progress.stopping.waited) == (6, 0)
    again.fit()
    assert_same_end(end_of(again), end_of(trainer))


def test_a_misspelt_metric_of_early_stopping_is_refused_before_a_step(start, ds_file):
    with pytest.raises(UserError, match=r"phases\.0\.early_stopping\.metric: .* says val/los; did"):
        start("run", ds_file(), "phases.0.early_stopping={metric: val/los, patience: 1}")
