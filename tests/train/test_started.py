"""`model.init_from`: a run that starts from another's model."""

import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch

from b2t.config import load_config
from b2t.errors import UserError
from b2t.evaluate.run_folder import load_model, open_run
from b2t.train.admission import prepare_run
from b2t.train.build import build
from b2t.train.started import STARTED_FILE
from b2t.train.trainer import Stopped, Trainer
from tests.train.small_runs import SMALL, zero2

STEPS = [
    "codebook_start.after_steps=1",
    "evaluation.every=100",
    "checkpoint.every=100",
    "log.every=3",
]


@pytest.fixture
def trainer_of(tiny_trials, tmp_path, one_rank):
    """Makes the trainer of a run folder, resuming what is there."""

    def make(name, *overrides, stop=False):
        places = [f"data.path={tiny_trials}", f"run.dir={tmp_path / name}"]
        steps = [f"phases.{number}.steps=2" for number in range(3)]
        config = load_config("demo", [*places, *SMALL, *STEPS, *steps, *overrides])
        asked = SimpleNamespace(requested=stop)
        trainer = Trainer(config, zero2(tmp_path, 4, 1), build(config), one_rank, [], asked)
        prepare_run(trainer, "auto")
        return trainer

    return make


def test_a_run_starts_from_another_and_resumes_without_it(trainer_of, tmp_path, caplog):
    trainer_of("first").fit()
    first, _ = load_model(open_run(tmp_path / "first"), "cpu")
    source = f"model.init_from={tmp_path / 'first'}"

    with caplog.at_level(logging.INFO, "b2t"):
        second = trainer_of("second", source, stop=True)
    assert "quantizer from" in caplog.text and "tensors" in caplog.text
    assert second.model.quantizer.initialized, "no other start of the codebooks"
    theirs = first.state_dict()
    for name, value in second.model.state_dict().items():
        assert torch.equal(value, theirs[name]), name
    with pytest.raises(Stopped):
        second.fit()
    record = json.loads((tmp_path / "second" / STARTED_FILE).read_text())
    assert "text_decoder" in record["trained"]

    shutil.rmtree(tmp_path / "first")
    again = trainer_of("second", source)
    assert again.progress.step == 1
    assert not torch.equal(again.masters["encoder.embed.weight"], theirs["encoder.embed.weight"])
    again.config.phases[1:] = []
    again.fit()
    best, _ = load_model(open_run(tmp_path / "second"), "cpu")
    assert "text_decoder" in best.config.trained, "trained by the first run, if not by this one"


@pytest.mark.parametrize("source", ["nowhere", "."])
def test_a_source_that_is_no_model_is_refused(trainer_of, tmp_path, source):
    with pytest.raises(UserError, match="run folder"):
        trainer_of("run", f"model.init_from={tmp_path / source}")
