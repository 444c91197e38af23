"""Ranks: joining the process group, small agreements between ranks on the CPU."""

import hashlib
import os
import re
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from b2t.counted import counted
from b2t.errors import UserError
from b2t.log import quiet_libraries
from b2t.train.build_lock import lock_builds
from b2t.train.interfaces import choose_for_gloo
from b2t.train.launched import check_complete

_COMMUNICATION = re.compile(r"(torch[/\\]distributed|deepspeed[/\\]comm)[/\\][^/\\]+$")
"""Files whose functions are called on the way to a collective."""


_PATIENCE = 2
"""How many times as long as ranks themselves NCCL's watchdog waits, so that it comes second."""

_STOP = "stop"
"""Key of the board."""


class WaitedTooLong(Exception):  # noqa: N818  # reads as what happened
    """A rank waited for the others until the timeout; the message says where and for what."""


def waiting_in(error: BaseException) -> str:
    """Name the collective that an error of torch.distributed comes from, and who called it."""
    frames = traceback.extract_tb(error.__traceback__)
    within = [bool(_COMMUNICATION.search(frame.filename)) for frame in frames]
    if not any(within):
        return "a collective"
    end = len(within) - within[::-1].index(True)
    begin = end
    while begin > 1 and within[begin - 1]:
        begin -= 1
    names = [frame.name for frame in frames[begin:end]]
    named = [name for name in names if not name.startswith("_") and "wrap" not in name]
    caller = frames[begin - 1]
    return f"{(named or names)[-1]}, called by {caller.name} in {Path(caller.filename).name}"


def timed_out(error: BaseException) -> bool:
    """Whether an error of torch.distributed says that a collective took too long."""
    return any(words in str(error) for words in ("Timed out", "timed out", "Timeout"))


@dataclass
class Ranks:
    """One process among all of the run.

    Attributes:
        rank: number of this process, from 0.
        world: number of processes.
        local_rank: number of this process on its host.
        device: where the model lives.
        control: gloo group for agreements that must not wait for the device.
        timeout_s: how long to wait for the others.
        place: what the run is doing, for the message when that was not enough.
        board: where ranks leave word for each other without meeting; None of a rank alone.
    """

    rank: int
    world: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    timeout_s: float = 1800.0
    place: str = "starting"
    board: dist.Store | None = None

    @property
    def is_main(self) -> bool:
        """True on the one process that writes and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            with self._waiting("barrier"):
                dist.barrier(group=self.control)

    def meet(self, what: str) -> None:
        """Wait for the other processes where the GPU is about to wait for their GPUs.

        A process that waits for its GPU cannot say for whom: NCCL's watchdog ends it, by SIGABRT
        and with a message of its own, when a collective has taken `_PATIENCE` times as long as
        ranks wait here. Nothing on CPU ranks, whose collectives raise.
        """
        if self.world > 1 and self.device.type == "cuda":
            with self._waiting(what):
                dist.barrier(group=self.control)

    def post_stop(self) -> None:
        """Leave word that this rank was asked to stop. Not collective."""
        if self.board is not None:
            with suppress(RuntimeError):  # of a board that is gone: they meet, and hear it, later
                self.board.set(_STOP, "1")

    def stop_posted(self) -> bool:
        """Whether a rank has left word that it was asked to stop. Not collective."""
        try:
            return self.board is not None and self.board.check([_STOP])
        except RuntimeError:
            return False

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add lists of numbers over ranks, in float64 on the CPU."""
        tensor = torch.tensor(list(values), dtype=torch.float64)
        if self.world > 1:
            with self._waiting(f"sum of {len(tensor)} numbers"):
                dist.all_reduce(tensor, group=self.control)
        return tensor.tolist()

    def any(self, flag: bool) -> bool:
        """True where any rank says so."""
        return self.sum([float(flag)])[0] > 0

    def from_main(self, value: Any) -> Any:
        """Return rank 0's value on all ranks."""
        if self.world == 1:
            return value
        box = [value]
        with self._waiting("answer of rank 0"):
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in order, on all ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with self._waiting("answers of all ranks"):
            dist.all_gather_object(values, value, group=self.control)
        return values

    @contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not timed_out(error):
                raise
            raise WaitedTooLong(self.explain_wait(what)) from error

    def explain_wait(self, what: str) -> str:
        """Say what this rank waited for, where, and what to do."""
        return (
            f"rank {self.rank} on {socket.gethostname()}: {self.place}, waited "
            f"{self.timeout_s:g} s for the other ranks ({what}): one of them hangs, is that much "
            "slower, or cannot be reached. Look at the last lines of the others; the same command "
            "goes on from the newest checkpoint. stability.collective_timeout_s sets the wait"
        )


def join(timeout_s: float = 1800.0) -> Ranks:
    """Join the process group that the launcher describes in the environment.

    `deepspeed`, `torchrun` and `accelerate launch` set RANK, WORLD_SIZE and LOCAL_RANK; a plain
    `python` becomes a world of one.

    Raises:
        UserError: an environment that lacks where to meet, more ranks than GPUs on this host, or a
            port that another process has.
    """
    quiet_libraries()
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=_port()
        )
    check_complete()
    cache = os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(_operator_cache()))
    lock_builds(Path(cache))
    _prefer_own_tools()
    choose_for_gloo()
    import deepspeed

    quiet_libraries()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    timeout = timedelta(seconds=timeout_s)
    if torch.cuda.is_available():
        torch.cuda.set_device(_own_gpu(local_rank, torch.cuda.device_count()))
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
        _share_cores()
    wait_at_most(timeout)
    limit = _PATIENCE * timeout if device.type == "cuda" else timeout
    _leave_out_shared_memory()
    try:
        deepspeed.init_distributed(auto_mpi_discovery=False, timeout=limit, verbose=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(_port_taken()) from error
        raise
    control = dist.new_group(backend="gloo", timeout=timeout) if dist.get_world_size() > 1 else None
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), local_rank, device, control, timeout_s)
    if ranks.world > 1:
        ranks.board = _open_board(ranks, timeout)
    return ranks


def _port_taken() -> str:
    port = os.environ["MASTER_PORT"]
    return (
        f"port {port} of this host, where ranks would meet, belongs to another process: perhaps to "
        "a training that still runs. Give this one a port of its own: deepspeed or torchrun "
        "--master_port 29501 …, accelerate launch --main_process_port 29501 …"
    )


def wait_at_most(timeout: timedelta) -> None:
    """Make ``timeout`` that of all process groups made from now on, DeepSpeed's among them.

    DeepSpeed makes its groups without one: its reductions would wait half an hour for a lost rank.
    Those of NCCL wait longer: see `Ranks.meet`.
    """
    from torch.distributed import distributed_c10d as c10d

    for name, limit in {
        "default_pg_timeout": timeout,
        "default_pg_nccl_timeout": _PATIENCE * timeout,
    }.items():
        if getattr(c10d, name, None) is not None:  # NCCL's is None in builds without NCCL
            setattr(c10d, name, limit)


def _own_gpu(local_rank: int, gpus: int) -> int:
    if local_rank >= gpus:
        raise UserError(
            f"rank {os.environ['RANK']} is number {local_rank} of {socket.gethostname()}, counted "
            f"from 0, and sees {counted(gpus, 'GPU')}: start one rank per GPU, and "
            "let all ranks of a host see all its GPUs (Slurm: --gpus-per-node, no --gpus-per-task)"
        )
    return local_rank


def _open_board(ranks: Ranks, timeout: timedelta) -> dist.Store:
    """Open the store through which the ranks have joined, with keys of this start alone.

    A launcher that starts ranks again keeps its store.
    """
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*place, is_master=False, wait_for_workers=False, timeout=timeout)
    return dist.PrefixStore(f"b2t-{ranks.from_main(os.urandom(8).hex())}", store)


def leave() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _leave_out_shared_memory() -> None:
    """Keep DeepSpeed from building its sums through shared memory for CPU ranks.

    Only `deepspeed.comm.inference_all_reduce` would use them, which no training calls. They take a
    C++ compiler, a minute of the first start, and 69 MB of /dev/shm a rank, which outlast the run.
    """
    import deepspeed.ops

    # DeepSpeed keeps this dictionary, so that it may be edited.
    getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False


def _share_cores() -> None:
    """Give each CPU rank of this host its share of the cores, unless the user chose."""
    if "B2T_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["B2T_THREADS"]))
        return
    torch.set_num_threads(max(1, cores() // ranks_on_host()))


def ranks_on_host() -> int:
    """Ranks that the launcher started on this host."""
    said = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 0)))
    return said or int(os.environ["WORLD_SIZE"])


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _operator_cache() -> Path:
    """Folder for the operators that DeepSpeed compiles, one per Python environment.

    Environments that share one recompile each other's operators at every start, for a minute.
    They lie in the home folder, or, where none can be written, in that of temporary files.
    """
    environment = hashlib.blake2b(sys.prefix.encode(), digest_size=6).hexdigest()
    name = f"b2t-{environment}"
    with suppress(OSError, RuntimeError):  # a user may have no home at all
        place = Path.home() / ".cache" / "torch_extensions" / name
        place.mkdir(parents=True, exist_ok=True)
        if os.access(place, os.W_OK):
            return place
    return Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"


def _prefer_own_tools() -> None:
    """Let DeepSpeed find this environment's ninja first, activated or not.

    Two versions of ninja do not trust each other's log: they would compile the same operators in
    turn, a minute or more at each start.
    """
    own = str(Path(sys.executable).parent)
    found = os.environ.get("PATH", os.defpath)
    if found.split(os.pathsep)[0] != own:
        os.environ["PATH"] = f"{own}{os.pathsep}{found}"


def _port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
