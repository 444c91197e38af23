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


_LOW_BITS = 12
_MOST_RANKS = 4096
"""Ranks whose low parts, each below 4,096, add up without rounding in float32."""


class PendingSum:
    """Sums of tensors over ranks on their way: one collective for all that are float32 or int64.

    Whole numbers, counts from 0 to below 2³⁶ in the sum, travel as two float32 each, of their low
    and high bits, which add up exactly. The tensors are left alone.
    """

    def __init__(self, tensors: list[Tensor], group: ProcessGroup | None = None) -> None:
        self._tensors = tensors
        self._group = group
        self._flats: list[tuple[list[int], Tensor]] = []
        ranks = world_size(group)
        self._work: list[dist.Work] = []
        if ranks == 1:
            return
        if ranks > _MOST_RANKS:
            raise ValueError(f"{ranks} ranks, at most {_MOST_RANKS} add up counts exactly")
        for places in _messages(tensors):
            mixed = len({tensors[i].dtype for i in places}) > 1
            parts = [_carried(tensors[i], mixed).reshape(-1) for i in places]
            flat = torch.cat(parts)
            self._flats.append((places, flat))
            self._work.append(dist.all_reduce(flat, group=group, async_op=True))

    def wait(self) -> list[Tensor]:
        """Return the sums, in the order of the tensors."""
        result = list(self._tensors)
        for work, (places, flat) in zip(self._work, self._flats, strict=True):
            work.wait()
            for i, part in zip(places, flat.split(self._lengths(places, flat)), strict=True):
                result[i] = _restored(part, self._tensors[i])
        return result

    def _lengths(self, places: list[int], flat: Tensor) -> list[int]:
        return [
            self._tensors[i].numel() * (2 if self._tensors[i].dtype != flat.dtype else 1)
            for i in places
        ]


def _messages(tensors: list[Tensor]) -> list[list[int]]:
    """Places of the tensors that travel together: float32 and int64 in one, others by dtype."""
    packed = {torch.float32, torch.int64}
    dtypes = {t.dtype for t in tensors}
    groups = [dtypes & packed, *({dtype} for dtype in sorted(dtypes - packed, key=str))]
    return [[i for i, t in enumerate(tensors) if t.dtype in group] for group in groups if group]


def _carried(tensor: Tensor, mixed: bool) -> Tensor:
    if not mixed or tensor.dtype != torch.int64:
        return tensor.detach()
    low = tensor & ((1 << _LOW_BITS) - 1)
    return torch.stack([low, tensor >> _LOW_BITS]).float()


def _restored(part: Tensor, like: Tensor) -> Tensor:
    if part.dtype == like.dtype:
        return part.view(like.shape)
    low, high = part.view(2, *like.shape).long().unbind(0)
    return low + (high << _LOW_BITS)


class PendingHalf:
    """The sum of one float32 tensor over ranks on its way, in bfloat16 on the wire.

    Each rank rounds what it has, adds up its part of what came from all in float32, rounds once
    more and hands that out: half the bytes of a ring in float32, the same bits on every rank, and
    an error of each element of at most 2⁻⁷ (1 + 2⁻⁹) Σ_ranks |x| whatever the number of ranks (a
    sum along a ring would round at each of them). One rank alone rounds nothing.
    """

    def __init__(self, tensor: Tensor, group: ProcessGroup | None = None) -> None:
        self._tensor, self._group = tensor, group
        self._ranks = world_size(group)
        if self._ranks == 1:
            return
        share = -(-tensor.numel() // self._ranks)
        self._sent = tensor.new_zeros(share * self._ranks, dtype=torch.bfloat16)
        self._sent[: tensor.numel()] = tensor.detach().reshape(-1)
        self._come = torch.empty_like(self._sent)
        self._work = dist.all_to_all_single(self._come, self._sent, group=group, async_op=True)

    def wait(self) -> Tensor:
        """Return the sum."""
        if self._ranks == 1:
            return self._tensor
        self._work.wait()
        mine = self._come.view(self._ranks, -1).float().sum(0).to(torch.bfloat16)
        dist.all_gather_into_tensor(self._sent, mine, group=self._group)
        return self._sent[: self._tensor.numel()].float().view(self._tensor.shape)


def all_reduce_sum(tensors: list[Tensor], group: ProcessGroup | None = None) -> list[Tensor]:
    """Sums of ``tensors`` over ranks, as `PendingSum`; the arguments are left alone."""
    return PendingSum(tensors, group).wait()


def message_sizes(tensors: list[Tensor]) -> list[int]:
    """Bytes of each collective that `all_reduce_sum` takes for ``tensors`` on several ranks."""
    # Two float32 are as many bytes as one int64.
    messages = _messages(tensors)
    return [sum(tensors[i].numel() * tensors[i].element_size() for i in m) for m in messages]


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
