"""Memory that batches lie in, used again once nobody holds it."""

import weakref

import numpy as np
from numpy.typing import DTypeLike

_LARGE = 1 << 20
"""Bytes from which memory is kept; the C library keeps less by itself."""


class Buffers:
    """Large arrays of which nothing is left are handed out again.

    Memory of megabytes goes back to the system when it is freed and comes back as zeros, page by
    page: for a batch that costs nearly as much as filling it.

    Args:
        kept: free arrays at most; the largest stay.
    """

    def __init__(self, kept: int = 4) -> None:
        self._kept = kept
        self._free: dict[int, np.ndarray] = {}

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        """Return an array as `numpy.empty` does.

        It may be handed out again once the object returned here is gone; a tensor made of it by
        `torch.from_numpy` holds it, views that NumPy makes of it do not.
        """
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if size < _LARGE:
            return np.empty(shape, dtype)
        memory = self._taken(size)
        if memory is None:
            memory = np.empty(size + size // 8, np.uint8)  # the next may be a little longer
        whole = memory[:size].view(dtype).reshape(shape)
        weakref.finalize(whole, self._give_back, memory).atexit = False
        return whole

    # Others may give back at any moment: single operations on the dictionary are whole by
    # themselves, and there is no lock that a process could be forked with.

    def _taken(self, size: int) -> np.ndarray | None:
        fitting = [memory for memory in list(self._free.values()) if memory.size >= size]
        for memory in sorted(fitting, key=lambda memory: memory.size):
            if self._free.pop(id(memory), None) is not None:
                return memory
        return None

    def _give_back(self, memory: np.ndarray) -> None:
        self._free[id(memory)] = memory
        free = list(self._free.values())
        if len(free) > self._kept:
            self._free.pop(id(min(free, key=lambda memory: memory.size)), None)
