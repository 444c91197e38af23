"""What the model returns."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from transformers.utils import ModelOutput

from b2t.quantize import QuantizerStats


class Encoded(NamedTuple):
    """What the first half of the model makes of a signal."""

    latents: Tensor
    """[B, P, D], zero under the mask."""
    quantized: Tensor
    """[B, P, D]; the latents themselves in a model without a quantizer."""
    codes: Tensor | None
    """[B, P, Q] int64, −1 under the mask; None without a quantizer."""
    frame_mask: Tensor
    """[B, P] bool, True = real."""
    losses: dict[str, Tensor]
    """Losses of the quantizer that were asked for."""
    stats: QuantizerStats | None
    """What the codebook update needs; None without a quantizer."""


class Scored(NamedTuple):
    """What a decoder makes of a batch, against its labels."""

    output: Tensor
    """A signal, or logits."""
    total: Tensor
    """0-d, its summed loss, differentiable."""
    metrics: dict[str, Tensor]
    """Detached sums that can be added over batches."""


@dataclass
class BrainToTextOutput(ModelOutput):
    """Result of `BrainToText.forward`.

    Attributes:
        loss: weighted sum of `losses`, 0-d float32.
        losses: unweighted losses by name, those of weight 0 left out.
        reconstruction: [B, T, C] float32, None where its weight is 0.
        latents: [B, P, D].
        quantized: [B, P, D].
        codes: [B, P, Q] int64, −1 under the mask; None without a quantizer.
        frame_mask: [B, P] bool.
        phoneme_logits: [B, P, 41], None where its weight is 0.
        text_logits: [B, L, V], None where its weight is 0.
        stats: `QuantizerStats`, None without a quantizer.
        metrics: detached sums that can be added over batches: `squared_error` and `signal_power`
            over `bins` elements (SNR in dB is 10·log10(signal_power / squared_error)),
            `tokens_correct` of `tokens` under teacher forcing, `phoneme_rows` and
            `phoneme_rows_too_short`, `frames`.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    reconstruction: Tensor | None = None
    latents: Tensor | None = None
    quantized: Tensor | None = None
    codes: Tensor | None = None
    frame_mask: Tensor | None = None
    phoneme_logits: Tensor | None = None
    text_logits: Tensor | None = None
    stats: QuantizerStats | None = None
    metrics: dict[str, Tensor] | None = None
