"""What holds up work that is timed: waits for the device, memory taken from it, compilations.

A settled piece of work does none of them, so that each names why one run took longer than others.
Python's collector stands still meanwhile: it looks at some 300,000 objects of torch and Triton now
and then, for hundreds of milliseconds, whatever is timed.
"""

import contextlib
import gc
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from b2t_kernels import launching

SYNCHRONIZES = "synchronizing CUDA operation"


@dataclass
class Stalls:
    """How often each of them happened."""

    waits: int = 0
    allocations: int = 0
    compilations: int = 0

    def __str__(self) -> str:
        counts = {
            "wait": self.waits,
            "device allocation": self.allocations,
            "compilation": self.compilations,
        }
        return ", ".join(f"{n} {name}{'s' * (n > 1)}" for name, n in counts.items() if n)


def _compiled() -> int:
    return sum(len(each.compiled) for each in launching.known())


def _allocated(cuda: bool) -> int:
    return int(torch.cuda.memory_stats()["num_device_alloc"]) if cuda else 0


@contextlib.contextmanager
def watched(cuda: bool) -> Iterator[Stalls]:
    """Count stalls inside the block, where no garbage is collected."""
    stalls, collects = Stalls(), gc.isenabled()
    gc.collect()
    gc.disable()
    compiled, allocated = _compiled(), _allocated(cuda)
    mode = torch.cuda.get_sync_debug_mode() if cuda else 0
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            if cuda:
                torch.cuda.set_sync_debug_mode("warn")
            yield stalls
    finally:
        if cuda:
            torch.cuda.set_sync_debug_mode(mode)
        if collects:
            gc.enable()
    stalls.waits = sum(SYNCHRONIZES in str(each.message) for each in told)
    stalls.compilations = _compiled() - compiled
    stalls.allocations = _allocated(cuda) - allocated
