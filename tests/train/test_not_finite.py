"""One rank that meets NaN and overflow, and what becomes of it."""

import re

import pytest
import torch

from b2t.records import read_jsonl
from b2t.train.trainer import Stopped, TrainingFailed
from tests.train.interrupted import FP16, ask_to_stop, end_of


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
            latents, mask = output
            factor = torch.ones(len(latents), 1, 1)
            factor[1] = float("nan")
            named.append(seen[-1].rows[1])
            return latents * factor, mask

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
        given = output[0] if isinstance(output, tuple) else output
        if given.requires_grad:
            given.register_hook(lambda gradient: gradient * float("nan"))

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
        lambda module, args, output: (
            output if module.training else (output[0] * float("nan"), output[1])
        )
    )
    text, alerts = fail(trainer)
    assert "the codebooks cannot start: NaN or infinity in all" in text
    assert [alert["rule"] for alert in alerts] == ["codebook-start"]
    assert trainer.store.steps() == [3]


def test_latents_that_are_left_out_are_counted(start, ds_file, orders):
    """An encoder that gives NaN for a trial without a gradient that tells: a frozen one may."""
    trainer = start("run", ds_file(), "log.every=2")

    def begin(_):
        def blank(module, args, output):
            latents, mask = output
            latents = latents.clone()
            latents[0, 2] = float("nan")
            return latents, mask

        trainer.model.encoder.register_forward_hook(blank)

    orders[3] = begin
    trainer.fit()
    counted = [r["codebook/nonfinite_frames"] for r in end_of(trainer)[2] if "loss/total" in r]
    assert counted[0] == 0
    assert counted[1] == 4, "a frame of each of 4 micro-batches of the second of two steps"
    assert counted[2] == 2 * 4
