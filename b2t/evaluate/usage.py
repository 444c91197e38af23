"""How much of each codebook is used, from counts [Q, K]."""

import torch
from torch import Tensor


def count_codes(codes: Tensor, codebook_size: int) -> Tensor:
    """Count each code per layer: codes [..., Q] int, negative where masked → [Q, K] int64."""
    codes = codes.reshape(-1, codes.shape[-1])
    layers = codes.shape[-1]
    offset = torch.arange(layers, device=codes.device) * codebook_size
    flat = (codes + offset)[codes >= 0]
    return torch.bincount(flat, minlength=layers * codebook_size).view(layers, codebook_size)


def utilization(counts: Tensor) -> Tensor:
    """Used codes / min(K, frames) per layer: counts [Q, K] → [Q] float64, NaN without a frame.

    With fewer frames than codes no quantizer could use them all, hence the minimum.
    """
    frames = counts.sum(-1).double()
    reachable = frames.clamp(max=counts.shape[-1])
    return (counts > 0).sum(-1).double() / torch.where(reachable > 0, reachable, torch.nan)


def usage_entropy(counts: Tensor) -> Tensor:
    """Entropy in nats of each layer's usage: counts [Q, K] → [Q] float64, NaN without a frame."""
    counts = counts.double()
    total = counts.sum(-1, keepdim=True)
    share = counts / torch.where(total > 0, total, torch.nan)
    return -torch.special.xlogy(share, share).sum(-1)


def perplexity(counts: Tensor) -> Tensor:
    """exp(entropy) per layer, between 1 (one code) and K (uniform use): counts [Q, K] → [Q]."""
    return usage_entropy(counts).exp()
