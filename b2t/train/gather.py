"""Float32 state that lies flat in parts on all ranks, brought whole to rank 0 alone."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK = 1 << 23
"""Elements that each rank sends at once: rank 0's device holds so many of every rank."""


class Part(NamedTuple):
    """A run of elements of one parameter in a flat tensor of one rank."""

    name: str
    """Of the parameter."""
    flat: int
    """Number of the flat tensor."""
    offset: int
    """Where in the flat tensor it begins."""
    start: int
    """Where in the flattened parameter it begins."""
    numel: int


class Gatherer:
    """Gathers flat tensors to host memory of rank 0, which it keeps and uses again.

    What `gather` returned is overwritten by the next `gather` of the same kind.

    Args:
        parts: of this rank, in any order.
        shapes: of the whole parameters by name.
        device: of the process group's tensors.
    """

    def __init__(
        self, parts: Sequence[Part], shapes: Mapping[str, torch.Size], device: torch.device
    ) -> None:
        self._shapes = shapes
        self._device = device
        self._world = dist.get_world_size()
        self._is_main = dist.get_rank() == 0
        everyone: list[Any] = [None] * self._world
        dist.all_gather_object(everyone, list(parts))
        self._parts: list[list[Part]] = everyone
        self._kept: dict[str, dict[str, Tensor]] = {}

    def gather(self, flats: Sequence[Tensor], kind: str) -> dict[str, Tensor]:
        """Return whole tensors on the CPU by name, on rank 0; nothing elsewhere. Collective.

        Args:
            flats: this rank's flat float32 tensors, as its parts number them; those of one number
                are equally long on all ranks.
            kind: names the memory that receives them.
        """
        whole = self._memory(kind) if self._is_main else {}
        for number, flat in enumerate(flats):
            for begin in range(0, len(flat), _CHUNK):
                chunk = flat.detach()[begin : begin + _CHUNK]
                for rank, received in enumerate(self._collect(chunk)):
                    self._place(received, rank, number, begin, whole)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return whole

    def _memory(self, kind: str) -> dict[str, Tensor]:
        if kind not in self._kept:
            pinned = self._device.type == "cuda"
            self._kept[kind] = {
                name: torch.empty(shape, dtype=torch.float32, pin_memory=pinned)
                for name, shape in self._shapes.items()
            }
        return self._kept[kind]

    def _collect(self, chunk: Tensor) -> list[Tensor]:
        """Return every rank's chunk on rank 0, none elsewhere."""
        if self._world == 1:
            return [chunk]
        chunk = chunk.to(self._device).contiguous()
        received = [torch.empty_like(chunk) for _ in range(self._world)] if self._is_main else None
        dist.gather(chunk, received, dst=0)
        return received or []

    def _place(
        self, chunk: Tensor, rank: int, flat: int, begin: int, whole: Mapping[str, Tensor]
    ) -> None:
        """Copy what of each parameter lies in a chunk, which begins at `begin` of a flat tensor."""
        for part in self._parts[rank]:
            low = max(part.offset, begin)
            high = min(part.offset + part.numel, begin + len(chunk))
            if part.flat == flat and low < high:
                place = part.start + low - part.offset
                target = whole[part.name].view(-1)[place : place + high - low]
                target.copy_(chunk[low - begin : high - begin], non_blocking=True)
