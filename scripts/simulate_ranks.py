"""Simulate many ranks in one process: the quantizer's part in them, its correctness and cost.

    python scripts/simulate_ranks.py --ranks 1 4 16 64

Each rank is a thread with torch's threaded process group (`torch.testing`), whose collectives move
real data between threads. Ranks share one set of trials by the batch plan of training, start the
codebooks by k-means++ on all their latents, and take updates with revival. For each number of ranks
the table says whether all ranks hold the same codebooks, whether those are the codebooks of one
rank (the greatest difference), the processor time of a rank, and the bytes that one rank receives
from collectives in the start, in an update, and in an update that revives.
"""

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.testing._internal.distributed import multi_threaded_pg

from b2t.data.batches import BatchPlan
from b2t.quantize import ResidualVQ
from b2t.quantize.frame_hash import frame_ids

TRIALS, FRAMES, WIDTH, UPDATES = 256, 16, 8, 8
_RECEIVED = threading.local()


def main(argv: list[str] | None = None) -> int:
    """Simulate and print; 1 where ranks differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    alone = on_ranks(1)[0]
    found = [compare(world, on_ranks(world), alone) for world in options.ranks]
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return 0 if all(one["same"] and one["shared"] for one in found) else 1


def on_ranks(world: int) -> list[dict[str, Any]]:
    """Run `one_rank` on so many threads that reach each other; return what each found."""
    found: list[dict[str, Any]] = [{} for _ in range(world)]
    failures: list[BaseException] = []
    store = dist.HashStore()

    def run(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
            found[rank] = one_rank(rank, world)
            dist.destroy_process_group()
        except BaseException as error:
            failures.append(error)
            multi_threaded_pg.ProcessLocalGroup.exception_handle(error)

    with threaded_groups(), counted():
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return found


@contextmanager
def threaded_groups() -> Iterator[None]:
    """Give each thread a process group of its own."""
    multi_threaded_pg._install_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    try:
        yield
    finally:
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        multi_threaded_pg._uninstall_threaded_pg()
        multi_threaded_pg.ProcessLocalGroup.reset()


@contextmanager
def counted() -> Iterator[None]:
    """Count the bytes that a thread receives from collectives."""
    names = ("all_reduce", "all_gather", "broadcast")
    before = {name: getattr(dist, name) for name in names}

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(result: Any, *args: Any, **kwargs: Any) -> Any:
            tensors = result if isinstance(result, list) else [result]
            _RECEIVED.bytes += sum(t.numel() * t.element_size() for t in tensors)
            return function(result, *args, **kwargs)

        return call

    for name, function in before.items():
        setattr(dist, name, counting(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def one_rank(rank: int, world: int) -> dict[str, Any]:
    """Share the trials, start the codebooks, update them; return state, trials, bytes, seconds."""
    plan = BatchPlan(np.full(TRIALS, FRAMES, dtype=np.int64), TRIALS // 2, split="train")
    quantizer = ResidualVQ(
        WIDTH, codebook_size=64, num_quantizers=2, seed=3, revival_every=UPDATES,
        revival_threshold=0.5, decay=0.8,
    )  # fmt: skip
    _RECEIVED.bytes, begun = 0, time.thread_time()
    received: dict[str, int] = {}
    rows = np.arange(TRIALS)[rank::world]
    quantizer.initialize([latents(rows)], progress=False, frames_per_code=1e9)
    received["start"] = taken()
    trials = []
    for update in range(UPDATES):
        batch = plan.micro_batches(
            0, 0, 0, update % len(plan), rank=rank, world=world,
            micro_batch=TRIALS // 2 // world, accumulation=1,
        )[0]  # fmt: skip
        trials.append(batch.tolist())
        x, mask, ids = latents(batch)
        quantizer.set_progress(0.0)
        quantizer.update(quantizer(x + 0.1 * update, mask, ids=ids).stats)
        received["revival" if update == UPDATES - 1 else "update"] = taken()
    return {
        "state": quantizer.state_dict(), "checksum": int(quantizer.checksum()), "trials": trials,
        "received": received, "seconds": time.thread_time() - begun,
    }  # fmt: skip


def taken() -> int:
    """Bytes received since the last call."""
    found, _RECEIVED.bytes = _RECEIVED.bytes, 0
    return found


def latents(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents [B, P, D] of trials, a mask and what the frames are; a function of the trials."""
    found = [
        torch.randn(FRAMES, WIDTH, generator=torch.Generator().manual_seed(int(row)))
        for row in rows
    ]
    mask = torch.ones(len(rows), FRAMES, dtype=torch.bool)
    return torch.stack(found), mask, frame_ids(torch.from_numpy(rows.astype(np.int64)), FRAMES)


def compare(world: int, ranks: list[dict[str, Any]], alone: dict[str, Any]) -> dict[str, Any]:
    """Hold ranks against each other and against one rank."""
    shared = all(
        sorted(row for rank in ranks for row in rank["trials"][update]) == sorted(batch)
        for update, batch in enumerate(alone["trials"])
    )
    state, single = ranks[0]["state"], alone["state"]
    off = max(float((state[n].double() - single[n].double()).abs().max()) for n in state)
    return {
        "ranks": world, "shared": shared, "off": off,
        "same": len({rank["checksum"] for rank in ranks}) == 1,
        "seconds": max(rank["seconds"] for rank in ranks), **ranks[0]["received"],
    }  # fmt: skip


def show(found: list[dict[str, Any]]) -> None:
    """Print a row for each number of ranks."""
    table = Table()
    for name in ("ranks", "trials shared", "same state", "off one rank", "CPU s of a rank",
                 "start, KB", "update, KB", "revival, KB"):  # fmt: skip
        table.add_column(name, justify="right")
    for one in found:
        table.add_row(
            str(one["ranks"]), "yes" if one["shared"] else "NO", "yes" if one["same"] else "NO",
            f"{one['off']:.1e}", f"{one['seconds']:.3f}",
            *(f"{one[key] / 1e3:.1f}" for key in ("start", "update", "revival")),
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
