"""Phases that stop early: whose weights are handed on, and which clocks go on as planned."""

import pytest
import torch

from b2t.quantize.schedules import anneal
from b2t.records import read_jsonl
from b2t.train.trainer import Stopped, Trainer
from tests.train.small_runs import small_trainer, zero2

PHASES = """[
  {{name: first, steps: 40, warmup_steps: 0, evaluate_every: 2,
   trainable: [adapter, encoder, quantizer, signal_decoder],
   losses: {{generation: 0, phoneme: 0}},
   early_stopping: {{metric: val/reconstruction, patience: 2, min_delta: 1000,
                     restore_best: {back}}}}},
  {{name: second, steps: 2, warmup_steps: 0, trainable: [signal_decoder]}}
]"""
SETTINGS = """
    codebook_start.after_steps=1 evaluation.every=100 checkpoint.every=100 checkpoint.keep=1
    log.every=1 optim.weight_ema=0.9
""".split()  # noqa: SIM905


@pytest.fixture
def start(tiny_trials, tmp_path, one_rank):
    def trainer_of(name, back="true", *more):
        phases = PHASES.format(back=back).replace("\n", " ")
        file = zero2(tmp_path, 2, 2)
        overrides = [f"phases={phases}", *SETTINGS, *more]
        return small_trainer(tiny_trials, tmp_path / name, one_rank, file, *overrides)

    return trainer_of


def records(trainer, name):
    lines = read_jsonl(trainer.config.run.dir / "metrics.jsonl").records
    return [(line["step"], line[name]) for line in lines if name in line]


def differing(one, other):
    assert one.keys() == other.keys()
    return {name.split(".")[0] for name in one if not torch.equal(one[name], other[name])}


def test_the_best_weights_are_handed_on(start):
    """The first of three evaluations is the best by a rule that no later one can satisfy."""
    trainer = start("run")
    trainer.fit()
    assert trainer.progress.step == 6 + 2 and trainer.store.steps() == [2, 6, 8]
    best, handed = trainer.store.read(2), trainer.store.read(6)
    clocks = {"quantizer.codebooks.progress", "quantizer.codebooks.temperature"}
    without = [{k: v for k, v in c.weights.items() if k not in clocks} for c in (best, handed)]
    assert differing(*without) == set(), "masters and codebooks"
    averages = [{k: v for k, v in c.moments.items() if "ema:" in k} for c in (best, handed)]
    assert averages[0] and differing(*averages) == set()
    validated = dict(enumerate(records(trainer, "val/reconstruction")))
    assert [step for step, _ in validated.values()] == [2, 4, 6, 6, 8]
    assert validated[3][1] == validated[0][1] != validated[2][1], "what is handed on is validated"


def test_or_the_last_ones(start):
    trainer = start("run", "false")
    trainer.fit()
    assert trainer.store.steps() == [6, 8]
    assert [step for step, _ in records(trainer, "val/reconstruction")] == [2, 4, 6, 8]


@pytest.mark.parametrize("step", [2, 3, 5])
def test_a_resume_comes_to_the_same_weights(start, monkeypatch, step):
    """Stopped after the next step, of which every other one is validated."""
    whole = start("whole")
    whole.fit()
    after = Trainer._after_applied

    def stopped(self, *arguments):
        after(self, *arguments)
        self.stop.requested = self.progress.step == step

    monkeypatch.setattr(Trainer, "_after_applied", stopped)
    with pytest.raises(Stopped):
        start("again").fit()
    monkeypatch.undo()
    again = start("again")
    assert again.progress.step == step + 1
    again.fit()
    for name in ("weights", "moments"):
        ends = [getattr(trainer.store.read(8), name) for trainer in (whole, again)]
        assert differing(*ends) == set()
    for name in ("val/reconstruction", "loss/total"):
        assert records(again, name) == records(whole, name)


def test_the_checkpoint_of_the_best_is_gone(start, monkeypatch):
    trainer, said = start("run"), []
    monkeypatch.setattr(trainer.store, "read", lambda step: None)
    monkeypatch.setattr("b2t.train.trainer.log.error", lambda text, *a: said.append(text % a))
    trainer.fit()
    assert trainer.progress.finished
    assert any("the checkpoint of step 2 is gone" in text for text in said)


def test_an_early_stop_does_not_bend_what_anneals(start, monkeypatch):
    trainer = start("run")
    seen = []
    set_progress = type(trainer.model.quantizer).set_progress
    monkeypatch.setattr(
        type(trainer.model.quantizer),
        "set_progress",
        lambda self, value: seen.append(value) or set_progress(self, value),
    )
    trainer.fit()
    assert seen[:6] == pytest.approx([step / 42 for step in range(6)])
    assert seen[-2:] == pytest.approx([40 / 42, 41 / 42]), "as planned, not 6 / 42 and 7 / 42"
    course = trainer.model.quantizer.options
    last = anneal(course.temperature, course.temperature_end, 41 / 42, course.temperature_schedule)
    assert records(trainer, "codebook/temperature")[-1][1] == pytest.approx(last, rel=1e-6)
