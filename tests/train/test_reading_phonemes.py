"""Phases of a text decoder that reads phonemes: spelling without signals, then what is heard."""

from types import SimpleNamespace

import pytest
import torch

from b2t.config import load_config
from b2t.errors import UserError
from b2t.records import read_jsonl
from b2t.train.build import build
from b2t.train.callbacks import MetricsFile
from b2t.train.settings import check_losses
from b2t.train.trainer import Stopped, Trainer
from tests.train.small_runs import SMALL, zero2

OTHERS = ("reconstruction", "commitment", "diversity", "perplexity", "phoneme")
SETTINGS = [
    "model.text_decoder.memory=phonemes",
    "model.text_decoder.memory_depth=1",
    "codebook_start.after_steps=1",
    "evaluation.every=100",
    "checkpoint.every=100",
    "log.every=1",
    *(f"phases.{phase}.steps={steps}" for phase, steps in enumerate((2, 3, 2))),
    *(f"phases.{phase}.trainable=[text_decoder]" for phase in (1, 2)),
    *(f"phases.{phase}.losses.{name}=0" for phase in (1, 2) for name in OTHERS),
    "phases.1.text_from=labels",
]


@pytest.fixture
def trainer_of(tiny_trials, tmp_path, one_rank):
    def make(name, *overrides):
        places = [f"data.path={tiny_trials}", f"run.dir={tmp_path / name}"]
        config = load_config("demo", [*places, *SMALL, *SETTINGS, *overrides])
        materials = build(config)
        stop = SimpleNamespace(requested=False)
        hooks = [MetricsFile(config.run.dir)]
        trainer = Trainer(config, zero2(tmp_path, 4, 1), materials, one_rank, hooks, stop)
        config.run.dir.mkdir(exist_ok=True)
        found = trainer.store.load()
        if found is not None:
            trainer.restore(found)
        return trainer

    return make


def test_spelling_encodes_no_training_signal_and_resumes_exactly(trainer_of, monkeypatch):
    encoded = []
    whole = trainer_of("whole")
    latents = type(whole.model).latents

    def counted(model, *arguments, **options):
        if model.training:
            encoded.append(whole.progress.step)
        return latents(model, *arguments, **options)

    monkeypatch.setattr(type(whole.model), "latents", counted)
    whole.fit()
    assert {2, 3, 4}.isdisjoint(encoded) and {0, 1, 5, 6} <= {*encoded}
    records = read_jsonl(whole.config.run.dir / "metrics.jsonl").records
    losses = [r["loss/generation"] for r in records if "loss/generation" in r]
    assert len(losses) == 5 and len({*losses}) == 5
    assert any("val/generation" in r for r in records), "validation reads what is heard"

    for step in (3, 6):
        again = trainer_of("again")
        after = again._after_applied

        def stopping(*arguments, trainer=again, step=step, after=after):
            after(*arguments)
            trainer.stop.requested = trainer.progress.step == step

        again._after_applied = stopping
        with pytest.raises(Stopped):
            again.fit()
        assert again.progress.step == step + 1
    again = trainer_of("again")
    again.fit()
    assert [n for n in whole.masters if not torch.equal(whole.masters[n], again.masters[n])] == []


def test_labels_have_no_latents(trainer_of):
    trainer = trainer_of("run", "model.text_decoder.memory=latents")
    with pytest.raises(UserError, match=r"phases.1.text_from=labels.*memory=phonemes"):
        check_losses(trainer.config, trainer.model)


def test_texts_alone_are_learnt_from_and_resume_exactly(trainer_of, tmp_path):
    """A phase of text files: rows of their own, no signal, and a resume that refuses another."""
    more = tmp_path / "more.txt"
    more.write_text("\n".join(f"the {word} ran" for word in ("dog", "cat", "man", "boy", "girl")))
    settings = (
        "phases.1.text_from=texts", "phases.1.phrase_words=2",
        f"data.texts=[{more}]", "model.text_decoder.kind=ctc",
        "model.text_decoder.memory=posteriors", "model.text_decoder.tokenizer=bpe",
        "model.text_decoder.bpe_vocab_size=300",
    )  # fmt: skip
    whole = trainer_of("whole", *settings)
    assert len(whole.materials.sentences) == 36 + 5
    seen = []

    def note(model, arguments):
        if model.training:
            seen.append({row.partition("/")[0] for row in arguments[0].rows})

    whole.model.register_forward_pre_hook(note)
    whole.fit()
    assert seen[2:5] == [{"texts"}] * 3 and not any("texts" in rows for rows in seen[:2] + seen[5:])

    again = trainer_of("again", *settings)
    after = again._after_applied

    def stopping(*arguments):
        after(*arguments)
        again.stop.requested = again.progress.step == 3

    again._after_applied = stopping
    with pytest.raises(Stopped):
        again.fit()
    again = trainer_of("again", *settings)
    again.fit()
    assert [n for n in whole.masters if not torch.equal(whole.masters[n], again.masters[n])] == []
    fingerprint = again.materials.fingerprint
    more.write_text("the dog ran\n")
    assert trainer_of("other", *settings).materials.fingerprint != fingerprint


def test_texts_alone_teach_nothing_else(trainer_of):
    trainer = trainer_of("run", "phases.1.text_from=texts", "phases.1.losses.phoneme=0.5")
    with pytest.raises(UserError, match=r"phases.1.text_from=texts.*no signal for phoneme"):
        check_losses(trainer.config, trainer.model)
