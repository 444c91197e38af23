"""The sections of the model: one per component, of the options that it owns."""

from __future__ import annotations

from pydantic import field_validator

from b2t.model.options import (
    AdapterOptions,
    CheckpointingOptions,
    EncoderOptions,
    PhonemeHeadOptions,
    SignalDecoderOptions,
    TextDecoderOptions,
)
from b2t.options import Options
from b2t.quantize.options import QuantizerOptions


class QuantizerConfig(QuantizerOptions):
    """The residual vector quantizer, or none."""

    enabled: bool = True
    """False trains the same model without a quantizer, the yardstick for its cost in SNR."""

    @field_validator("codebook_size")
    @classmethod
    def _has_a_choice(cls, value: int) -> int:
        if value < 2:
            raise ValueError("expected at least 2 codes: one code says nothing of a signal")
        return value


class ModelConfig(Options):
    """The sections of `BrainToText`."""

    init_from: str | None = None
    """Run folder or saved model to start from; what does not fit starts anew and is listed."""
    adapter: AdapterOptions = AdapterOptions()
    """Per-session affine map."""
    encoder: EncoderOptions = EncoderOptions()
    """Signal to latents."""
    quantizer: QuantizerConfig = QuantizerConfig()
    """Latents to codes."""
    signal_decoder: SignalDecoderOptions = SignalDecoderOptions()
    """Codes to signal."""
    phoneme_head: PhonemeHeadOptions = PhonemeHeadOptions()
    """Codes to phonemes."""
    text_decoder: TextDecoderOptions = TextDecoderOptions()
    """Codes to text."""
    activation_checkpointing: CheckpointingOptions = CheckpointingOptions()
    """Recompute activations in backward to save memory."""
    compile_blocks: bool = False
    """Run the blocks of encoder and signal decoder through `torch.compile` in training: fewer and
    larger GPU kernels after some minutes of compiling at most; not under ZeRO-3."""
    pack_frames: bool = False
    """Train the transformers of encoder and signal decoder on real frames alone, by flash attention
    of rows of several lengths (a GPU, 16 bit, torch 2.10): no GPU has tried it yet."""
