"""Options of the data that a configuration chooses."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from b2t.options import NonNegative, Options, Positive, PositiveInt, Rate


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
    random_walk_std: NonNegative = 0.0
    """Standard deviation of one step of a random walk along time, per channel."""
    random_cut_ms: NonNegative = 0.0
    """Longest stretch left out at the beginning of a trial, in milliseconds."""
    time_stretch: tuple[Positive, Positive] = (1.0, 1.0)
    """Range of the factor by which a trial lasts longer."""
    array_dropout: Rate = 0.0
    """Probability of silencing each electrode array for a whole trial; one always stays."""
    array_size: PositiveInt = 64
    """Channels of one array, side by side (T15: 64)."""
    array_features: PositiveInt = 1
    """Features of each electrode, one after the other over all electrodes (T15: 2, crossings then
    power)."""
    session_mixing: Rate = 0.0
    """Probability that a trial goes through the map of another session, drawn at random: maps that
    are good for their neighbours suit sessions which nobody trained on."""
    offset_std: NonNegative = 0.0
    """Standard deviation of a constant offset per channel and trial."""
    smoothing_bins: NonNegative = 0.0
    """Standard deviation of Gaussian smoothing along time, in bins (0 = none)."""
    smoothing_ms: NonNegative = 0.0
    """The same in milliseconds; evaluation and streams smooth as training does."""

    @model_validator(mode="after")
    def _ordered(self) -> AugmentOptions:
        for name in ("scale", "time_stretch"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be [low, high], found {[low, high]}")
        if self.smoothing_bins and self.smoothing_ms:
            raise ValueError("smoothing_bins and smoothing_ms say the same: give one of them")
        return self

    def at_rate(self, sampling_rate: float) -> AugmentOptions:
        """Return the same options with smoothing in bins of ``sampling_rate`` Hz."""
        if not self.smoothing_ms:
            return self
        bins = self.smoothing_ms * sampling_rate / 1000
        return AugmentOptions(**{**self.model_dump(), "smoothing_ms": 0.0, "smoothing_bins": bins})
