"""Forks the ranks of a run from one process that has imported everything."""

import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

HARMLESS = {"jemalloc_bg_thd"}
"""Threads that know what a fork is: jemalloc stops and starts its own around one."""


class RankFailed(RuntimeError):  # noqa: N818  # reads as what happened
    """A rank left with another status than 0; the message has the end of its log."""


def import_once(names: list[str]) -> None:
    """Import what ranks import, so that they share it; what cannot be imported is left to them."""
    for name in names:
        if name not in sys.modules and not name.startswith("__"):
            with suppress(Exception):
                importlib.import_module(name)


def require_one_thread() -> None:
    """Refuse to fork beside threads, whose locks would stay held in the ranks."""
    tasks = Path("/proc/self/task").glob("*/comm")
    others = sorted(
        task.read_text("ascii").strip() for task in tasks if task.parent.name != str(os.getpid())
    )
    unknown = [name for name in others if name not in HARMLESS]
    if unknown:
        raise RuntimeError(f"cannot fork ranks from a process with threads: {', '.join(unknown)}")


def run_ranks(
    world: int, folder: Path, arguments: list[str], seconds: float
) -> list[dict[str, Any]]:
    """Train on so many ranks; return what each has observed.

    Args:
        world: number of ranks.
        folder: where observations and logs go.
        arguments: of `train_ds.py`.
        seconds: to end the ranks after.

    Raises:
        RankFailed: a rank failed, or did not end in time; all are ended then.
    """
    require_one_thread()
    gc.freeze()  # a collection in a rank would touch, and so copy, all that it shares
    folder.mkdir(parents=True)
    port = free_port()
    running: dict[int, int] = {}
    until = time.monotonic() + seconds
    try:
        for rank in range(world):
            begun = time.monotonic()
            process = os.fork()
            if not process:
                _be_rank(rank, world, port, folder, arguments, begun)
            running[process] = rank
        while running:
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                if time.monotonic() > until:
                    raise RankFailed(
                        f"{len(running)} of {world} ranks did not end in {seconds:g} s: {folder}"
                    )
                time.sleep(0.02)
            elif process in running:
                rank = running.pop(process)
                if status:
                    log = (folder / f"rank-{rank}.log").read_text("utf-8")
                    code = os.waitstatus_to_exitcode(status)
                    raise RankFailed(
                        f"rank {rank} of {world} left with status {code}:\n{log[-3000:]}"
                    )
    finally:
        for process in running:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    return [json.loads((folder / f"rank-{rank}.json").read_text("utf-8")) for rank in range(world)]


def _be_rank(
    rank: int, world: int, port: int, folder: Path, arguments: list[str], begun: float
) -> NoReturn:
    """Train as one rank in the process that was just forked, and end it."""
    status = 1
    try:
        from many_ranks.observed import become, observe

        log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        become(rank, world, port)
        observe(folder, begun)
        from b2t.train.main import main

        status = main(arguments)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
