"""Random numbers that belong to a frame rather than to its place.

A frame's number is a hash of its identity, trial and place in it, where the caller knows that, else
of its values. A sample drawn by it is the same set of frames however they are spread over batches,
micro-batches and ranks, and the same again when activation checkpointing or a resumed run computes
it a second time. Values alone do not go so far: a difference in the last bit, as another number of
ranks makes, draws other frames.
"""

from __future__ import annotations

import torch
from torch import Tensor

_UNIFORM_BITS = 23
_ODD = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """Finalizer of SplitMix64 (Steele, Lea and Flood 2014), elementwise on int64."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def signed64(value: int) -> int:
    """``value`` wrapped into the range of a signed 64-bit number."""
    return (value + 2**63) % 2**64 - 2**63


def frame_hash(frames: Tensor, seed: int, step: int) -> Tensor:
    """Hash of each row of ``frames`` [N, D] float32, for one seed and step; int64 [N]."""
    salt = _salt(seed, step)
    place = torch.arange(frames.shape[1], device=frames.device, dtype=torch.int64)
    factors = mix(place * _ODD + salt) | 1
    result = torch.empty(frames.shape[0], dtype=torch.int64, device=frames.device)
    for start in range(0, frames.shape[0], 4096):
        bits = frames[start : start + 4096].contiguous().view(torch.int32).to(torch.int64)
        result[start : start + 4096] = mix((bits * factors).sum(1) + salt)
    return result


def frame_ids(trials: Tensor, frames: int) -> Tensor:
    """Identities [B, P] int64 of the P ``frames`` of each trial, from the trials' own [B] int64."""
    place = torch.arange(frames, device=trials.device, dtype=torch.int64)
    return mix(trials[:, None] + place * _ODD)


def identity_hash(ids: Tensor, seed: int, step: int) -> Tensor:
    """Hash of identities [N] int64, for one seed and step; int64 [N]."""
    return mix(mix(ids) ^ _salt(seed, step))


def _salt(seed: int, step: int) -> int:
    return signed64(seed * 0x9E3779B97F4A7C15 + step * 0xD1342543DE82EF95 + 1)


def frame_gumbel(hashes: Tensor, codes: int, layer: int) -> Tensor:
    """Standard Gumbel noise [N, K] for frames with ``hashes`` [N] against K codes of a layer."""
    place = torch.arange(codes, device=hashes.device, dtype=torch.int64)
    columns = mix(place * _ODD + signed64((layer + 1) * 0xD1342543DE82EF95))
    return _gumbel(_shift_right(mix(hashes[:, None] ^ columns), 64 - _UNIFORM_BITS))


def _gumbel(bits: Tensor) -> Tensor:
    """Standard Gumbel noise from equally likely integers below 2 ** 23."""
    # One bit more and the largest uniform number would round to 1, whose noise is infinite.
    uniform = (bits.to(torch.float32) + 0.5) / (1 << _UNIFORM_BITS)
    return -torch.log(-torch.log(uniform))
