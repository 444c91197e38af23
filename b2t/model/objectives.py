"""The losses and the parts of the model that compute them, in one table; knows no tensors."""

from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple, get_args

from b2t.options import NonNegative, Options

Component = Literal[
    "adapter", "encoder", "quantizer", "signal_decoder", "phoneme_head", "text_decoder"
]
COMPONENTS: tuple[Component, ...] = get_args(Component)
"""Attribute names of the parts of `BrainToText`, which a phase can train or freeze; a part that was
not built is None."""

Count = Literal["bins", "frames", "tokens", "phonemes", "hidden"]
"""Elements that losses are divided by: recorded bins times channels, latent frames, text tokens,
phonemes, hidden bins times channels."""
COUNTS: tuple[Count, ...] = get_args(Count)


class Objective(NamedTuple):
    """What is to be known of a loss beside its weight."""

    component: Component
    """What computes it; it reaches all that comes before."""
    per: Count | None
    """What its sum is divided by; None for those of the mean soft assignment, which no count
    normalises."""
    short: str
    """Its name in a line of the log."""


class LossWeights(Options):
    """Weights of the total loss; 0 leaves a loss out and its computation too."""

    generation: Annotated[NonNegative, Objective("text_decoder", "tokens", "gen")] = 1.0
    """Cross entropy of the text."""
    reconstruction: Annotated[NonNegative, Objective("signal_decoder", "bins", "rec")] = 0.5
    """Squared error of the signal."""
    commitment: Annotated[NonNegative, Objective("quantizer", "frames", "commit")] = 0.2
    """Distance of latents to their codes."""
    diversity: Annotated[NonNegative, Objective("quantizer", None, "div")] = 0.1
    """KL of the mean soft assignment to uniform."""
    perplexity: Annotated[NonNegative, Objective("quantizer", None, "perp")] = 0.05
    """1 − exp(H)/K of the mean soft assignment."""
    phoneme: Annotated[NonNegative, Objective("phoneme_head", "phonemes", "phon")] = 0.3
    """CTC on phonemes, where there are any."""
    masked: Annotated[NonNegative, Objective("signal_decoder", "hidden", "mask")] = 0.0
    """Squared error of patches that are hidden from the encoder (`masking`), past the quantizer:
    what can be learnt of recordings without labels."""


DEFAULT_WEIGHTS: Mapping[str, float] = LossWeights().model_dump()
"""Weights of the total loss where a call brings none."""

WEIGHTED: Mapping[str, Objective] = {
    name: next(item for item in field.metadata if isinstance(item, Objective))
    for name, field in LossWeights.model_fields.items()
}
"""The losses that a phase gives weights."""

OBJECTIVES: Mapping[str, Objective] = {
    **WEIGHTED,
    "codebook": Objective("quantizer", "frames", "code"),
}
"""All losses that a total can hold: the quantizer's gradient rule adds one, of weight 1."""
