"""Bad channels, reference and filters: the same chain for recordings and for bins as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import scipy  # its parts load as they are met: `scipy.signal` takes a second
from pydantic import Field, model_validator

from b2t.errors import UserError
from b2t.options import Options, Positive

_ORDER = 4
"""Of the Butterworth filters (MNE's IIR default)."""
_NOTCH_QUALITY = 30.0
"""Centre frequency of a notch over its width at −3 dB."""
_PERIODS = 3.0
"""Periods of the lowest corner after which what a filter still remembers is below 1e-3."""


class ProcessingOptions(Options):
    """What is done to signals before they are z-scored, in this order."""

    bad_channels: list[str] = Field(default=[])
    """Channels that are set to 0, and left out of the average reference."""
    reference: Literal["recorded", "average"] = "recorded"
    """`average` subtracts the mean over all good channels from each of them, at each sample."""
    band_pass: tuple[Positive | None, Positive | None] = (None, None)
    """Corners in Hz below and above which a Butterworth filter of order 4 takes away; null for
    none."""
    notch: list[Positive] = Field(default=[])
    """Frequencies in Hz that are taken out, such as 50 or 60 and their multiples."""
    causal: bool = False
    """Filter forwards alone, as it can be done while bins come; otherwise forwards and backwards,
    which shifts no phase."""

    @model_validator(mode="after")
    def _ordered(self) -> ProcessingOptions:
        low, high = self.band_pass
        if low is not None and high is not None and low >= high:
            raise ValueError(f"band_pass must be [low, high], found {[low, high]}")
        return self

    @property
    def does_something(self) -> bool:
        """Whether signals are changed at all."""
        return self != ProcessingOptions(causal=self.causal)

    @property
    def filters_time(self) -> bool:
        """Whether a sample depends on its neighbours."""
        return bool(self.notch) or self.band_pass != (None, None)

    def told(self) -> str:
        """Say in a few words what is done."""
        low, high = self.band_pass
        parts = [
            f"{len(self.bad_channels)} bad channels" if self.bad_channels else "",
            "average reference" if self.reference == "average" else "",
            f"{low or 0:g}–{high:g} Hz" if high is not None else "",
            f"above {low:g} Hz" if high is None and low is not None else "",
            f"without {', '.join(f'{each:g}' for each in self.notch)} Hz" if self.notch else "",
            "causal" if self.causal and self.filters_time else "",
        ]
        return ", ".join(part for part in parts if part) or "as recorded"


class Processing:
    """The chain that options describe, for channels of one sampling rate.

    Args:
        options: what is done.
        channels: C names.
        sampling_rate: in Hz.
        absent: channels that a recording lacks: like bad ones, they are no part of a reference.

    Raises:
        UserError: a corner that the sampling rate cannot hold.
    """

    def __init__(
        self,
        options: ProcessingOptions,
        channels: Sequence[str],
        sampling_rate: float,
        absent: Sequence[str] = (),
    ) -> None:
        self.options = options
        self.sampling_rate = sampling_rate
        silent = {*options.bad_channels, *absent}
        self.good = np.array([name not in silent for name in channels], dtype=bool)
        if not self.good.any():
            raise UserError("all channels are bad: nothing would be left; name fewer of them")
        if options.reference == "average" and self.good.sum() < 2:
            raise UserError(
                "--reference average: the mean of one good channel is that channel, and nothing "
                "would be left; take --reference recorded"
            )
        self.sections = _sections(options, sampling_rate)

    @property
    def context_s(self) -> float:
        """Seconds on either side of a stretch that its filtering depends on."""
        if not len(self.sections):
            return 0.0
        low = self.options.band_pass[0]
        notches = [each / _NOTCH_QUALITY for each in self.options.notch]
        slowest = min([low or np.inf, *notches, self.options.band_pass[1] or np.inf])
        return float(_PERIODS / slowest)

    def __call__(self, signal: np.ndarray) -> np.ndarray:
        """Process ``signal`` [T, C] whole; float64 where it is filtered along time."""
        signal = self._across(signal)
        if not len(self.sections):
            return signal
        signal = np.asarray(signal, np.float64)
        if self.options.causal:
            return scipy.signal.sosfilt(self.sections, signal, axis=0, zi=self._at_rest(signal[0]))[
                0
            ]
        longest = 3 * (2 * len(self.sections) + 1)  # scipy's own default
        return scipy.signal.sosfiltfilt(
            self.sections, signal, axis=0, padlen=min(longest, len(signal) - 1)
        )

    def stream(self) -> ProcessingStream:
        """Return the same chain for bins as they come.

        Raises:
            UserError: filters that need what follows.
        """
        return ProcessingStream(self)

    def _across(self, signal: np.ndarray) -> np.ndarray:
        if self.options.reference == "average":
            mean = signal[:, self.good].mean(axis=1, keepdims=True, dtype=np.float64)
            return np.where(self.good, signal - mean, 0.0)
        return signal if self.good.all() else np.where(self.good, signal, signal.dtype.type(0))

    def _at_rest(self, first: np.ndarray) -> np.ndarray:
        """State of the filters had the first sample lasted for ever, [sections, 2, C]."""
        return scipy.signal.sosfilt_zi(self.sections)[:, :, None] * first


class ProcessingStream:
    """`Processing` on bins as they come: together what the whole gives at once."""

    def __init__(self, whole: Processing) -> None:
        if len(whole.sections) and not whole.options.causal:
            raise UserError(
                f"the training signals were filtered forwards and backwards "
                f"({whole.options.told()}), which needs what follows: prepare them with --causal "
                "to train a model that filters as bins come"
            )
        self._whole = whole
        self._state: np.ndarray | None = None

    def push(self, bins: np.ndarray) -> np.ndarray:
        """Process the next bins [n, C]."""
        bins = self._whole._across(bins)
        if not len(self._whole.sections) or not len(bins):
            return bins
        bins = np.asarray(bins, np.float64)
        if self._state is None:
            self._state = self._whole._at_rest(bins[0])
        found, self._state = scipy.signal.sosfilt(
            self._whole.sections, bins, axis=0, zi=self._state
        )
        return found


def _sections(options: ProcessingOptions, rate: float) -> np.ndarray:
    """Return the second-order sections [sections, 6] of all filters."""
    low, high = options.band_pass
    for name, corner in (("--band-pass", low), ("--band-pass", high), *(
        ("--notch", each) for each in options.notch
    )):  # fmt: skip
        if corner is not None and corner >= rate / 2:
            raise UserError(
                f"{name} {corner:g}: at {rate:g} Hz signals hold frequencies below {rate / 2:g} "
                "Hz; choose a lower one, or resample less"
            )
    parts = []
    if low is not None or high is not None:
        kind = "bandpass" if low and high else "highpass" if low else "lowpass"
        corners = [each for each in (low, high) if each is not None]
        found = corners if len(corners) == 2 else corners[0]
        parts.append(scipy.signal.butter(_ORDER, found, kind, fs=rate, output="sos"))
    parts += [
        scipy.signal.tf2sos(*scipy.signal.iirnotch(f, _NOTCH_QUALITY, fs=rate))
        for f in options.notch
    ]
    return np.concatenate(parts) if parts else np.zeros((0, 6))
