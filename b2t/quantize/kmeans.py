"""k-means++ start: D² sampling (Arthur and Vassilvitskii 2007), then Lloyd's steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from b2t.quantize.frame_hash import frame_hash
from b2t.quantize.search import code_sums, nearest

_MAX_PROPOSALS = 128


class FrameReservoir:
    """Collects frames up to a number; keeps those of lowest hash, in that order.

    The frames kept depend on which frames were offered and not on their order, their batches or
    the rank that brought them.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.offered = 0
        self._frames: list[Tensor] = []
        self._hashes: list[Tensor] = []

    def add(self, frames: Tensor, hashes: Tensor) -> None:
        """Offer ``frames`` [n, D] float32 with their ``hashes`` [n] int64."""
        self.offered += frames.shape[0]
        self._frames.append(frames)
        self._hashes.append(hashes)
        if sum(f.shape[0] for f in self._frames) > 2 * self.size:
            kept = self.kept()
            self._frames, self._hashes = [kept[0]], [kept[1]]

    def kept(self) -> tuple[Tensor, Tensor]:
        """At most ``size`` frames and their hashes, in the order of the hashes."""
        return canonical(torch.cat(self._frames), torch.cat(self._hashes), self.size)


def canonical(frames: Tensor, hashes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The ``size`` frames of lowest hash and their hashes, in its order."""
    order = torch.argsort(hashes, stable=True)[:size]
    return frames[order], hashes[order]


def _squared_distances(x: Tensor, x_norm: Tensor, centers: Tensor) -> Tensor:
    """‖x − c‖² [N, M]; what rounding alone can account for is zero, so that copies have none."""
    c_norm = centers.square().sum(1)
    d = torch.addmm(x_norm[:, None] + c_norm, x, centers.T, alpha=-2.0)
    noise = 8 * torch.finfo(torch.float32).eps * (x_norm[:, None] + c_norm)
    return torch.where(d > noise, d, 0.0)


def seed_centers(
    x: Tensor, clusters: int, generator: torch.Generator, tick: Callable[[int], object]
) -> Tensor:
    """Indices of k-means++ seeds among the frames ``x`` [N, D], at most ``clusters``.

    Candidates are proposed in blocks ∝ the D² of the block's start, and each is accepted with
    probability D²(now)/D²(start). D² only falls, so that this is rejection sampling from exactly
    the distribution of one-at-a-time seeding, at the cost of matrix products. Fewer seeds come
    back where fewer frames are distinct.
    """
    n = x.shape[0]
    x = x - x.mean(0)
    x_norm = x.square().sum(1)
    first = int(torch.randint(n, (1,), generator=generator))
    chosen = [first]
    d2 = _squared_distances(x, x_norm, x[first : first + 1])[:, 0]
    tick(1)
    while len(chosen) < clusters:
        if float(d2.sum()) <= 0:
            break
        m = min(_MAX_PROPOSALS, max(1, len(chosen) // 4), clusters - len(chosen))
        proposals = _draw(d2, m, generator)
        between = _squared_distances(x[proposals], x_norm[proposals], x[proposals])
        accepted = _accept(d2[proposals], between, generator)
        new = proposals[torch.tensor(accepted, device=x.device)]
        chosen.extend(new.tolist())
        for part in range(0, n, 65536):
            rows = slice(part, part + 65536)
            d2[rows] = torch.minimum(
                d2[rows], _squared_distances(x[rows], x_norm[rows], x[new]).amin(1)
            )
        d2[new] = 0.0
        tick(len(accepted))
    return torch.tensor(chosen, device=x.device)


def _draw(weights: Tensor, m: int, generator: torch.Generator) -> Tensor:
    """``m`` indices with probability ∝ ``weights``, with replacement, for any number of them."""
    cumulative = weights.cpu().double().cumsum(0)  # a GPU adds up in another order each time
    points = torch.rand(m, generator=generator, dtype=torch.float64)
    places = torch.searchsorted(cumulative, points * cumulative[-1], right=True)
    return places.clamp(max=weights.shape[0] - 1).to(weights.device)


def _accept(d2: Tensor, between: Tensor, generator: torch.Generator) -> list[int]:
    """Which proposals stay, one after the other; the first always does."""
    start, pairs = d2.tolist(), between.tolist()
    points = torch.rand(len(start), generator=generator).tolist()
    accepted: list[int] = []
    for j, before in enumerate(start):
        now = min(before, *(pairs[i][j] for i in accepted)) if accepted else before
        if points[j] * before < now:
            accepted.append(j)
    return accepted


def kmeans(
    x: Tensor,
    clusters: int,
    iterations: int,
    generator: torch.Generator,
    tick: Callable[[int], object] = lambda _: None,
) -> tuple[Tensor, int]:
    """k-means++ of ``x`` [N, D] float32 into ``clusters`` codes.

    Where there are fewer than two distinct frames for each cluster, every frame would be its own
    code and nothing would remain for the next layer: half as many clusters as distinct frames are
    fitted, and the codes left over are jittered copies of them.

    Args:
        x: frames, finite.
        clusters: K.
        iterations: Lloyd steps.
        generator: CPU generator, the same on all ranks.
        tick: told of progress, K for the seeding and K for each Lloyd step.

    Returns:
        codes [K, D], the clusters first, and how many are clusters.
    """
    distinct = frame_hash(x, 0, 0).unique().shape[0]
    wanted = min(clusters, max(1, distinct // 2))
    codes = x[seed_centers(x, wanted, generator, tick)]
    for _ in range(iterations):
        codes = _lloyd(x, codes)
        tick(clusters)
    return _fill(x, codes, clusters, generator), codes.shape[0]


def _lloyd(x: Tensor, codes: Tensor) -> Tensor:
    """One step; a cluster that lost its frames takes the frame farthest from its code."""
    assigned, counts = nearest(x, codes)
    offset = x.mean(0)
    sums = code_sums(x - offset, assigned, codes.shape[0])
    moved = sums / counts.clamp(min=1)[:, None] + offset
    empty = (counts == 0).nonzero()[:, 0]
    if empty.numel():
        far = (x - codes[assigned]).square().sum(1).topk(min(empty.numel(), x.shape[0])).indices
        moved[empty[: far.numel()]] = x[far]
    return moved


def _fill(x: Tensor, codes: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    missing = clusters - codes.shape[0]
    if missing == 0:
        return codes
    copied = torch.randint(codes.shape[0], (missing,), generator=generator).to(x.device)
    jitter = torch.randn(missing, x.shape[1], generator=generator).to(x.device)
    return torch.cat([codes, codes[copied] + 0.1 * x.std(0, unbiased=False) * jitter])
