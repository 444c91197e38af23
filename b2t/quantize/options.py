"""Options of the residual quantizer; names follow vector-quantize-pytorch where meanings agree."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from b2t.options import Fraction, NonNegative, Options, Positive, PositiveInt, Rate

Revival = Literal["split", "frames"]
Course = Literal["cosine", "linear", "exponential"]


def default_decay(codebook_size: int) -> float:
    """Decay of the running averages: more codes see each code's frames less often."""
    return 0.95 if codebook_size < 256 else 0.98


class TemperatureOptions(Options):
    """Temperature of soft assignments over training or one phase, in units of the mean distance."""

    start: Positive = 2.0
    """At the first step."""
    end: Positive = 0.5
    """At the last step."""
    schedule: Course = "cosine"
    """Course between them."""


class QuantizerOptions(Options):
    """How latents become codes, how codes move, and how they stay in use."""

    num_quantizers: PositiveInt = 8
    """Layers Q."""
    codebook_size: int = Field(default=8192, ge=1)
    """Codes K of each layer."""
    codebook_dim: PositiveInt | None = None
    """Width of a code; narrower than the latent adds projections, null means the latent's width."""
    update_rule: Literal["ema", "gradient"] = "ema"
    """How codes move: averages of their frames, or a codebook loss through the optimizer."""
    joint_update: bool = False
    """Codes move to what fits with those of all other layers, not of the layers before alone."""
    decay: Rate | None = None
    """Decay of the running averages, per update; null means 0.95 below 256 codes, else 0.98."""
    eps: NonNegative = 1e-5
    """Pseudo-frames added to the average count of each code (Laplace smoothing)."""
    codebook_gradient_scale: Positive = 10.0
    """Factor on every gradient into the codebooks (gradient rule)."""
    use_cosine_sim: bool = False
    """Nearest by angle instead of distance."""
    rotation_trick: bool = False
    """Gradient to the encoder by rotation of the whole quantized sum; false: straight through."""
    quantize_dropout: bool = False
    """Train with a random number of the first layers, the same on all ranks."""
    quantize_dropout_cutoff_index: int = Field(default=0, ge=0)
    """Index of the last layer that is never dropped."""
    shared_codebook: bool = False
    """One codebook for all layers."""
    kmeans_init: bool = True
    """Start by k-means++ on latents; false starts from uniform random codes at once."""
    kmeans_iters: int = Field(default=10, ge=0)
    """Lloyd steps of the start."""
    revival: Revival | None = "split"
    """Replace codes that fall out of use: split crowded ones (true means this), or place them on
    frames; null or false: never. A phase can switch it off."""
    revival_threshold: NonNegative = 0.1
    """A code is dead below this fraction of uniform use."""
    revival_every: PositiveInt = 5
    """Applied steps between revivals."""
    revival_max_share: Fraction = 0.1
    """Greatest part of a codebook revived in one update."""
    revival_until: Fraction = 0.9
    """Part of training after which nothing is revived."""
    half_width_sums: bool = False
    """Send what codes move to in bfloat16 from rank to rank: half the bytes, and an error of each
    element of at most 1/127 of the magnitudes added. For codebooks of many codes times width."""
    stochastic_sample_codes: bool = False
    """Sample codes in training at the current temperature (Gumbel) instead of the nearest."""
    beam_size: PositiveInt = 1
    """Sums of codes kept from layer to layer in training; 1: the nearest code of each layer."""
    eval_beam_size: PositiveInt | None = None
    """The same in evaluation, null means `beam_size`; more: better signals, slower encoding."""

    @field_validator("revival", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {True: "split", False: None}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _consistent(self) -> "QuantizerOptions":
        if self.beam_size > 1 and self.stochastic_sample_codes:
            raise ValueError(
                f"beam_size is {self.beam_size} and stochastic_sample_codes is on; a beam draws "
                "nothing: switch one of them off (eval_beam_size may stay)"
            )
        if self.joint_update and self.use_cosine_sim:
            raise ValueError(
                "joint_update is on and so is use_cosine_sim, whose codes are directions and "
                "cannot move to sums: switch one of them off"
            )
        if self.quantize_dropout_cutoff_index >= self.num_quantizers:
            raise ValueError(
                f"quantize_dropout_cutoff_index is {self.quantize_dropout_cutoff_index}, expected "
                f"one of the {self.num_quantizers} layers, 0 to {self.num_quantizers - 1}"
            )
        return self

    @property
    def averaging_decay(self) -> float:
        """`decay`, or the one that suits the number of codes."""
        return default_decay(self.codebook_size) if self.decay is None else self.decay


class ResidualVQOptions(QuantizerOptions):
    """`QuantizerOptions` with the course of the temperature, which a run gives in its own section.

    Soft assignments are softmax(−‖r−c‖²/(τ·mean)), the mean being that of a frame's squared
    distance to its code.
    """

    temperature: Positive = TemperatureOptions().start
    """τ at the start of training."""
    temperature_end: Positive = TemperatureOptions().end
    """τ at its end."""
    temperature_schedule: Course = TemperatureOptions().schedule
    """Course between them."""
