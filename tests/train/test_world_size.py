"""The global batch of a run that goes on with another number of ranks."""

import json

import pytest

from b2t.errors import UserError
from b2t.train.ds_config import load_ds_config
from b2t.train.world_size import global_batch_of, keep_global_batch


@pytest.fixture
def ds_file(tmp_path):
    content = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2},
    }
    (tmp_path / "ds.json").write_text(json.dumps(content))
    return load_ds_config(tmp_path / "ds.json")


def checkpoint(run, ds_file, world, step=10, **more):
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    state = {"config": {"data": {}}, "deepspeed": ds_file.raw, "world": world, **more}
    (folder / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("world", "micro", "accumulation"), [(1, 8, 2), (2, 8, 1), (4, 4, 1), (8, 2, 1), (16, 1, 1)]
)
def test_the_global_batch_is_kept(ds_file, tmp_path, world, micro, accumulation):
    checkpoint(tmp_path, ds_file, 2)
    kept = keep_global_batch(ds_file, tmp_path, world)
    assert (kept.micro_batch, kept.accumulation) == (micro, accumulation)
    assert kept.global_batch(world) == 16
    raw = kept.engine_config()
    assert raw["train_micro_batch_size_per_gpu"] == micro
    assert raw["gradient_accumulation_steps"] == accumulation
    assert kept.raw == ds_file.raw, "what the user wrote is what a checkpoint records"


def test_a_batch_that_does_not_divide_names_the_numbers(ds_file, tmp_path):
    checkpoint(tmp_path, ds_file, 2)
    with pytest.raises(UserError, match="global batch 16 on 2 ranks, which 3 ranks cannot share"):
        keep_global_batch(ds_file, tmp_path, 3)


def test_micro_batches_of_frames_are_shared_out_whole(ds_file, tmp_path):
    checkpoint(tmp_path, ds_file, 2, config={"data": {"max_frames": 900}})
    assert keep_global_batch(ds_file, tmp_path, 1).accumulation == 2
    with pytest.raises(UserError, match=r"run of 2 micro-batches .* which 4 ranks cannot share"):
        keep_global_batch(ds_file, tmp_path, 4)


def test_back_again_over_a_run_of_one(ds_file, tmp_path):
    checkpoint(tmp_path, ds_file, 1, global_batch=16)
    assert keep_global_batch(ds_file, tmp_path, 1).accumulation == 2
    assert keep_global_batch(ds_file, tmp_path, 2) is ds_file


def test_a_changed_file_is_left_to_be_refused(ds_file, tmp_path):
    checkpoint(tmp_path, ds_file, 2)
    content = {**ds_file.raw, "gradient_accumulation_steps": 4}
    (tmp_path / "other.json").write_text(json.dumps(content))
    other = load_ds_config(tmp_path / "other.json")
    assert keep_global_batch(other, tmp_path, 2) is other


def test_a_new_run_and_a_torn_state_change_nothing(ds_file, tmp_path):
    assert keep_global_batch(ds_file, tmp_path, 4) is ds_file
    checkpoint(tmp_path, ds_file, 2, step=10)
    checkpoint(tmp_path, ds_file, 2, step=20)
    newest = tmp_path / "checkpoints" / "step-00000020" / "state.json"
    newest.write_text("{")
    assert keep_global_batch(ds_file, tmp_path, 4).micro_batch == 4, "the one before is read"


def test_a_checkpoint_of_before_has_no_global_batch(ds_file):
    assert global_batch_of({"deepspeed": ds_file.raw, "world": 3}) == 24
    assert global_batch_of({"deepspeed": ds_file.raw, "world": 3, "global_batch": 12}) == 12
