"""The quantizer's losses: how far latents are from their codes, and how evenly codes are used."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from b2t.quantize.distributed import all_reduce_sum, world_size
from b2t.quantize.gradients import squared_codebook, squared_commitment
from b2t.quantize.layers import Layers, Walk
from b2t.quantize.norms import Number, StepNorms
from b2t.quantize.statistics import QuantizerStats, SoftUsage

LOSSES = ("commitment", "diversity", "perplexity")
"""Names that a caller chooses of; the gradient rule adds `codebook`."""


def require_known(names: Collection[str]) -> None:
    """Refuse a loss that no quantizer has.

    Raises:
        ValueError: on all names that are not in `LOSSES`.
    """
    unknown = set(names) - set(LOSSES)
    if unknown:
        raise ValueError(f"unknown losses {sorted(unknown)}; choose of {LOSSES}")


def needs_usage(names: Collection[str]) -> bool:
    """Whether `usage_losses` will have to know the soft assignments."""
    return any(name in _USAGE_LOSSES for name in names)


def commitment_loss(latents: Tensor, quantized: Tensor, walk: Walk, frames: Number) -> Tensor:
    """Squared distance of latents [N, D] to their codes, mean over frames, layers and D: [].

    Args:
        latents: [N, D] with a gradient.
        quantized: [N, D], the sum of their codes.
        walk: how the layers were walked.
        frames: N, or what the step divides by instead.
    """
    errors = walk.errors if walk.layers > 1 else None
    total = squared_commitment(latents, walk.squared_error.sum(), errors, quantized)
    return total / _elements(latents, walk, frames)


def codebook_loss(
    books: Tensor, latents: Tensor, walk: Walk, stats: QuantizerStats, frames: Number
) -> Tensor:
    """Squared distance of codes to their frames, mean over frames, layers and D: [].

    Args:
        books: [L, K, D] with a gradient.
        latents: [N, D].
        walk: how the layers were walked.
        stats: counts and sums of the same walk; without sums (evaluation) the loss has no gradient.
        frames: N, or what the step divides by instead.
    """
    total = walk.code_error.sum()
    if stats.sums is not None:
        shared = books.shape[0] < stats.counts.shape[0]
        counts = stats.counts.sum(0, keepdim=True) if shared else stats.counts
        total = squared_codebook(books, counts.float(), stats.sums, total)
    return total / _elements(latents, walk, frames)


def _elements(latents: Tensor, walk: Walk, frames: Number) -> Tensor:
    if isinstance(frames, Tensor):
        divisor = frames.to(latents.device, torch.float32)
    else:  # made on the device: a copy from the host would wait for it
        divisor = torch.full((), frames, dtype=torch.float32, device=latents.device)
    return divisor.clamp(min=1e-6) * (walk.layers * latents.shape[1])


def usage_losses(
    latents: Tensor,
    layers: Layers,
    walk: Walk,
    names: Collection[str],
    norms: StepNorms,
    *,
    group: ProcessGroup | None = None,
    reduce: bool = True,
) -> dict[str, Tensor]:
    """Those of ``diversity`` and ``perplexity`` that ``names`` holds, over the global batch.

    Args:
        latents: [N, D] with a gradient.
        layers: the codebooks.
        walk: how they were walked.
        names: losses wanted.
        norms: see `global_usage`.
        group: see `global_usage`.
        reduce: see `global_usage`.
    """
    wanted = {name: loss for name, loss in _USAGE_LOSSES.items() if name in names}
    if not wanted:
        return {}
    local = layers.soft_sums(latents, walk)
    frames = torch.zeros_like(walk.counts[:, 0])
    frames[: walk.layers] = latents.shape[0]
    mean = global_usage(local, frames, norms, group, reduce)
    return {name: loss(mean[: walk.layers]) for name, loss in wanted.items()}


def global_usage(
    local: Tensor,
    frames: Tensor,
    norms: StepNorms,
    group: ProcessGroup | None = None,
    reduce: bool = True,
) -> Tensor:
    """Mean soft assignment p̄ [L, K] of the global batch, differentiable in this rank's part.

    The value is the same on every rank. The gradient into ``local`` is scaled so that the *mean*
    over ranks and micro-batches, which data-parallel training takes, is the gradient of the loss
    of the global batch. No collective runs in backward.

    Args:
        local: [L, K], this micro-batch's sum of soft assignments.
        frames: [L] int64, its frames.
        norms: of the step. Without its ``usage`` the global batch is this micro-batch on all
            ranks, summed here in one collective.
        group: ranks of the global batch.
        reduce: False takes this rank's frames alone (evaluation: no collective).
    """
    ranks = world_size(group) if reduce else 1
    total, micro_batches = norms.usage, norms.micro_batches
    if total is None:
        detached = [local.detach(), frames]
        sums, count = all_reduce_sum(detached, group) if reduce else detached
        total, micro_batches = SoftUsage(sums, count), 1
    denominator = total.frames.clamp(min=1).to(local.dtype)[:, None]
    own = (local - local.detach()) * (ranks * micro_batches)
    return (total.sums.detach() + own) / denominator


def entropy(usage: Tensor) -> Tensor:
    """Entropy in nats over the last axis; codes of zero use add nothing."""
    return torch.special.entr(usage.clamp(min=torch.finfo(usage.dtype).tiny)).sum(-1)


def diversity_loss(usage: Tensor) -> Tensor:
    """KL divergence of ``usage`` [L, K] from uniform use, log K − H, in nats, mean over layers.

    Layers without any frame (all zeros) count as uniform.
    """
    divergence = torch.log(torch.tensor(float(usage.shape[-1]))) - entropy(usage)
    return torch.where(usage.detach().sum(-1) > 0, divergence, 0.0 * divergence).mean()


def perplexity_loss(usage: Tensor) -> Tensor:
    """1 − exp(H)/K of ``usage`` [L, K], mean over layers: 0 at uniform use, towards 1 at one code.

    Layers without any frame (all zeros) count as uniform.
    """
    loss = 1.0 - torch.exp(entropy(usage)) / usage.shape[-1]
    return torch.where(usage.detach().sum(-1) > 0, loss, 0.0 * loss).mean()


_USAGE_LOSSES = {"diversity": diversity_loss, "perplexity": perplexity_loss}
