"""CPU ranks add up without shared memory of DeepSpeed's and without a compiler to build it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.ports import free_port

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm on this system"),
]

RANK = """
import os, signal, sys
import torch
from b2t.train.ranks import join
ranks = join()
import deepspeed.comm
value = torch.arange(1000, dtype=torch.float32)
deepspeed.comm.all_reduce(value)
deepspeed.comm.inference_all_reduce(value)  # the only one that shared memory is for
print(float(value.sum()), flush=True)
ranks.barrier()
os.kill(os.getpid(), signal.SIGKILL)
"""


def of_port(port):
    return sorted(path.name for path in Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))


def test_two_ranks_without_a_compiler_leave_no_shared_memory_when_killed(repository, tmp_path):
    port = free_port()
    environment = {
        **os.environ, "DS_ACCELERATOR": "cpu", "WORLD_SIZE": "2", "LOCAL_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "CXX": "no-such-compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path),
    }  # fmt: skip
    try:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", RANK],
                cwd=repository,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        sums = [process.communicate(timeout=300)[0] for process in processes]
        assert [float(text) for text in sums] == [1998000.0, 1998000.0]
        assert of_port(port) == []
    finally:
        for name in of_port(port):
            Path("/dev/shm", name).unlink()
