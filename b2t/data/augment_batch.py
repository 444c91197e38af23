"""Augmentation of a whole batch on the device that trains.

A row comes out the same in whatever batch and on whatever rank it is read: what is drawn along
time and channels comes of a generator of its own, everything else goes element by element. Noise
is the same on devices of one kind; a GPU draws other numbers than a CPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from b2t.data.options import AugmentOptions
from b2t.smoothing import smooth_rows


class Draws(NamedTuple):
    """What happens to one trial.

    Attributes:
        source_bins: T as recorded.
        cut: bins left out at the beginning.
        bins: T' after cut and stretch.
        shift: bins by which it moves, either way.
        scale: factor on the whole trial.
        noise_seed: of what is drawn on the device.
        kept: [C] bool, False where a channel is silenced.
        bands: [F, 2] first frequency and width of removed bands, in steps of the spectrum.
        spans: [M, 2] first bin and width of silenced spans, counted from the first recorded bin.
    """

    source_bins: int
    cut: int
    bins: int
    shift: int
    scale: float
    noise_seed: int
    kept: np.ndarray
    bands: np.ndarray
    spans: np.ndarray

    def mask(self) -> np.ndarray:
        """Return where the augmented trial holds recorded signal, [T'] bool."""
        mask = np.zeros(self.bins, dtype=bool)
        mask[max(self.shift, 0) : self.bins + min(self.shift, 0)] = True
        return mask


_WHOLE = 5
"""Columns of `Packed.whole` before the bands: source bins, cut, bins, shift, noise seed."""


@dataclass
class Packed:
    """Draws of B trials as tensors, few of them: each is a file where workers hand them on.

    Attributes:
        numbers: [B, 5 + 2F + 2M] whole numbers, which stay on the CPU: asking them waits for
            nothing.
        whole: the same as a tensor, int64.
        scale: [B] float32.
        kept: [B, C] bool.
        bands: F.
    """

    numbers: np.ndarray
    whole: Tensor
    scale: Tensor
    kept: Tensor
    bands: int

    @property
    def bins(self) -> int:
        """T' of the longest augmented trial."""
        return int(self.numbers[:, 2].max())

    def recorded(self) -> list[list[int]]:
        """First recorded bin, number of them, and noise seed of every augmented trial."""
        bins, shift, seed = self.numbers[:, 2:_WHOLE].T
        return np.stack([np.maximum(shift, 0), bins - np.abs(shift), seed], axis=1).tolist()

    def removed(self) -> list[list[list[int]]]:
        """First frequency and width of the removed bands of every trial."""
        bands = self.numbers[:, _WHOLE : _WHOLE + 2 * self.bands]
        return bands.reshape(len(bands), -1, 2).tolist()

    def with_channels(self, order: Sequence[int]) -> "Packed":
        """Return the draws for signals whose channels are in this order."""
        kept = self.kept[:, list(order)]
        return Packed(self.numbers, self.whole, self.scale, kept, self.bands)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Packed":
        """Return the draws with each tensor as ``function`` returns it."""
        whole, scale, kept = (function(each) for each in (self.whole, self.scale, self.kept))
        return Packed(self.numbers, whole, scale, kept, self.bands)


def pack(draws: Sequence[Draws]) -> Packed:
    """Put the draws of the trials of a batch together."""
    whole = [
        [
            *(each.source_bins, each.cut, each.bins, each.shift, each.noise_seed),
            *each.bands.ravel(),
            *each.spans.ravel(),
        ]
        for each in draws
    ]
    numbers = np.array(whole, dtype=np.int64)
    return Packed(
        numbers,
        torch.from_numpy(numbers.copy()),
        torch.tensor([each.scale for each in draws], dtype=torch.float32),
        torch.from_numpy(np.stack([each.kept for each in draws])),
        len(draws[0].bands),
    )


def augmented(signal: Tensor, draws: Packed, options: AugmentOptions) -> tuple[Tensor, Tensor]:
    """Augment signals as recorded.

    Args:
        signal: [B, T, C] float32, padded.
        draws: of the trials, on the device of ``signal``.
        options: that they were drawn by.

    Returns:
        Signal and target [B, T', C] float32, zero where no recorded signal is.
    """
    _, _, bins, shift, _ = draws.whole[:, :_WHOLE].T
    first, count = shift.clamp(min=0), bins - shift.abs()
    time = torch.arange(draws.bins, device=signal.device)
    mask = (time >= first[:, None]) & (time < (first + count)[:, None])
    target = _moved(signal, draws, time, options)
    target = torch.where(mask[..., None], target * draws.scale[:, None, None], 0.0)
    found = target + _noise(target, draws, options)
    if options.smoothing_bins:
        found = smooth_rows(found, first, count, options.smoothing_bins)
    found = found * draws.kept[:, None, :]
    _remove_bands(found, draws)
    spans = draws.whole[:, _WHOLE + 2 * draws.bands :]
    for place in range(0, spans.shape[1], 2):
        begins, width = first + spans[:, place], spans[:, place + 1]
        mask = mask & ~((time >= begins[:, None]) & (time < (begins + width)[:, None]))
    return torch.where(mask[..., None], found, 0.0), target


def _moved(signal: Tensor, draws: Packed, time: Tensor, options: AugmentOptions) -> Tensor:
    """Cut, stretch and shift: read every bin where it comes from, [B, T', C]."""
    source_bins, cut, bins, shift, _ = draws.whole[:, :_WHOLE].T
    rows = torch.arange(len(signal), device=signal.device)[:, None]
    moved = time - shift[:, None]
    last = (source_bins - 1)[:, None]
    if options.time_stretch == (1.0, 1.0):
        places = torch.minimum((cut[:, None] + moved).clamp(min=0), last)
        return signal[rows, places]
    ratio = (source_bins - cut - 1).double() / (bins - 1).clamp(min=1)
    exact = torch.minimum((cut[:, None] + moved * ratio[:, None]).clamp(min=0), last.double())
    below = exact.floor().long()
    between = (exact - below).float()[..., None]
    before, after = signal[rows, below], signal[rows, torch.minimum(below + 1, last)]
    return before + between * (after - before)


def _noise(target: Tensor, draws: Packed, options: AugmentOptions) -> Tensor | float:
    """Offsets, white noise and random walks, each row of a generator of its own."""
    if not (options.offset_std or options.noise_std or options.random_walk_std):
        return 0.0
    noise = torch.zeros_like(target)
    generator = Generator(target.device)
    channels = target.shape[2]
    for row, (start, bins, seed) in zip(noise, draws.recorded(), strict=True):
        generator.manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=target.device)

        stretch = row[start : start + bins]
        offset = normal(channels)
        if options.offset_std:
            stretch += options.offset_std * offset
        if options.noise_std:
            stretch += options.noise_std * normal(bins, channels)
        if options.random_walk_std:
            generator.manual_seed(seed + 1)  # the same walk with and without white noise
            stretch += options.random_walk_std * normal(bins, channels).cumsum(0)
    return noise


def _remove_bands(signal: Tensor, draws: Packed) -> None:
    """Remove bands from the spectra of rows, each over its own recorded bins."""
    remove = _transformed if signal.device.type == "cpu" else _projected
    for row, (start, bins, _), removed in zip(
        signal, draws.recorded(), draws.removed(), strict=True
    ):
        bands = [(low, low + width) for low, width in removed if width]
        if bands:
            # A copy: how libraries round may depend on where memory begins, and so on the batch.
            row[start : start + bins] = remove(row[start : start + bins].clone(), bands)


def _transformed(stretch: Tensor, bands: Sequence[tuple[int, int]]) -> Tensor:
    """Return [T, C] without the frequencies ``bands`` (first, end), in steps of its spectrum."""
    spectrum = torch.fft.rfft(stretch, dim=0)
    for first, end in bands:
        spectrum[first:end] = 0
    return torch.fft.irfft(spectrum, n=len(stretch), dim=0)


def _projected(stretch: Tensor, bands: Sequence[tuple[int, int]]) -> Tensor:
    """Do the same by what the cosines and sines of these frequencies explain.

    cuFFT plans a transform for each length that it has not met, and nearly all trials differ in
    length: eight of them took 560 ms on an H100. Bands are narrow.
    """
    bins = len(stretch)
    times = torch.arange(bins, device=stretch.device)
    for first, end in _merged(bands):
        frequencies = torch.arange(first, end, device=stretch.device)
        # Whole turns are taken off before anything is rounded.
        turns = (frequencies[:, None] * times % bins).double() / bins
        waves = torch.cat([(2 * torch.pi * turns).cos(), (2 * torch.pi * turns).sin()])
        waves *= (2 / bins) ** 0.5
        if 2 * (end - 1) == bins:  # the highest of an even number, whose sine is 0
            waves[end - first - 1] *= 0.5**0.5
        basis = waves.to(stretch.dtype)
        stretch = stretch.addmm(basis.T, basis @ stretch, alpha=-1)
    return stretch


def _merged(bands: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join bands (first, end) that overlap."""
    joined: list[tuple[int, int]] = []
    for first, end in sorted(bands):
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((first, end))
    return joined
