"""Phases of training: what trains, on which losses, how fast, for how long."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from b2t.data.masking import MaskingOptions
from b2t.model.objectives import COMPONENTS, Component, LossWeights
from b2t.options import Fraction, NonNegative, Options, Positive, PositiveInt
from b2t.quantize.options import TemperatureOptions

Schedule = Literal["cosine", "linear", "constant"]


class EarlyStoppingConfig(Options):
    """End a phase when a validation metric stops improving; the next phase then begins."""

    metric: str = "val/loss"
    """Name of the metric as in metrics.jsonl."""
    mode: Literal["min", "max"] = "min"
    """Whether less or more is better."""
    patience: PositiveInt = 5
    """Evaluations without improvement before the phase ends."""
    min_delta: NonNegative = 0.0
    """Smallest change that counts as an improvement."""
    restore_best: bool = True
    """Go on with the weights of the best evaluation, not with the last ones; each improvement
    writes a checkpoint, and that of the best stays until the phase ends."""


class PhaseConfig(Options):
    """One phase: what trains, on which losses, how fast, for how long."""

    name: str
    """Unique name, used in logs and checkpoints."""
    steps: PositiveInt
    """Applied optimizer steps; skipped ones do not count. With `minutes`: at most so many."""
    minutes: Positive | None = None
    """Time after which the phase ends, validations included; the learning rate then follows the
    time. A run with it is not repeated bit for bit; null counts steps alone."""
    minutes_of: Literal["wall", "processor"] = "wall"
    """Whose time `minutes` counts: the clock's, or the processor time of a rank's process (without
    its loader processes), which other work on the machine does not use up."""
    trainable: list[Component] = Field(default=list(COMPONENTS))
    """Components that train; the others are frozen, exactly, and have no optimizer state."""
    losses: LossWeights = LossWeights()
    """Weights of the total loss."""
    masking: MaskingOptions = MaskingOptions()
    """What is hidden of each trial where `losses.masked` is above 0."""
    augment: dict[str, Any] = Field(default={})
    """Keys of `data.augment` that are otherwise in this phase, such as {noise_std: 0.5}; a ramp
    {from: 0.0, to: 1.0, steps: 2000} (or share: 0.5 of the phase, or all of it) changes with the
    batches that the phase has taken."""
    text_from: Literal["signals", "labels", "texts"] = "signals"
    """What text is learnt from by a text decoder that reads phonemes (`text_decoder.memory`): those
    heard in signals; those of the trials' labels, without encoding a signal where text is all that
    is learnt; or sentences alone, of the training trials and of `data.texts`, the latter pronounced
    by the CMU dictionary."""
    phrase_words: PositiveInt | None = None
    """With `text_from: texts`: learn phrases of 1 to so many words, another of each sentence in
    each epoch. Which word is which sound is found far sooner in them; null takes sentences."""
    lr: Positive = 3e-4
    """Peak learning rate."""
    lr_scale: dict[Component, NonNegative] = Field(default={})
    """Factor on `lr` for single components."""
    warmup_steps: Annotated[int, Field(ge=0)] = 2000
    """Applied steps of linear warm-up from 0 to the peak; a tenth of the phase where it is shorter
    than them."""
    schedule: Schedule = "cosine"
    """Course of the learning rate after warm-up."""
    component_schedule: dict[Component, Schedule] | None = None
    """Another course for single components."""
    component_warmup_steps: dict[Component, Annotated[int, Field(ge=0)]] | None = None
    """Another warm-up for single components."""
    min_lr_fraction: Fraction = 0.1
    """Where the decay ends, as a fraction of `lr`."""
    revival: bool = True
    """Whether dead codes are revived."""
    exact_regularizers: bool = True
    """With accumulation, diversity and perplexity of the whole step, for one more encoder pass
    without gradient; false takes them over each micro-batch."""
    early_stopping: EarlyStoppingConfig | None = None
    """Rule that ends the phase before its last step."""
    temperature: TemperatureOptions | None = None
    """Range of the temperature within this phase; null follows `temperature` over the training."""
    evaluate_every: PositiveInt | None = None
    """Applied steps between validations in this phase; null means `evaluation.every`."""
    decode_trials: Annotated[int, Field(ge=0)] | None = None
    """Trials decoded freely after this phase; null means `evaluation.decode_trials`."""

    @field_validator("losses")
    @classmethod
    def _something_is_learnt(cls, value: LossWeights) -> LossWeights:
        if not any(value.model_dump().values()):
            raise ValueError("all weights are 0: a phase must have at least one loss")
        return value

    @field_validator("trainable")
    @classmethod
    def _something_trains(cls, value: list[str]) -> list[str]:
        if not value:
            raise ValueError("a phase must train at least one component")
        return value


def default_phases() -> list[PhaseConfig]:
    """The three phases of the house: tokenizer, codebook, everything."""
    tokenizer: list[Component] = [
        "adapter",
        "encoder",
        "quantizer",
        "signal_decoder",
        "phoneme_head",
    ]
    return [
        PhaseConfig(
            name="tokenizer",
            steps=10_000,
            trainable=tokenizer,
            losses=LossWeights(
                generation=0.0, reconstruction=1.0, commitment=0.2, diversity=0.1, perplexity=0.05
            ),
        ),
        PhaseConfig(
            name="codebook",
            steps=5_000,
            trainable=["quantizer", "signal_decoder", "phoneme_head", "text_decoder"],
            losses=LossWeights(
                generation=1.0, reconstruction=0.5, commitment=0.2, diversity=0.5, perplexity=0.25
            ),
            warmup_steps=500,
        ),
        PhaseConfig(name="joint", steps=20_000),
    ]
