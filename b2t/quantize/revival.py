"""Bring codes that fell out of use back into it."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor
from torch.nn import functional as F

from b2t.quantize.codebook import Codebooks
from b2t.quantize.frame_hash import signed64
from b2t.quantize.statistics import FramePool

# A child starts this many root-mean-square deviations from its parent. The plane that parts the
# two then passes close to the cluster's centre, and each gets about half of its frames; a child
# placed on a frame itself would in many dimensions get that frame alone and die again.
_SPLIT_DEVIATIONS = 0.1


def dead_codes(count: Tensor, threshold: float, max_share: float) -> Tensor:
    """Least used codes under ``threshold`` × uniform use, at most ``max_share`` of all K.

    Args:
        count: [K] average use.
        threshold: fraction of uniform use below which a code is dead.
        max_share: greatest part of the codebook in one update (at least one code).

    Returns:
        Their indices, least used first, equal use by index.
    """
    order = torch.argsort(count, stable=True)
    limit = max(1, int(max_share * count.shape[0]))
    dead = count[order] < threshold * count.mean()
    return order[:limit][dead[:limit]]


def parents_of(count: Tensor, children: int, floor: float) -> list[int]:
    """For each of ``children`` new codes the code to split: always the one left most crowded.

    Stops early where a further split would leave less than ``floor`` frames to each part.
    """
    heap = [(-n, index, n, 1) for index, n in enumerate(count.tolist())]
    heapq.heapify(heap)
    parents: list[int] = []
    while len(parents) < children:
        _, index, whole, parts = heap[0]
        if whole / (parts + 1) < floor:
            break
        parents.append(index)
        heapq.heapreplace(heap, (-whole / (parts + 1), index, whole, parts + 1))
    return parents


def revive_layer(
    books: Codebooks,
    layer: int,
    pool: FramePool,
    *,
    pool_layers: list[int],
    mode: str,
    threshold: float,
    max_share: float,
    cosine: bool,
) -> int:
    """Revive dead codes of codebook ``layer``; returns how many. Count and sum follow the code.

    ``split``: a dead code moves beside the most crowded one, towards a frame that was assigned to
    it, and takes its share of count and sum: nothing that is in use changes much. ``frames``: a
    dead code moves onto a frame's residual, with the count of uniform use.

    Args:
        books: state, changed in place.
        layer: index of the codebook.
        pool: frames of all ranks.
        pool_layers: layers of the pool that use this codebook.
        mode: ``split`` or ``frames``.
        threshold: see `dead_codes`.
        max_share: see `dead_codes`.
        cosine: codes are of unit length.
    """
    count = books.ema_count[layer]
    dead = dead_codes(count, threshold, max_share)
    if dead.numel() == 0:
        return 0
    residuals = pool.residuals[pool_layers].transpose(0, 1).flatten(0, 1)
    codes = pool.codes[pool_layers].transpose(0, 1).flatten()
    used = codes >= 0
    residuals, codes = residuals[used], codes[used]
    if cosine:
        residuals = F.normalize(residuals, dim=-1)
    revive = _split if mode == "split" else _place_on_frames
    return revive(books, layer, dead, residuals, codes, threshold, cosine)


def _place_on_frames(
    books: Codebooks,
    layer: int,
    dead: Tensor,
    residuals: Tensor,
    codes: Tensor,
    threshold: float,
    cosine: bool,
) -> int:
    dead = dead[: residuals.shape[0]]
    frames = residuals[: dead.shape[0]]
    use = books.ema_count[layer].mean()
    books.embed[layer, dead] = frames
    books.ema_count[layer, dead] = use
    books.ema_sum[layer, dead] = frames * use
    return dead.shape[0]


def _split(
    books: Codebooks,
    layer: int,
    dead: Tensor,
    residuals: Tensor,
    codes: Tensor,
    threshold: float,
    cosine: bool,
) -> int:
    count = books.ema_count[layer].clone()
    count[dead] = 0.0
    parents = parents_of(count, dead.shape[0], floor=threshold * float(count.mean()))
    if not parents:
        return 0
    dead = dead[: len(parents)]
    parent = torch.tensor(parents, device=dead.device)
    embed = books.embed[layer]
    children = embed[parent] + _directions(books, layer, parent, residuals, codes)
    if cosine:
        children = F.normalize(children, dim=-1)
    unique, parts = parent.unique(return_counts=True)
    share = torch.zeros_like(count)
    share[unique] = count[unique] / (parts + 1)
    embed[dead] = children
    books.ema_count[layer, dead] = share[parent]
    books.ema_count[layer, unique] = share[unique]
    changed = torch.cat([dead, unique])
    books.ema_sum[layer, changed] = embed[changed] * books.ema_count[layer, changed, None]
    return len(parents)


def _directions(
    books: Codebooks, layer: int, parent: Tensor, residuals: Tensor, codes: Tensor
) -> Tensor:
    """Small steps from each parent to a frame of its own, or along noise where none is at hand."""
    embed = books.embed[layer]
    noise = _noise(books, layer, parent.shape[0]).to(embed.device)
    steps = noise.clone()
    pairs = _own_frames(parent.tolist(), codes.tolist())
    if pairs:
        children, frames = map(list, zip(*pairs, strict=True))
        steps[children] = residuals[frames] - embed[parent[children]]
    # A frame that lies on its code gives no direction.
    steps = torch.where(steps.norm(dim=1, keepdim=True) > 0, steps, noise)
    size = _SPLIT_DEVIATIONS * (books.distance_scale[layer] / embed.shape[1]).sqrt()
    floor = embed[parent].norm(dim=1, keepdim=True) * torch.finfo(torch.float32).eps * 16
    return F.normalize(steps, dim=1) * torch.maximum(size, floor)


def _own_frames(parents: list[int], codes: list[int]) -> list[tuple[int, int]]:
    """Pairs (child, frame): to each child a frame of its parent that no other child has."""
    waiting: dict[int, list[int]] = {}
    for frame, code in enumerate(codes):
        waiting.setdefault(code, []).append(frame)
    return [
        (child, waiting[parent].pop(0))
        for child, parent in enumerate(parents)
        if waiting.get(parent)
    ]


def _noise(books: Codebooks, layer: int, rows: int) -> Tensor:
    seed = signed64(int(books.seed) * 1_000_003 + int(books.updates) * 8191 + layer)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, books.embed.shape[-1], generator=generator)
