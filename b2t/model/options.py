"""Options of the model's components, one class each; the quantizer has its own in b2t.quantize."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from b2t.options import Options, Positive, PositiveInt, Rate


class AdapterOptions(Options):
    """Per-session affine map of the channels, identity at the start."""

    enabled: bool = True
    """Without it all sessions share the raw channels."""
    softsign: bool = False
    """Bound the adapted signal with x / (1 + |x|)."""
    dropout: Rate = 0.0
    """Dropout on the adapted signal."""


class EncoderOptions(Options):
    """Patches of the signal to latent frames."""

    kind: Literal["transformer", "conv", "gru"] = "transformer"
    """Pre-norm transformer with rotary positions, gated depthwise convolutions, or a GRU."""
    patch_size: PositiveInt = 4
    """Bins per patch."""
    patch_stride: PositiveInt = 4
    """Bins from one patch to the next, at most `patch_size`."""
    dim: PositiveInt = 512
    """Latent width D."""
    depth: Annotated[int, Field(ge=0)] = 6
    """Layers."""
    heads: PositiveInt = 8
    """Attention heads of a transformer; must divide `dim`."""
    mlp_ratio: Positive = 4.0
    """Width of the feed-forward layer over `dim`; a GRU has none."""
    dropout: Rate = 0.1
    """Dropout in attention or convolution output and feed-forward; between layers of a GRU."""
    kernel_size: Annotated[int, Field(ge=1)] = 15
    """Frames that a convolution looks at, an odd number."""
    bidirectional: bool = False
    """Whether a GRU reads both ways, `dim` / 2 units each; one that does not can stream."""
    causal: bool = False
    """No frame looks at what follows its patch, so that `b2t decode --follow` can read bins as they
    come: attention and convolutions look back only."""
    window: PositiveInt | None = None
    """Frames that a frame of a causal transformer attends to, itself included; null: all before."""

    @model_validator(mode="after")
    def _consistent(self) -> EncoderOptions:
        if self.kind == "conv" and self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {self.kernel_size} must be odd, to look both ways alike")
        if self.kind == "gru" and self.bidirectional and self.dim % 2:
            raise ValueError(f"dim {self.dim} must be even to be read both ways")
        if self.kind == "transformer" and self.dim % (2 * self.heads):
            raise ValueError(
                f"dim {self.dim} over heads {self.heads} must give an even whole number "
                "(rotary positions turn pairs)"
            )
        if self.causal and self.kind == "gru" and self.bidirectional:
            raise ValueError("a bidirectional GRU is not causal: set bidirectional or causal false")
        if self.window is not None and not (self.causal and self.kind == "transformer"):
            raise ValueError("window is for a causal transformer: set causal true and kind so")
        if self.patch_stride > self.patch_size:
            raise ValueError(
                f"patch_stride {self.patch_stride} above patch_size {self.patch_size} skips bins"
            )
        return self


class SignalDecoderOptions(Options):
    """Quantized latents back to the signal."""

    dim: PositiveInt | None = None
    """Width, null means the encoder's."""
    depth: Annotated[int, Field(ge=0)] = 4
    """Transformer layers."""
    heads: PositiveInt = 8
    """Attention heads."""
    mlp_ratio: Positive = 4.0
    """Width of the feed-forward layer over `dim`."""
    dropout: Rate = 0.0
    """Dropout in attention output and feed-forward."""


class PhonemeHeadOptions(Options):
    """CTC over phonemes from the quantized latents; used where the data has phonemes."""

    enabled: bool = True
    """Build the head."""
    dropout: Rate = 0.1
    """Dropout before the projection to classes."""


class TextDecoderOptions(Options):
    """Text from quantized latents."""

    enabled: bool = True
    """False trains a tokenizer of signals only; automatic where the data has no text."""
    kind: Literal["seq2seq", "causal_lm", "ctc"] = "seq2seq"
    """A sequence-to-sequence model that attends to the latents, a causal language model that has
    them, projected to its width, before its text, or convolutions whose tokens are laid on the
    frames by CTC: they learn from far fewer sentences, and write what is heard, in its order."""
    checkpoint: str | None = None
    """Local folder or Hub id of a model of this kind; null trains a small one."""
    tuning: Literal["full", "lora", "frozen"] = "full"
    """What of a causal language model trains where a phase trains the text decoder: all of it,
    low-rank additions (`pip install "b2t[lora]"`), or only the projection of the latents."""
    lora_rank: PositiveInt = 16
    """Rank of the additions."""
    lora_alpha: PositiveInt = 32
    """Their scale, over the rank."""
    lora_dropout: Rate = 0.05
    """Dropout before them."""
    lora_targets: list[str] | None = None
    """Names of the linear layers that get them, as in peft; null: all but the output."""
    config: dict[str, Any] | None = None
    """A transformers config as a mapping with `model_type`, trained from scratch."""
    tokenizer: Literal["byte", "bpe"] = "byte"
    """Tokens of a model trained from scratch; a checkpoint brings its own."""
    bpe_vocab_size: Annotated[int, Field(ge=260)] = 2000
    """Tokens of the BPE tokenizer, learnt on the training texts."""
    memory: Literal["latents", "phonemes", "posteriors"] = "latents"
    """What it reads: the quantized latents; the phonemes that the phoneme head hears in them, which
    are fewer than frames; or what the head holds likely in each frame, which also tells of
    phonemes that come second. The spelling of phonemes can be learnt from text alone
    (`text_from`)."""
    memory_depth: Annotated[int, Field(ge=0)] = 2
    """Transformer layers over the phonemes, as wide as the decoder."""
    phoneme_errors: Rate = 0.1
    """Errors per phoneme that training adds, half of them mixtures, the others gaps and extras."""
    token_errors: Rate = 0.0
    """Share of the tokens before each that training replaces by random ones: decoding goes on from
    its own mistakes, which a decoder that is always shown the true text has never seen."""
    label_smoothing: Rate = 0.0
    """Share of each training target that is spread over all tokens."""
    ctc_weight: Rate = 0.0
    """Share of a CTC over tokens in the loss of a seq2seq decoder, on what it attends to; a beam
    (`evaluation.num_beams` above 1) then takes what both propose and judges it by both."""
    dim: PositiveInt = 512
    """Width of the small decoder."""
    depth: PositiveInt = 6
    """Layers of the small decoder."""
    heads: PositiveInt = 8
    """Attention heads of the small decoder."""
    ffn_dim: PositiveInt = 2048
    """Feed-forward width of the small decoder."""
    kernel_size: Annotated[int, Field(ge=1)] = 9
    """Frames that a convolution of kind ctc looks at, an odd number."""
    dropout: Rate = 0.1
    """Dropout of the small decoder."""

    @model_validator(mode="after")
    def _consistent(self) -> TextDecoderOptions:
        if self.kind == "seq2seq" and self.tuning != "full":
            raise ValueError(
                f"tuning {self.tuning} is for kind causal_lm; a seq2seq decoder trains whole or, "
                "left out of a phase's trainable, not at all"
            )
        if self.ctc_weight and self.kind != "seq2seq":
            raise ValueError("ctc_weight is for kind seq2seq, whose attention CTC is to help")
        if self.kind == "ctc":
            self._lays_tokens()
        return self

    def _lays_tokens(self) -> None:
        """Refuse what a decoder of kind ctc has no use for."""
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {self.kernel_size} must be odd, to look both ways alike")
        given = {
            "checkpoint": self.checkpoint is not None,
            "config": self.config is not None,
            f"tuning {self.tuning}": self.tuning != "full",
            "token_errors": self.token_errors > 0,
            "label_smoothing": self.label_smoothing > 0,
        }
        for name, present in given.items():
            if present:
                raise ValueError(
                    f"{name} is for decoders that attend or continue a text; kind ctc has none"
                )


class SavedTextDecoderOptions(TextDecoderOptions):
    """`TextDecoderOptions` with what the data and the first weights decide, saved with a model."""

    max_tokens: PositiveInt = 128
    """Longest text in tokens, end token included."""
    initialized_from: str | None = None
    """Checkpoint that the weights came from."""


class SignalOptions(Options):
    """What the signals were that a model was trained on; None where it is not known."""

    channel_names: list[str] | None = None
    """Names of the C channels, in order."""
    unit: str | None = None
    """Unit: z-score, V …"""
    rms: float | None = None
    """Root mean square of a typical trial, in the unit."""
    smoothing_bins: float = 0.0
    """Gaussian smoothing that belongs to the model's input, in bins."""
    processing: dict[str, Any] | None = None
    """`b2t.signal_processing.ProcessingOptions` that they went through."""
    normalization: str | None = None
    """What they were z-scored within: block, session or recording, by `b2t prepare`, or none."""


class CheckpointingOptions(Options):
    """Activation checkpointing per component: every n-th layer is recomputed, 0 is off."""

    encoder: Annotated[int, Field(ge=0)] = 1
    """Encoder layers."""
    signal_decoder: Annotated[int, Field(ge=0)] = 1
    """Signal decoder layers."""
    text_decoder: Annotated[int, Field(ge=0)] = 1
    """Text decoder layers (transformers recomputes all of them: 0 or 1)."""
