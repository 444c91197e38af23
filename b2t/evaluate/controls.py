"""Controls: what the same model says when its input carries nothing.

A decoder that has only learnt the language of the training sentences scores as well on noise as
on brain signals; the error rate of a control is what the real one has to be compared with.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from b2t.data.batches import Batch

if TYPE_CHECKING:
    from b2t.model.brain_to_text import BrainToText

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
    noise = noise_like(batch.signal, batch.signal_mask, _seeds(batch.rows, seed))
    return dataclasses.replace(batch, signal=noise, target=noise)


def spectrum_like(signal: Tensor, mask: Tensor, seeds: Sequence[int]) -> Tensor:
    """Noise with each channel's own power spectrum: the trial with its phases drawn at random.

    What is slow or rhythmic in a recording stays so; when anything happens is lost, and so is what
    channels have in common. White noise a model may know by its spectrum alone.

    Source: Theiler et al., Testing for nonlinearity in time series: the method of surrogate data
    (1992), section 2.4.2.

    Args:
        signal: [B, T, C].
        mask: [B, T] bool, True = real.
        seeds: B seeds; see `noise_like`.

    Returns:
        [B, T, C] like ``signal``, zero under the mask.
    """
    noise = torch.zeros_like(signal)
    for row, seed in enumerate(seeds):
        real = signal[row, mask[row]].double().cpu()
        if len(real) == 0:
            continue
        spectrum = torch.fft.rfft(real, dim=0)
        generator = torch.Generator().manual_seed(seed)
        angle = 2 * torch.pi * torch.rand(spectrum.shape, generator=generator, dtype=torch.float64)
        # The mean and, of an even number of bins, the fastest frequency are real: they stay.
        angle[0] = 0.0
        if len(real) % 2 == 0:
            angle[-1] = 0.0
        drawn = torch.fft.irfft(spectrum * torch.polar(torch.ones_like(angle), angle), len(real), 0)
        noise[row, mask[row]] = drawn.to(signal)
    return noise


def spectrum_batch(batch: Batch, seed: int = 0) -> Batch:
    """Return the batch with `spectrum_like` in place of its signals; labels and sessions stay."""
    noise = spectrum_like(batch.signal, batch.signal_mask, _seeds(batch.rows, seed))
    return dataclasses.replace(batch, signal=noise, target=noise)


@torch.no_grad()
def shuffled_codes(model: "BrainToText", output: Any, rows: Sequence[str], seed: int = 0) -> Any:
    """Return a model's output with the codes of each trial in another order.

    Which codes occur stays, their order in time is lost: a decoder that knows sentences by how
    often a code occurs scores on it as before.

    Args:
        model: a `BrainToText`.
        output: of B signals, with `quantized` and `frame_mask`.
        rows: ids of the rows; the order of a trial depends on its id and the seed alone.
        seed: of the orders.
    """
    quantized = output.quantized.clone()
    codes = None if output.codes is None else output.codes.clone()
    for row, own in enumerate(_seeds(rows, seed)):
        real = output.frame_mask[row].nonzero().flatten()
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(own))
        moved = real[order.to(real.device)]
        quantized[row, real] = output.quantized[row, moved]
        if codes is not None:
            codes[row, real] = output.codes[row, moved]
    head = model.phoneme_head
    logits = None if output.phoneme_logits is None or head is None else head(quantized)
    return dataclasses.replace(output, quantized=quantized, codes=codes, phoneme_logits=logits)


def _seeds(rows: Sequence[str], seed: int) -> list[int]:
    return [zlib.crc32(f"{seed}/{row}".encode()) for row in rows]


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
