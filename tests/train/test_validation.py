"""What a validation during training looks at, and what it makes of it."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from datasets import load_from_disk

from b2t.config import load_config
from b2t.data.augment import Augment
from b2t.evaluate.results import Evaluation
from b2t.train.build import build
from b2t.train.metric_names import active_losses
from b2t.train.validation import scores, validate, validation_batches
from tests.train.small_runs import SMALL


def test_fewer_trials_come_from_all_sessions(tiny_trials):
    """Two sessions one after the other, of which a limit took the first alone."""
    validation = load_from_disk(str(tiny_trials))["train"].sort("session")
    run = (
        load_config("demo", ["evaluation.batch_size=4"]),
        SimpleNamespace(
            validation=validation,
            tokenizer=None,
            info=SimpleNamespace(sessions=["day0", "day1"]),
            augment=Augment(enabled=False),
        ),
        SimpleNamespace(rank=0, world=1),
    )
    rows = [row for batch in validation_batches(*run, 6) for row in batch.rows]
    assert sorted(row.split("/")[0] for row in rows) == ["day0"] * 3 + ["day1"] * 3
    assert len({row for batch in validation_batches(*run, None) for row in batch.rows}) == 36


def test_no_snr_is_told_of_a_signal_decoder_that_nothing_has_trained():
    result = Evaluation("val", per=0.2, snr_db=-0.1)
    assert scores(result, ["phoneme_head"]) == {"val/per": 0.2}
    assert scores(result, ["phoneme_head", "signal_decoder"]) == {
        "val/per": 0.2,
        "val/snr_db": -0.1,
    }


def validated(data, ranks, *overrides):
    """Metrics of an untrained model, and the trials that it was validated on."""
    config = load_config("demo", [f"data.path={data}", *SMALL, "optim.weight_ema=null", *overrides])
    materials = build(config)
    model = materials.model
    batches = validation_batches(config, materials, ranks, config.evaluation.max_trials)
    losses = active_losses(model, config.phases[0])
    return validate(model, batches, losses, torch.float32, ranks), materials.validation


def test_no_row_with_enough_frames_is_no_perfect_phoneme_loss(tiny_trials, one_rank):
    """A loss over nothing is not 0, which would be the best model there is."""
    patches = ["model.encoder.patch_size=60", "model.encoder.patch_stride=60"]
    metrics, _ = validated(tiny_trials, one_rank, *patches)
    assert "val/phoneme" not in metrics
    assert metrics["val/phoneme/left_out_fraction"] == 1.0


def test_the_share_left_out_is_that_of_rows_with_fewer_frames_than_paths_need(
    tiny_trials, one_rank
):
    patches = ["model.encoder.patch_size=24", "model.encoder.patch_stride=24"]
    metrics, trials = validated(tiny_trials, one_rank, *patches)
    short, rows = 0, 0
    for trial in trials:
        said = trial["phonemes"]
        rows += len(said) > 0
        repeats = sum(a == b for a, b in pairwise(said))
        short += len(said) > 0 and -(-len(trial["signal"]) // 24) < len(said) + repeats
    assert 0 < short < rows, "some fit and some do not"
    assert metrics["val/phoneme/left_out_fraction"] == pytest.approx(short / rows)
    assert metrics["val/phoneme"] > 0
