import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from b2t import manifest
from b2t.errors import UserError
from b2t.manifest import sha256
from b2t.train import checkpoint as module
from b2t.train.checkpoint import Checkpoint, CheckpointStore, find_problem

FILES = ("weights.safetensors", "moments.safetensors", "state.json", "manifest.json")


def make(seed: int, size: int = 64) -> Checkpoint:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "a": torch.randn(size, 3, generator=generator),
        "b": torch.arange(5),
        "half": torch.randn(4, generator=generator).half(),
        "transposed": torch.randn(3, 4, generator=generator).T,
        "scalar": torch.tensor(float("nan")),
    }
    moments = {"a/exp_avg": torch.randn(size, 3, generator=generator)}
    return Checkpoint(weights, moments, {"seed": seed, "nested": {"x": [1, 2.5, None]}})


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype
        and torch.equal(left[k].contiguous().view(-1).view(torch.uint8), _bytes(right[k]))
        for k in left
    )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.fixture
def errors(monkeypatch):
    """Messages that the store logs."""
    seen: list[str] = []

    class Recorder(logging.Handler):
        def emit(self, record):
            seen.append(record.getMessage())

    handler = Recorder()
    log = logging.getLogger(module.__name__)
    log.addHandler(handler)
    yield seen
    log.removeHandler(handler)


def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
    store = CheckpointStore(tmp_path / "new" / "checkpoints")
    assert store.load() is None, "no checkpoint is no error"
    path = store.save(7, make(7))
    assert path is not None and sorted(p.name for p in path.iterdir()) == sorted(FILES)
    back, saved = store.load(), make(7)
    assert same(back.weights, saved.weights) and same(back.moments, saved.moments)
    assert back.state == saved.state
    assert (store.folder / "latest").read_text() == "step-00000007\n"
    assert find_problem(path) is None


def test_empty_moments_are_a_whole_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, Checkpoint(make(1).weights, {}, {"engine": None}))
    assert store.load().moments == {}


def test_only_the_newest_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep=3)
    for step in (5, 10, 100, 20, 15):
        store.save(step, make(step))
    assert store.steps() == [15, 20, 100]
    assert store.load().state["seed"] == 100


def test_milestones_are_kept_besides(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in range(1, 8):
        store.save(step, make(step), milestone=step in (2, 5))
    assert store.steps() == [2, 5, 6, 7]
    assert find_problem(tmp_path / "step-00000002") is None
    store.save(2, make(9))
    store.save(8, make(8))
    assert store.steps() == [2, 5, 7, 8], "written anew, as by a run that stops where it began"


def test_the_same_step_again_replaces(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(5, make(1))
    store.save(5, make(2))
    assert store.load().state["seed"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000005"]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 0x10
    file.write_bytes(content)


def swap_for_another(file: Path) -> None:
    """A file of the same size that belongs to another moment."""
    content = file.read_bytes()
    file.write_bytes(bytes(reversed(content)))


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, swap_for_another, Path.unlink])
@pytest.mark.parametrize("name", FILES[:3])
def test_a_damaged_file_is_named_and_the_one_before_used(tmp_path, errors, name, harm):
    store = CheckpointStore(tmp_path)
    store.save(1, make(1))
    path = store.save(2, make(2))
    harm(path / name)
    assert name in find_problem(path)
    assert store.load().state["seed"] == 1
    assert any("step-00000002" in m and name in m and "before" in m for m in errors)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"weights.safetensors": 3}',
        '{"weights.safetensors": {"bytes": 1}}',
        b"\xff\xfe\x00",
    ],
)
def test_a_damaged_manifest_is_named(tmp_path, errors, content):
    store = CheckpointStore(tmp_path)
    store.save(1, make(1))
    path = store.save(2, make(2))
    manifest = path / "manifest.json"
    manifest.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert "manifest.json" in find_problem(path)
    assert store.load().state["seed"] == 1
    assert any("step-00000002" in m and "manifest.json" in m for m in errors)


def test_a_flipped_bit_anywhere_in_the_manifest_is_noticed(tmp_path):
    """In a number, a checksum, a name or between them: nothing in it is idle."""
    path = CheckpointStore(tmp_path).save(1, make(1))
    manifest = path / "manifest.json"
    whole = manifest.read_bytes()
    unnoticed = []
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 0x04
        manifest.write_bytes(content)
        if find_problem(path) is None:
            unnoticed.append((place, bytes(content[place - 4 : place + 4])))
    assert unnoticed == []
    manifest.write_bytes(whole)
    assert find_problem(path) is None


def test_foreign_entries_are_left_alone(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(3, make(3))
    for name in ("step-old", "step-", "step-00000004.bak", "best", "notes", "step-٣"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000009").write_text("a file")
    assert store.steps() == [3]
    assert store.load().state["seed"] == 3
    store.save(4, make(4))
    assert (tmp_path / "step-old").is_dir() and (tmp_path / "notes").is_dir()


def test_a_foreign_folder_in_a_checkpoints_place_is_passed_over(tmp_path, errors):
    store = CheckpointStore(tmp_path)
    store.save(3, make(3))
    foreign = tmp_path / "step-00000008"
    foreign.mkdir()
    (foreign / "mp_rank_00_model_states.pt").write_bytes(b"\x80\x02}q\x00.")
    assert store.load().state["seed"] == 3
    assert any("step-00000008" in message for message in errors)


def test_none_whole_is_an_error_not_a_new_start(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        truncate(store.save(step, make(step)) / "weights.safetensors")
    with pytest.raises(UserError, match="none of the 2 checkpoints is whole"):
        store.load()


def test_a_consistent_file_that_is_no_checkpoint_is_a_clear_error(tmp_path):
    """Size and checksum agree, the content is not safetensors."""
    store = CheckpointStore(tmp_path)
    path = store.save(1, make(1))
    file = path / "weights.safetensors"
    file.write_bytes(b"not tensors")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest[file.name] = {"bytes": 11, "sha256": sha256(file)}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="cannot be read"):
        store.load()


@pytest.mark.parametrize("stage", ["weights", "moments", "manifest", "rename"])
def test_an_error_while_writing_leaves_the_older_one(tmp_path, errors, monkeypatch, stage):
    store = CheckpointStore(tmp_path)
    store.save(1, make(1))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    real = module.write_safetensors
    if stage == "rename":
        monkeypatch.setattr(Path, "rename", full)
    elif stage == "manifest":
        monkeypatch.setattr(manifest, "write_entries", full)
    else:

        def write(path, tensors):
            if path.name.startswith(stage):
                full()
            return real(path, tensors)

        monkeypatch.setattr(module, "write_safetensors", write)
    assert store.save(2, make(2)) is None
    monkeypatch.undo()
    assert store.steps() == [1] and store.load().state["seed"] == 1
    assert any("step 2" in m and "No space left" in m and "newest" in m for m in errors)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert store.save(3, make(3)) is not None, "the next one is written once there is room"


def test_a_full_disk_leaves_the_older_one(tmp_path, errors):
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        store = CheckpointStore(disk / "checkpoints")
        small, large = make(1), make(2, size=100_000)
        assert store.save(1, small) is not None
        assert store.save(2, large) is None
        assert store.steps() == [1] and same(store.load().weights, small.weights)
        assert any("step 2" in message and str(store.folder) in message for message in errors)
        assert store.save(3, small) is not None
    finally:
        subprocess.run(["umount", str(disk)], check=True)


WRITER = """
import sys, torch
from b2t.train.checkpoint import Checkpoint, CheckpointStore
store = CheckpointStore(sys.argv[1], keep=2)
step = max(store.steps(), default=0)
while True:
    step += 1
    weights = {"w": torch.full((400_000,), float(step))}
    store.save(step, Checkpoint(weights, {"m": weights["w"]}, {"step": step}))
    print(step, flush=True)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_a_whole_checkpoint(tmp_path, repository):
    """SIGKILL at moments spread over the write: the newest whole one is at most one write old."""
    folder = tmp_path / "checkpoints"
    for attempt in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder)],
            stdout=subprocess.PIPE,
            cwd=repository,
            text=True,
        )
        written = int(process.stdout.readline())
        time.sleep(0.011 * attempt)
        process.kill()
        written = max([written, *map(int, process.stdout.read().split())])
        process.wait()
        process.stdout.close()
        store = CheckpointStore(folder)
        store.recover()
        back = store.load()
        step = back.state["step"]
        assert step >= written
        assert torch.equal(back.weights["w"], torch.full((400_000,), float(step)))
    store.save(10**6, make(0))
    left = sorted(p.name for p in folder.iterdir() if p.name.startswith("."))
    assert left == [], "half-written folders are cleared"


def test_killed_between_the_two_renames_of_a_replacement(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    path = store.save(5, make(1))
    path.rename(tmp_path / f".replaced-{path.name}")
    shutil.copytree(tmp_path / f".replaced-{path.name}", tmp_path / f".writing-{path.name}")
    store.recover()
    assert store.load().state["seed"] == 1
