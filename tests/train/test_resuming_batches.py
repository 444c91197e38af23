"""Runs on a stream, or with a budget of frames, that go on in the middle of an epoch."""

import shutil

import pytest
import torch

from tests.data.test_streamed import description, shards
from tests.train.small_runs import small_trainer, zero2

SETTINGS = [
    *("codebook_start.after_steps=1", "evaluation.every=100", "phases.0.steps=10"),
    *("phases.1.steps=1", "phases.2.steps=1", "checkpoint.every=4", "checkpoint.keep=9"),
    "stability.dry_batch=false",
    "phases.0.augment={noise_std: {from: 0, to: 1}}",
]


@pytest.mark.parametrize(
    ("streamed", "overrides"),
    [
        (True, ["data.max_frames=90"]),
        (False, ["data.sessions=stratified", "data.max_frames=120"]),
    ],
)
def test_a_resumed_run_gives_the_same_weights(tmp_path, tiny_trials, one_rank, streamed, overrides):
    data = description(shards(tmp_path / "w"), streaming=True) if streamed else tiny_trials
    ds_file = zero2(tmp_path, 4, 2)

    def run(name):
        return small_trainer(data, tmp_path / name, one_rank, ds_file, *SETTINGS, *overrides)

    whole = run("whole")
    whole.fit()
    at = "checkpoints/step-00000004"
    shutil.copytree(tmp_path / "whole" / at, tmp_path / "resumed" / at)
    resumed = run("resumed")
    assert resumed.progress.step == 4
    assert bool(resumed.progress.streams) == streamed
    resumed.fit()
    assert whole.masters.keys() == resumed.masters.keys()
    for name, value in whole.masters.items():
        assert torch.equal(value, resumed.masters[name]), name
