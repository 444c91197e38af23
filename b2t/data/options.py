"""Options of the data that a configuration chooses."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from b2t.options import NonNegative, Options, Positive, Rate


class AugmentOptions(Options):
    """Augmentation of training signals; validation and test signals are never augmented."""

    enabled: bool = True
    """Switch for all of it."""
    time_shift_ms: NonNegative = 100.0
    """Largest shift of the signal in time, either way, in milliseconds."""
    channel_dropout: Rate = 0.10
    """Probability of silencing each channel for a whole trial."""
    noise_std: NonNegative = 0.01
    """Standard deviation of white noise, in units of the z-scored signal."""
    scale: tuple[Positive, Positive] = (0.9, 1.1)
    """Range of the factor that multiplies a whole trial."""
    time_masks: Annotated[int, Field(ge=0)] = 2
    """Number of spans of time set to zero."""
    time_mask_fraction: Rate = 0.05
    """Longest span of one time mask, as a fraction of the trial."""
    frequency_masks: Annotated[int, Field(ge=0)] = 1
    """Number of bands removed from the spectrum along time."""
    frequency_mask_fraction: Rate = 0.05
    """Widest removed band, as a fraction of 0 Hz to Nyquist."""
    offset_std: NonNegative = 0.0
    """Standard deviation of a constant offset per channel and trial."""
    smoothing_bins: NonNegative = 0.0
    """Standard deviation of Gaussian smoothing along time, in bins (0 = none)."""

    @model_validator(mode="after")
    def _ordered(self) -> AugmentOptions:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale must be [low, high], found {list(self.scale)}")
        return self
