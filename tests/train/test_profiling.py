"""Traces hold the steps that were asked for, and ranks that part leave their collectives."""

import gzip
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from b2t.config import ProfileConfig
from b2t.train.profiling import Profiler, record_collectives, write_collectives
from tests.train.small_runs import small_trainer, zero2

STEPS = ["phases.0.steps=4", "phases.1.steps=1", "phases.2.steps=1", "phases.0.warmup_steps=1"]


@pytest.fixture(scope="module")
def traced(tiny_trials, tmp_path_factory, one_rank):
    """A run of which two steps after the first are traced, and the same without."""
    runs = {}
    for name in ("with", "without"):
        folder = tmp_path_factory.mktemp("profiled") / name
        ds_file = zero2(folder.parent, 4, 1)
        trainer = small_trainer(tiny_trials, folder, one_rank, ds_file, *STEPS)
        if name == "with":
            trainer.callbacks.append(Profiler(ProfileConfig(steps=2, after=1), folder, 0))
        trainer.fit()
        runs[name] = trainer, folder
    return runs


def test_the_trace_holds_the_steps_that_were_asked_for(traced):
    _, folder = traced["with"]
    with gzip.open(folder / "profile" / "trace-rank0.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = {str(event.get("name")) for event in events}
    steps = {name for name in names if re.fullmatch(r"ProfilerStep#\d+", name)}
    assert steps == {"ProfilerStep#1", "ProfilerStep#2"}
    assert any("backward" in name.lower() for name in names) and "aten::addmm" in names
    assert "aten::" in (folder / "profile" / "operators-rank0.txt").read_text()


def test_training_is_the_same_under_the_profiler(traced):
    left, right = (runs[0].masters for runs in (traced["with"], traced["without"]))
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


ALONE = """
import os, sys
from pathlib import Path
import torch, torch.distributed as dist
from b2t.train.profiling import record_collectives, write_collectives
folder = Path(sys.argv[1])
record_collectives(folder)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
dist.all_reduce(torch.ones(3)); dist.broadcast(torch.ones(5, 2), 0)
print(write_collectives(folder, 0))
"""


def test_the_last_collectives_are_written_in_order(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCH_FR")}
    command = [sys.executable, "-c", ALONE, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    entries = json.loads((tmp_path / "collectives-rank0.json").read_text())["entries"]
    assert [entry["profiling_name"] for entry in entries] == ["gloo:all_reduce", "gloo:broadcast"]
    assert entries[1]["input_sizes"] == [[5, 2]]


def test_nothing_is_written_where_nothing_was_remembered(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_FR_BUFFER_SIZE", raising=False)
    assert write_collectives(tmp_path, 0) is None and list(tmp_path.iterdir()) == []


def test_what_the_environment_sets_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "7")
    for name in ("TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    record_collectives(tmp_path / "profile")
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "7"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"].startswith(str(tmp_path))
    assert write_collectives(tmp_path / "absent" / "folder", 3) is not None
