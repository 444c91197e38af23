"""How a rank joins: which tools DeepSpeed finds to compile its operators."""

import os
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from b2t.train import ranks


def test_the_ninja_of_this_environment_comes_first(monkeypatch, tmp_path):
    other = tmp_path / "ninja"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("ninja") == str(other)
    ranks._prefer_own_tools()
    own = str(Path(sys.executable).parent)
    assert os.environ["PATH"].split(os.pathsep) == [own, str(tmp_path)]
    ranks._prefer_own_tools()
    assert os.environ["PATH"].count(own) == 1, "once is enough"


def test_joining_prefers_it(one_rank):
    assert shutil.which("ninja") == str(Path(sys.executable).parent / "ninja")


WAITER = """
import sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from b2t.train.ranks import timed_out, waiting_in

rank, store = int(sys.argv[1]), dist.FileStore(sys.argv[2], 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=2))
dist.barrier()


def add_up_gradients():
    dist.all_reduce(torch.zeros(1))


if rank == 1:
    time.sleep(30)
try:
    add_up_gradients()
except RuntimeError as error:
    assert timed_out(error)
    print(waiting_in(error), flush=True)
"""


def test_the_collective_that_waited_is_named(tmp_path, repository):
    """As of collectives that DeepSpeed calls: torch's message says neither which nor where."""
    ranks_ = [
        subprocess.Popen(
            [sys.executable, "-c", WAITER, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            cwd=repository,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said, _ = ranks_[0].communicate(timeout=60)
    finally:
        ranks_[1].kill()
        ranks_[1].communicate()
    assert said == "all_reduce, called by add_up_gradients in <string>\n"


def test_groups_that_others_make_wait_as_long(one_rank, monkeypatch):
    """DeepSpeed makes its own without a timeout."""
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(c10d, name, getattr(c10d, name))
    ranks.wait_at_most(timedelta(seconds=7))
    group = dist.new_group(backend="gloo")
    assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=7)
