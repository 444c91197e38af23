"""Sums and gathers over ranks that do nothing where there is no process group.

Whether there is one is asked at each call, never stored: a quantizer may be built before
`torch.distributed` is initialized and used after.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def world_size(group: ProcessGroup | None = None) -> int:
    """Ranks of ``group``; 1 without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)


def rank(group: ProcessGroup | None = None) -> int:
    """Rank of this process in ``group``; 0 without a process group."""
    return dist.get_rank(group) if world_size(group) > 1 else 0


def all_reduce_sum(tensors: list[Tensor], group: ProcessGroup | None = None) -> list[Tensor]:
    """Sums of ``tensors`` over ranks, one collective per dtype; the arguments are left alone."""
    if world_size(group) == 1:
        return tensors
    result: list[Tensor | None] = [None] * len(tensors)
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        places = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        flat = torch.cat([tensors[i].detach().reshape(-1) for i in places])
        dist.all_reduce(flat, group=group)
        parts = flat.split([tensors[i].numel() for i in places])
        for i, part in zip(places, parts, strict=True):
            result[i] = part.reshape(tensors[i].shape)
    return [t for t in result if t is not None]


def message_sizes(tensors: list[Tensor]) -> list[int]:
    """Bytes of each collective that `all_reduce_sum` takes for ``tensors`` on several ranks."""
    dtypes = dict.fromkeys(t.dtype for t in tensors)
    return [sum(t.numel() * t.element_size() for t in tensors if t.dtype == d) for d in dtypes]


def all_gather_rows(tensor: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Rows of every rank's ``tensor`` [n, …], ranks in order; n may differ between ranks."""
    ranks = world_size(group)
    if ranks == 1:
        return tensor
    sizes = torch.zeros(ranks, dtype=torch.int64, device=tensor.device)
    sizes[rank(group)] = tensor.shape[0]
    dist.all_reduce(sizes, group=group)
    lengths = sizes.tolist()
    padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    gathered = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([rows[:n] for rows, n in zip(gathered, lengths, strict=True)])


def broadcast_from_first(tensors: list[Tensor], group: ProcessGroup | None = None) -> None:
    """Overwrite ``tensors`` with those of the group's first rank, in place."""
    if world_size(group) == 1:
        return
    source = dist.get_global_rank(group, 0) if group is not None else 0
    for tensor in tensors:
        dist.broadcast(tensor, src=source, group=group)
