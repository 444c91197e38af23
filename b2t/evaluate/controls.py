"""Controls: what the same model says when its input carries nothing.

A decoder that has only learnt the language of the training sentences scores as well on noise as
on brain signals; the error rate of a control is what the real one has to be compared with.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from b2t.data.batches import Batch

Item = TypeVar("Item")


def noise_like(signal: Tensor, mask: Tensor, seeds: Sequence[int]) -> Tensor:
    """White Gaussian noise with each trial's own channel means, deviations and length.

    Args:
        signal: [B, T, C].
        mask: [B, T] bool, True = real.
        seeds: B seeds; the noise of a trial depends on its seed and shape alone, never on the
            batch it stands in.

    Returns:
        [B, T, C] like ``signal``, zero under the mask.
    """
    noise = torch.zeros_like(signal)
    for row, seed in enumerate(seeds):
        real = signal[row, mask[row]].double()
        if len(real) == 0:
            continue
        generator = torch.Generator().manual_seed(seed)
        white = torch.randn(real.shape, generator=generator, dtype=torch.float64)
        white = white.to(real.device)
        matched = real.mean(0) + white * real.std(0, correction=0)
        noise[row, mask[row]] = matched.to(signal.dtype)
    return noise


def noise_batch(batch: Batch, seed: int = 0) -> Batch:
    """Return the batch with `noise_like` in place of its signals; labels and sessions stay."""
    seeds = [zlib.crc32(f"{seed}/{row}".encode()) for row in batch.rows]
    noise = noise_like(batch.signal, batch.signal_mask, seeds)
    return dataclasses.replace(batch, signal=noise, target=noise)


def shuffled(items: Sequence[Item], seed: int = 0) -> list[Item]:
    """Return ``items`` so permuted that none keeps its place, for the shuffled-brain control.

    A prediction depends on the signal and its session alone, so that scoring the predictions of
    permuted trials equals decoding permuted signals. One random cycle through all items (Sattolo
    1986) leaves none in place; a single item has nowhere to go and is returned as it is.
    """
    generator = np.random.default_rng(seed)
    permuted = list(items)
    for last in range(len(permuted) - 1, 0, -1):
        other = int(generator.integers(0, last))
        permuted[last], permuted[other] = permuted[other], permuted[last]
    return permuted
