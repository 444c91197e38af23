"""How a rank joins: what DeepSpeed compiles, and with which tools; the port; who waits for whom."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from b2t.errors import UserError
from b2t.train import ranks
from b2t.train.step import COUNTED, OptimizerStep


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


def test_operators_have_a_place_without_a_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ranks._operator_cache().parent == tmp_path / ".cache" / "torch_extensions"
    temporary = Path(tempfile.gettempdir())
    monkeypatch.setenv("HOME", "/proc/self/no-home")
    assert ranks._operator_cache().parent == temporary

    def no_entry():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_entry)
    assert ranks._operator_cache().parent == temporary


def test_joining_compiles_nothing(one_rank):
    """It would take a compiler, and 69 MB of shared memory for sums that no training asks for."""
    assert deepspeed.comm.comm.cdb.shm_comm_op is None


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


def said_by_the_first(program, store, repository):
    """What the first of two ranks prints, while the other goes on until it is killed."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(store)],
            stdout=subprocess.PIPE,
            cwd=repository,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        return started[0].communicate(timeout=60)[0]
    finally:
        started[1].kill()
        started[1].communicate()


def test_the_collective_that_waited_is_named(tmp_path, repository):
    """As of collectives that DeepSpeed calls: torch's message says neither which nor where."""
    said = said_by_the_first(WAITER, tmp_path / "store", repository)
    assert said == "all_reduce, called by add_up_gradients in <string>\n"


def test_groups_that_others_make_wait_as_long(one_rank, monkeypatch):
    """DeepSpeed makes its own without a timeout."""
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(c10d, name, getattr(c10d, name))
    ranks.wait_at_most(timedelta(seconds=7))
    group = dist.new_group(backend="gloo")
    assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=7)


def test_nccls_watchdog_has_more_patience_than_the_ranks(monkeypatch):
    """Else it would end a process that was about to say for whom it waits."""
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(c10d, name, timedelta(minutes=10))
    ranks.wait_at_most(timedelta(seconds=7))
    assert c10d.default_pg_nccl_timeout >= 2 * c10d.default_pg_timeout == timedelta(seconds=14)


@pytest.mark.parametrize(("gpus", "limit"), [(0, 7), (1, 14)])
def test_the_group_of_gpus_waits_longer_than_that_of_processes(gpus, limit, monkeypatch):
    class JoinedError(Exception):
        pass

    def join(**settings):
        asked.update(settings)
        raise JoinedError

    asked = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1" if name == "WORLD_SIZE" else "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(ranks, "_share_cores", lambda: None)
    monkeypatch.setattr(ranks, "wait_at_most", lambda timeout: None)
    monkeypatch.setattr(deepspeed, "init_distributed", join)
    with pytest.raises(JoinedError):
        ranks.join(7.0)
    assert asked["timeout"] == timedelta(seconds=limit)


def test_a_port_that_another_training_has_is_said(monkeypatch):
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    said = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**said, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(ranks, "_share_cores", lambda: None)
    monkeypatch.setattr(ranks, "wait_at_most", lambda timeout: None)
    store = partial(dist.TCPStore, "127.0.0.1", port, is_master=True)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: store())
    with taken, pytest.raises(UserError, match=rf"port {port} .*--master_port"):
        ranks.join(7.0)


MEETING = """
import sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from b2t.train.ranks import Ranks, WaitedTooLong

rank, store = int(sys.argv[1]), dist.FileStore(sys.argv[2], 2)
limits = timedelta(seconds=20), timedelta(seconds=1)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limits[0])
control = dist.new_group(backend="gloo", timeout=limits[1])
here = Ranks(rank, 2, rank, torch.device("cuda"), control, 1.0, place="in step 7 of phase joint")
dist.barrier()
if rank == 1:
    time.sleep(60)
began = time.monotonic()
try:
    here.meet("end of the backward pass")
except WaitedTooLong as error:
    print(time.monotonic() - began < 10, error, flush=True)
"""


def test_a_rank_whose_neighbour_hangs_says_so_before_its_gpu_waits(tmp_path, repository):
    said = said_by_the_first(MEETING, tmp_path / "store", repository)
    assert said.startswith("True rank 0 on ") and "in step 7 of phase joint" in said
    assert "(end of the backward pass)" in said


def test_processes_meet_before_the_step_of_the_last_micro_batch():
    """There DeepSpeed reads from the GPU what has come from all others."""
    calls = []
    output = SimpleNamespace(loss=torch.zeros(()), stats=None)
    engine = SimpleNamespace(
        dtype=torch.float32,
        backward=lambda loss: calls.append("backward"),
        step=lambda: calls.append("step") or True,
    )
    self = SimpleNamespace(
        ranks=SimpleNamespace(
            world=2, device=torch.device("cpu"), meet=lambda _: calls.append("meet")
        ),
        engine=engine,
        ds_file=SimpleNamespace(accumulation=2),
        phase=SimpleNamespace(losses=SimpleNamespace(model_dump=dict), text_from="signals"),
        window=SimpleNamespace(add=lambda *_: None),
        set_clocks=lambda: None,
        _usage_of_step=lambda _: None,
        _forward=lambda number, batch, **_: output,
        _begin_update=lambda stats: stats,
    )
    batch = SimpleNamespace(to=lambda *_: None)
    OptimizerStep.take(self, [batch, batch], dict.fromkeys(COUNTED, 1.0))
    assert calls == ["backward", "step", "backward", "meet", "step"]
