"""Time bins to patches and back, with masks.

Patch p covers bins p·stride to p·stride + size. A trial of t bins has
P(t) = ⌈(t − size) / stride⌉ + 1 patches (at least one), the last of them filled up with zeros, so
that every bin lies in a patch and the number depends on the trial alone, not on the padding behind
it. Masked bins in front of a trial (it may be shifted in time) move its patches along with it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def num_patches(bins: int, size: int, stride: int) -> int:
    """Patches P that cover a signal of `bins` time bins."""
    return max(-(-(bins - size) // stride), 0) + 1


def _fill_up(x: Tensor, size: int, stride: int) -> Tensor:
    """Append zeros along dimension 1 until the last patch is full."""
    bins = x.shape[1]
    missing = (num_patches(bins, size, stride) - 1) * stride + size - bins
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))


def patch_mask(mask: Tensor, size: int, stride: int) -> Tensor:
    """Real patches for real bins.

    A patch is real where it brings a real bin that the patch before it did not cover.

    Args:
        mask: [B, T] bool, True = real.
        size: bins per patch.
        stride: bins from one patch to the next.

    Returns:
        [B, P] bool.
    """
    mask = _fill_up(mask, size, stride)
    first = mask[:, :size].any(dim=1, keepdim=True)
    new = mask[:, size:].reshape(mask.shape[0], -1, stride).any(dim=2)
    return torch.cat((first, new), dim=1)


def to_patches(signal: Tensor, size: int, stride: int) -> Tensor:
    """Cut a signal [B, T, C] into patches [B, P, size · C], bins before channels."""
    signal = _fill_up(signal, size, stride)
    return signal.unfold(1, size, stride).transpose(2, 3).flatten(2)


def from_patches(patches: Tensor, mask: Tensor, bins: int, size: int, stride: int) -> Tensor:
    """Lay patches out in time again; where several real ones overlap, average them.

    Args:
        patches: [B, P, size · C].
        mask: [B, P] bool, True = real.
        bins: length T of the result.
        size: bins per patch.
        stride: bins from one patch to the next.

    Returns:
        [B, T, C], zero where no real patch lies.
    """
    batch, count, width = patches.shape
    patches = patches.masked_fill(~mask[..., None], 0.0)
    if size == stride:
        return patches.view(batch, count * size, width // size)[:, :bins]
    summed = _overlap_add(patches.view(batch, count, size, -1), stride)[:, :bins]
    ones = mask[..., None, None].to(patches.dtype).expand(-1, -1, size, 1)
    cover = _overlap_add(ones, stride)[:, :bins]
    return summed / cover.clamp(min=1.0)


def _overlap_add(patches: Tensor, stride: int) -> Tensor:
    """Add patches [B, P, size, C] at multiples of stride → [B, ≥ (P − 1)·stride + size, C]."""
    batch, count, size, channels = patches.shape
    steps = -(-size // stride)
    patches = F.pad(patches, (0, 0, 0, steps * stride - size))
    patches = patches.reshape(batch, count, steps, stride, channels)
    out = patches.new_zeros(batch, count + steps - 1, stride, channels)
    for step in range(steps):
        out[:, step : step + count] += patches[:, :, step]
    return out.flatten(1, 2)
