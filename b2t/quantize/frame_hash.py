"""Random numbers that belong to a frame rather than to its place.

A frame's number is a hash of its identity, trial and place in it, where the caller knows that, else
of its values. A sample drawn by it is the same set of frames however they are spread over batches,
micro-batches and ranks, and the same again when activation checkpointing or a resumed run computes
it a second time. Values alone do not go so far: a difference in the last bit, as another number of
ranks makes, draws other frames.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from b2t_kernels.gumbel import mix

_ODD = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number


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


@functools.cache
def code_keys(codes: int, layer: int, device: torch.device) -> Tensor:
    """Keys [K] int64 of the K codes of a layer: what draws of different layers differ by."""
    place = torch.arange(codes, device=device, dtype=torch.int64)
    return mix(place * _ODD + signed64((layer + 1) * 0xD1342543DE82EF95))
