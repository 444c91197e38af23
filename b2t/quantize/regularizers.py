"""Losses that keep a codebook in use: functions of the mean soft assignment over a global batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from b2t.quantize.distributed import all_reduce_sum, world_size
from b2t.quantize.statistics import SoftUsage


def global_usage(
    local: Tensor,
    frames: Tensor,
    group: ProcessGroup | None = None,
    total: SoftUsage | None = None,
    micro_batches: int = 1,
    reduce: bool = True,
) -> Tensor:
    """Mean soft assignment p̄ [L, K] of the global batch, differentiable in this rank's part.

    The value is the same on every rank. The gradient into ``local`` is scaled so that the *mean*
    over ranks and micro-batches, which data-parallel training takes, is the gradient of the loss
    of the global batch. No collective runs in backward.

    Args:
        local: [L, K], this micro-batch's sum of soft assignments.
        frames: [L] int64, its frames.
        group: ranks of the global batch.
        total: sums of the whole step (all ranks, all micro-batches), where known; without it the
            global batch is this micro-batch on all ranks, summed here in one collective.
        micro_batches: forwards that share ``total``.
        reduce: False takes this rank's frames alone (evaluation: no collective).
    """
    ranks = world_size(group) if reduce else 1
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
