"""Random changes to a trial's signal, a function of the seed and the row's name alone.

What happens to a row is drawn where it is read (`Augment.draw`); signals change where they are
trained on, a batch at a time (`b2t.data.augment_batch`).
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from b2t.data.augment_batch import Draws, augmented, pack
from b2t.data.options import AugmentOptions
from b2t.smoothing import smooth


class Augmented(NamedTuple):
    """One augmented trial.

    ``signal`` [T, C] float32 is what the encoder reads, ``target`` [T, C] float32 what the signal
    decoder must give back, ``mask`` [T] bool is True where a bin holds recorded signal. Signal and
    target are zero where the mask is False.
    """

    signal: np.ndarray
    target: np.ndarray
    mask: np.ndarray


def row_generator(seed: int, phase: int, epoch: int, row: str) -> np.random.Generator:
    """Return the random generator of one row, the same on any rank, worker and world size."""
    digest = hashlib.blake2b(row.encode(), digest_size=16).digest()
    words = [int(word) for word in np.frombuffer(digest, dtype="<u4")]
    return np.random.default_rng([seed, phase, epoch, *words])


class AugmentCourse:
    """Augmentation whose options change from step to step of a phase.

    Args:
        options_at: options of each step, smoothing in bins.
    """

    def __init__(self, options_at: Callable[[int], AugmentOptions]) -> None:
        self._options_at = options_at
        self._known: tuple[int, Augment] | None = None

    def at(self, step: int) -> "Augment":
        """Return the augmentation of a step, counted in global batches from the phase's start."""
        if self._known is None or self._known[0] != step:
            self._known = step, Augment(**self._options_at(step).model_dump())
        return self._known[1]


class Augment(AugmentOptions):
    """Augmentation of one trial, as its options say.

    A shift moves the signal in time; the bins that it leaves are zero and masked. A cut leaves out
    the beginning, a stretch reads the rest slower or faster. Of dropped channels and arrays one
    always stays. Smoothing belongs to the input, not to chance: evaluation applies it too, and it
    is what stays where augmentation is off.
    """

    def __call__(
        self, signal: np.ndarray, sampling_rate: float, generator: np.random.Generator
    ) -> Augmented:
        """Augment ``signal`` [T, C], sampled at ``sampling_rate`` Hz.

        The target is taken after cut, stretch, shift and scale, before offset, noise, smoothing
        and masks.
        """
        if not self.enabled:
            return self.evaluation(signal)
        draws = self.draw(signal.shape, sampling_rate, generator)
        rows = torch.from_numpy(np.array(signal, dtype=np.float32))[None]
        found, target = augmented(rows, pack([draws]), self)
        return Augmented(found[0].numpy(), target[0].numpy(), draws.mask())

    def evaluation(self, signal: np.ndarray) -> Augmented:
        """Prepare ``signal`` [T, C] without chance: smoothing only, or not even a copy."""
        target = np.asarray(signal, dtype=np.float32)
        smoothed = smooth(target, self.smoothing_bins) if self.smoothing_bins else target
        return Augmented(smoothed, target, np.ones(len(target), dtype=bool))

    def at(self, step: int) -> "Augment":
        """Return itself: the same in all steps, see `AugmentCourse`."""
        return self

    def draw(
        self, shape: tuple[int, ...], sampling_rate: float, generator: np.random.Generator
    ) -> Draws:
        """Draw what happens to a trial of ``shape`` T, C at ``sampling_rate`` Hz.

        Numbers are drawn in one order whatever the options, so that switching one augmentation on
        or off leaves the others as they were.
        """
        bins, channels = shape
        chance = generator.random(5)
        cut = int(chance[0] * (self._bins(self.random_cut_ms, sampling_rate, bins - 1) + 1))
        low, high = self.time_stretch
        stretched = max(1, round((bins - cut) * (low + chance[1] * (high - low))))
        furthest = self._bins(self.time_shift_ms, sampling_rate, stretched - 1)
        shift = int(chance[2] * (2 * furthest + 1)) - furthest
        recorded = stretched - abs(shift)
        spectrum = recorded // 2
        return Draws(
            source_bins=bins,
            cut=cut,
            bins=stretched,
            shift=shift,
            scale=float(self.scale[0] + chance[3] * (self.scale[1] - self.scale[0])),
            noise_seed=int(chance[4] * 2**53),
            kept=self._kept(channels, generator),
            bands=_spans(
                generator, self.frequency_masks, self.frequency_mask_fraction, spectrum, 1
            ),
            spans=_spans(generator, self.time_masks, self.time_mask_fraction, recorded, 0),
        )

    def mixed(self, session: int, sessions: int, generator: np.random.Generator) -> int:
        """Draw the session whose map a trial goes through, its own or another of ``sessions``."""
        chance = generator.random(2)
        if session < 0 or sessions < 2 or chance[0] >= self.session_mixing:
            return session
        return (session + 1 + int(chance[1] * (sessions - 1))) % sessions

    @staticmethod
    def _bins(milliseconds: float, sampling_rate: float, most: int) -> int:
        return min(round(milliseconds * sampling_rate / 1000), most)

    def _kept(self, channels: int, generator: np.random.Generator) -> np.ndarray:
        chance = generator.random(channels)
        kept = chance >= self.channel_dropout
        kept[np.argmax(chance)] = True
        arrays = self.arrays_of(channels)
        chance = generator.random(arrays.max() + 1)
        lost = chance < self.array_dropout
        lost[np.argmax(chance)] = False
        both = kept & ~lost[arrays]
        if not both.any():
            both[np.flatnonzero(~lost[arrays])[0]] = True
        return both

    def arrays_of(self, channels: int) -> np.ndarray:
        """Return the electrode array [C] of every channel."""
        electrodes = max(1, channels // self.array_features)
        return np.arange(channels) % electrodes // self.array_size


def _spans(
    generator: np.random.Generator, count: int, fraction: float, length: int, first: int
) -> np.ndarray:
    """Draw ``count`` spans [count, 2] (start, width) within [first, first + length)."""
    widest = int(fraction * length)
    chance = generator.random((count, 2))
    widths = (chance[:, 0] * (widest + 1)).astype(np.int64)
    starts = first + (chance[:, 1] * (length - widths + 1)).astype(np.int64)
    return np.stack([starts, widths], axis=1)
