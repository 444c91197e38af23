"""One rank that meets NaN, overflow, full disks and requests to stop, and what becomes of it."""

import errno
import hashlib
import os
import re
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from b2t.config import load_config
from b2t.errors import UserError
from b2t.quantize.schedules import anneal
from b2t.records import JsonlSink, read_jsonl
from b2t.train import checkpoint as checkpoints
from b2t.train.build import build
from b2t.train.callbacks import Callback, MetricsFile
from b2t.train.monitoring import Watch
from b2t.train.trainer import Stopped, Trainer, TrainingFailed
from tests.train.small_runs import SMALL, zero2

SETTINGS = """
    codebook_start.after_steps=1 evaluation.every=100 phases.0.steps=8 phases.1.steps=2
    phases.2.steps=2 checkpoint.every=100 checkpoint.keep=1 log.every=3
    stability.max_consecutive_skips=2 optim.weight_decay=0.1
""".split()  # noqa: SIM905
END = 12

FP16 = {
    "enabled": True,
    "loss_scale": 0,
    "initial_scale_power": 4,
    "loss_scale_window": 3,
    "hysteresis": 1,
    "min_loss_scale": 1,
}


@pytest.fixture
def ds_file(tmp_path):
    """Makes DeepSpeed files: accumulation of 4, fp16 where asked for."""
    return partial(zero2, tmp_path, 2, 4)


@pytest.fixture
def start(tiny_trials, tmp_path, one_rank, monkeypatch):
    """Starts or continues a run in the folder of this name, up to where it is told to stop."""
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed refuses fp16 on CPUs; its engine and loss scaler work there all the same.
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)

    def trainer_of(name, ds_file, *overrides):
        places = [f"data.path={tiny_trials}", f"run.dir={tmp_path / name}"]
        config = load_config("demo", [*places, *SMALL, *SETTINGS, *overrides])
        run = config.run.dir
        stop = SimpleNamespace(requested=False)
        trainer = Trainer(config, ds_file, build(config), one_rank, [MetricsFile(run)], stop)
        run.mkdir(exist_ok=True)
        found = trainer.store.load()
        if found is not None:
            trainer.restore(found)
        return trainer

    return trainer_of


@pytest.fixture
def orders(monkeypatch):
    """What is done to a run after an applied step, by step."""
    todo = {}
    after = Trainer._after_applied

    def after_applied(self, *arguments):
        after(self, *arguments)
        if self.progress.step in todo:
            todo[self.progress.step](self)

    monkeypatch.setattr(Trainer, "_after_applied", after_applied)
    return todo


def ask_to_stop(trainer):
    trainer.stop.requested = True


def end_of(trainer):
    """Masters, buffers, and records without times of a run that is over."""
    lines = read_jsonl(trainer.config.run.dir / "metrics.jsonl").records
    timed = re.compile("time|throughput|memory")
    records = [{k: v for k, v in line.items() if not timed.match(k)} for line in lines]
    return trainer.masters, dict(trainer.model.named_buffers()), records


def assert_same_end(left, right):
    for mine, other in zip(left[:2], right[:2], strict=True):
        assert mine.keys() == other.keys()
        assert [name for name in mine if not torch.equal(mine[name], other[name])] == []
    assert left[2] == right[2]


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


def fail(trainer):
    """Train until the run gives up; return why, and the alerts of its metrics file."""
    with pytest.raises(TrainingFailed) as caught:
        trainer.fit()
    assert trainer.outcome.startswith("failed: ")
    lines = read_jsonl(trainer.config.run.dir / "metrics.jsonl").records
    return str(caught.value), [line["alert"] for line in lines if "alert" in line]


def test_the_component_and_the_trial_are_named(start, ds_file, orders):
    """The second trial of each micro-batch becomes NaN in the encoder, from step 4 on."""
    trainer = start("run", ds_file())
    seen = []
    trainer.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    named = []

    def begin(_):
        def poison(module, args, output):
            factor = torch.ones(len(output), 1, 1)
            factor[1] = float("nan")
            named.append(seen[-1].rows[1])
            return output * factor

        trainer.model.encoder.register_forward_hook(poison)

    orders[3] = begin
    text, alerts = fail(trainer)
    assert "what encoder gives back is not finite" in text
    assert "2 optimizer steps in a row" in text
    listed = text.split("trials: ")[1].split(" — ")[0]
    assert set(re.findall(r"day\d/0/\d+", listed)) == set(named[-4:])
    assert [alert["severity"] for alert in alerts] == ["critical"]
    assert trainer.store.steps() == [3], "the state before the first skipped step"
    again = start("run", ds_file())
    assert again.progress.step == 3
    again.fit()
    assert again.progress.finished


def spoil_weights(module):
    weight = next(p for p in module.parameters() if p.ndim > 1)
    weight.register_hook(lambda gradient: gradient * float("nan"))


def spoil_inputs(module):
    """What comes back into a component is NaN, and so is all that it hands on upstream."""

    def spoil(_, args, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("nan"))

    module.register_forward_hook(spoil)


@pytest.mark.parametrize(
    ("component", "spoil", "precision"),
    [
        ("encoder", spoil_weights, {}),
        ("signal_decoder", spoil_inputs, {}),
        ("encoder", spoil_inputs, {"bf16": {"enabled": True}}),
    ],
)
def test_gradients_that_are_not_finite_are_placed(
    start, ds_file, orders, component, spoil, precision
):
    trainer = start("run", ds_file(**precision))
    orders[2] = lambda _: spoil(getattr(trainer.model, component))
    text, _ = fail(trainer)
    assert f"gradients not finite, first those of {component}" in text
    assert text.count("day") == 8, "the step's trials"
    assert trainer.store.steps() == [2]
    kept = trainer.store.load().weights
    assert all(bool(torch.isfinite(weight).all()) for weight in kept.values())


def test_weights_that_are_not_finite_are_placed(start, ds_file, orders):
    trainer = start("run", ds_file())

    def begin(_):
        with torch.no_grad():
            next(trainer.model.signal_decoder.parameters()).fill_(float("inf"))

    orders[2] = begin
    text, _ = fail(trainer)
    assert "the weights of signal_decoder are not finite" in text


def test_overflow_at_the_smallest_loss_scale_ends_with_a_diagnosis(start, ds_file, orders):
    """DeepSpeed itself raises there, without a checkpoint."""
    trainer = start("run", ds_file(fp16={**FP16, "initial_scale_power": 1}), "log.every=1",
                    "stability.max_consecutive_skips=4")  # fmt: skip

    def begin(_):
        trainer.model.phoneme_head.register_forward_hook(lambda m, a, output: output * float("inf"))

    orders[2] = begin
    text, alerts = fail(trainer)
    assert "4 optimizer steps in a row were skipped at loss scale 1" in text
    assert "what phoneme_head gives back is not finite" in text
    assert len(alerts) == 1
    assert trainer.store.steps() == [2]
    assert trainer.store.load().state["engine"]["scaler"]["cur_scale"] == 1


def test_an_overflow_at_the_smallest_loss_scale_that_passes_is_survived(start, ds_file, orders):
    trainer = start("run", ds_file(fp16={**FP16, "initial_scale_power": 0}))
    hooks = []

    def begin(_):
        overflow = trainer.model.phoneme_head.register_forward_hook(
            lambda m, a, output: hooks[0].remove() or output * float("inf")
        )
        hooks.append(overflow)

    orders[2] = begin
    trainer.fit()
    assert trainer.progress.finished and trainer.progress.skipped == 1
    records = [r for r in end_of(trainer)[2] if "loss/total" in r]
    assert not any("non_finite" in record for record in records), "the step left no trace"


def test_fp16_goes_on_in_bf16(start, ds_file, orders):
    """What the diagnosis of an overflow proposes."""
    orders[4] = ask_to_stop
    with pytest.raises(Stopped):
        start("run", ds_file(fp16=FP16)).fit()
    again = start("run", ds_file(bf16={"enabled": True}))
    assert again.progress.step == 5
    again.fit()
    assert again.progress.finished and again.progress.skipped == 0


def test_codebooks_that_cannot_start(start, ds_file):
    """Every latent is NaN: the rows and the component are named, and a checkpoint is left."""
    trainer = start("run", ds_file(), "codebook_start.after_steps=3")
    trainer.model.encoder.register_forward_hook(
        lambda module, args, output: output * float("nan") if not module.training else output
    )
    text, alerts = fail(trainer)
    assert "the codebooks cannot start: NaN or infinity in all" in text
    assert [alert["rule"] for alert in alerts] == ["codebook-start"]
    assert trainer.store.steps() == [3]


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


def test_latents_that_are_left_out_are_counted(start, ds_file, orders):
    """An encoder that gives NaN for a trial without a gradient that tells: a frozen one may."""
    trainer = start("run", ds_file(), "log.every=2")

    def begin(_):
        def blank(module, args, output):
            output = output.clone()
            output[0, 2] = float("nan")
            return output

        trainer.model.encoder.register_forward_hook(blank)

    orders[3] = begin
    trainer.fit()
    counted = [r["codebook/nonfinite_frames"] for r in end_of(trainer)[2] if "loss/total" in r]
    assert counted[0] == 0
    assert counted[1] == 4, "a frame of each of 4 micro-batches of the second of two steps"
    assert counted[2] == 2 * 4


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
    first = dict(trainer.masters)
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
