"""Random changes to a trial's signal, a function of the seed and the row's name alone."""

import hashlib
from typing import NamedTuple

import numpy as np
from scipy import fft

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


class Augment(AugmentOptions):
    """Augmentation of one trial, as its options say.

    A shift moves the signal in time; the bins that it leaves are zero and masked. Of dropped
    channels one always stays. Smoothing belongs to the input, not to chance: evaluation applies it
    too, and it is what stays where augmentation is off.
    """

    def __call__(
        self, signal: np.ndarray, sampling_rate: float, generator: np.random.Generator
    ) -> Augmented:
        """Augment ``signal`` [T, C], sampled at ``sampling_rate`` Hz.

        The target is taken after shift and scale, before offset, noise, smoothing and masks.
        """
        if not self.enabled:
            return self.evaluation(signal)
        target, mask = self._shift(signal, sampling_rate, generator)
        target *= np.float32(generator.uniform(*self.scale))
        valid = self._disturb(target[mask], generator)
        valid = self._drop_channels(smooth(valid, self.smoothing_bins), generator)
        valid = self._mask_frequencies(valid, generator)
        valid = self._mask_time(valid, generator)
        augmented = np.zeros_like(target)
        augmented[mask] = valid
        return Augmented(augmented, target, mask)

    def evaluation(self, signal: np.ndarray) -> Augmented:
        """Prepare ``signal`` [T, C] without chance: smoothing only."""
        target = np.array(signal, dtype=np.float32)
        return Augmented(
            smooth(target, self.smoothing_bins), target, np.ones(len(target), dtype=bool)
        )

    def _shift(
        self, signal: np.ndarray, sampling_rate: float, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        bins = len(signal)
        furthest = min(round(self.time_shift_ms * sampling_rate / 1000), bins - 1)
        by = int(generator.integers(-furthest, furthest + 1))
        shifted = np.zeros(signal.shape, dtype=np.float32)
        mask = np.zeros(bins, dtype=bool)
        destination = slice(max(by, 0), bins + min(by, 0))
        shifted[destination] = signal[max(-by, 0) : bins + min(-by, 0)]
        mask[destination] = True
        return shifted, mask

    def _disturb(self, signal: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        channels = signal.shape[1]
        if self.offset_std:
            signal = signal + np.float32(self.offset_std) * generator.standard_normal(
                channels, dtype=np.float32
            )
        if self.noise_std:
            signal = signal + np.float32(self.noise_std) * generator.standard_normal(
                signal.shape, dtype=np.float32
            )
        return signal

    def _drop_channels(self, signal: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        chance = generator.random(signal.shape[1:])
        kept = chance >= self.channel_dropout
        kept[np.argmax(chance)] = True
        return signal * kept.astype(np.float32)

    def _mask_frequencies(self, signal: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        highest = len(signal) // 2
        widest = int(self.frequency_mask_fraction * highest)
        if not self.frequency_masks or not widest:
            return signal
        spectrum = fft.rfft(signal, axis=0)
        for _ in range(self.frequency_masks):
            width = int(generator.integers(0, widest + 1))
            first = int(generator.integers(1, highest - width + 2))
            spectrum[first : first + width] = 0
        return fft.irfft(spectrum, n=len(signal), axis=0).astype(np.float32)

    def _mask_time(self, signal: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        longest = int(self.time_mask_fraction * len(signal))
        signal = np.array(signal)
        for _ in range(self.time_masks if longest else 0):
            width = int(generator.integers(0, longest + 1))
            first = int(generator.integers(0, len(signal) - width + 1))
            signal[first : first + width] = 0
        return signal
