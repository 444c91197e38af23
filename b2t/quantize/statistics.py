"""What a quantizer measures in forward and gives to its update; plain data, added and reduced."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from b2t.quantize.distributed import all_gather_rows, all_reduce_sum
from b2t.quantize.layers import Walk


@dataclass
class FramePool:
    """Frames drawn uniformly by their hashes, with what each layer saw: material for revival.

    Args:
        hashes: [R] int64; the pool holds the frames of lowest hash.
        residuals: [Q, R, D] float32, the input of each layer.
        codes: [Q, R] int64, its assignment; −1 where the layer was dropped.
        size: greatest R.
    """

    hashes: Tensor
    residuals: Tensor
    codes: Tensor
    size: int

    def __add__(self, other: FramePool) -> FramePool:
        return FramePool(
            torch.cat([self.hashes, other.hashes]),
            torch.cat([self.residuals, other.residuals], 1),
            torch.cat([self.codes, other.codes], 1),
            self.size,
        ).trimmed()

    def trimmed(self) -> FramePool:
        """The ``size`` frames of lowest hash, in the order of their hashes."""
        order = torch.argsort(self.hashes, stable=True)[: self.size]
        return FramePool(
            self.hashes[order], self.residuals[:, order], self.codes[:, order], self.size
        )

    def gathered(self, group: ProcessGroup | None) -> FramePool:
        """The pool of all ranks' frames, the same on every rank.

        Hashes go round first, so that only frames that will be in it follow: their number does not
        grow with that of the ranks.
        """
        hashes = all_gather_rows(self.hashes, group)
        mine = torch.ones_like(self.hashes, dtype=torch.bool)
        if hashes.shape[0] > self.size:
            last = hashes.sort().values[self.size - 1]  # kthvalue may vary on a GPU
            hashes, mine = hashes[hashes <= last], self.hashes <= last
        parts = (self.residuals[:, mine], self.codes[:, mine])
        gathered = [all_gather_rows(p.transpose(0, 1).contiguous(), group) for p in parts]
        residuals, codes = (rows.transpose(0, 1) for rows in gathered)
        return FramePool(hashes, residuals, codes, self.size).trimmed()


@dataclass
class QuantizerStats:
    """Sums over frames of one or more forward passes; ``a + b`` joins micro-batches.

    Args:
        counts: [Q, K] int64, frames of each code.
        sums: [Q, K, D] float32, their residuals summed (unit residuals under cosine similarity);
            [1, K, D] with a shared codebook. None from a forward in evaluation mode.
        squared_error: [Q] float32, Σ‖residual‖² after each layer.
        projection: [Q] float32, Σ residual · unit code (cosine similarity only, else zeros).
        frames: [Q] int64, frames that entered each layer.
        nonfinite: [] int64, frames left out because they held NaN or infinity.
        pool: frames for revival, where the coming update is one that revives.
        empty: True from a quantizer whose codebooks have not started: nothing was assigned.
    """

    counts: Tensor
    sums: Tensor | None
    squared_error: Tensor
    projection: Tensor
    frames: Tensor
    nonfinite: Tensor
    pool: FramePool | None = None
    empty: bool = False

    @classmethod
    def of(
        cls,
        walk: Walk,
        nonfinite: Tensor,
        hashes: Tensor | None = None,
        keep: Tensor | None = None,
        pool_size: int = 0,
    ) -> QuantizerStats:
        """What a walk of N frames found.

        Args:
            walk: how the layers were walked.
            nonfinite: [] frames left out before it.
            hashes: [N] the frames' random numbers.
            keep: [R] the frames for revival, whose residuals the walk has kept; None for none.
            pool_size: greatest R.
        """
        frames = torch.zeros_like(walk.counts[:, 0])
        frames[: walk.layers] = walk.codes.shape[0]
        pool = None
        if hashes is not None and keep is not None and walk.residuals is not None:
            pool = FramePool(hashes[keep], walk.residuals, walk.codes[keep].T, pool_size)
        return cls(
            walk.counts, walk.sums, walk.squared_error, walk.projection, frames, nonfinite, pool
        )

    @classmethod
    def none(cls, embed: Tensor, quantizers: int, nonfinite: Tensor, sums: bool) -> QuantizerStats:
        """What a quantizer has to say whose codebooks ``embed`` [L, K, D] have not started."""
        layers, K, D = embed.shape
        nothing = torch.zeros(quantizers, dtype=torch.int64, device=embed.device)
        return cls(
            counts=nothing[:, None].repeat(1, K),
            sums=embed.new_zeros(layers, 0, D) if sums else None,
            squared_error=embed.new_zeros(quantizers),
            projection=embed.new_zeros(quantizers),
            frames=nothing,
            nonfinite=nonfinite,
            empty=True,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is summed over ranks, by name."""
        names = ("counts", "sums", "squared_error", "projection", "frames", "nonfinite")
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def _with(self, tensors: dict[str, Tensor], pool: FramePool | None) -> QuantizerStats:
        changes: dict[str, Any] = {**tensors, "pool": pool}
        return dataclasses.replace(self, **changes)

    def __add__(self, other: QuantizerStats) -> QuantizerStats:
        if self.empty != other.empty:
            raise ValueError(
                "statistics from before and after the codebooks' start cannot be added"
            )
        if (self.sums is None) != (other.sums is None):
            raise ValueError("statistics of training and evaluation cannot be added")
        mine, theirs = self.tensors(), other.tensors()
        pool = self.pool + other.pool if self.pool and other.pool else self.pool or other.pool
        joined = {name: mine[name] + theirs[name] for name in mine}
        return self._with(joined, pool)

    def __radd__(self, other: object) -> QuantizerStats:
        if other == 0:  # so that sum(stats) works
            return self
        return NotImplemented

    def to(self, device: torch.device | str) -> QuantizerStats:
        """A copy on ``device``."""
        moved = {name: value.to(device) for name, value in self.tensors().items()}
        pool = self.pool
        if pool is not None:
            pool = FramePool(
                pool.hashes.to(device), pool.residuals.to(device), pool.codes.to(device), pool.size
            )
        return self._with(moved, pool)


@dataclass
class SoftUsage:
    """Soft assignments summed over frames: sums [Q, K] float32 of frames [Q] int64.

    The diversity and perplexity losses are functions of the mean over *all* frames of a step.
    Sum the usage of every micro-batch, ``all_reduce`` it, and give it to each forward.
    """

    sums: Tensor
    frames: Tensor

    def __add__(self, other: SoftUsage) -> SoftUsage:
        return SoftUsage(self.sums + other.sums, self.frames + other.frames)

    def __radd__(self, other: object) -> SoftUsage:
        if other == 0:
            return self
        return NotImplemented

    def all_reduce(self, group: ProcessGroup | None = None) -> SoftUsage:
        """Sums over ranks."""
        return SoftUsage(*all_reduce_sum([self.sums, self.frames], group))


@dataclass
class UpdateReport:
    """What an update did, the same on every rank.

    Args:
        applied: False where nothing was there to update from.
        frames: [Q] frames of the step that entered each layer, over all ranks and micro-batches.
        revived: codes revived in each layer.
        nonfinite: frames of the step that held NaN or infinity.
        counts: [Q, K] int64, frames of each code, over all ranks and micro-batches; None where
            nothing was applied.
    """

    applied: bool
    frames: Tensor
    revived: list[int]
    nonfinite: Tensor
    counts: Tensor | None = None


@dataclass
class InitReport:
    """What the k-means++ start found.

    Args:
        frames: frames used, over all ranks.
        nonfinite: frames left out because they held NaN or infinity.
        seeded: codes of each layer that came from k-means; the rest are jittered copies.
        squared_error: mean ‖residual‖² per frame after each layer.
        seconds: wall time.
    """

    frames: int
    nonfinite: int = 0
    seeded: list[int] = field(default_factory=list)
    squared_error: list[float] = field(default_factory=list)
    seconds: float = 0.0
