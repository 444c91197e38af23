"""Transformers models behind the text decoder: their configs, their weights."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)

from b2t.errors import UserError
from b2t.labels import IGNORE

Kind = Literal["seq2seq", "causal_lm"]
"""A model whose decoder attends to what is read, or one that has it before its text."""

_SUGGESTION = "choose an encoder–decoder model such as facebook/bart-base or google/byt5-small"


class SpecialTokens(NamedTuple):
    """Ids of the tokenizer: what begins a text, ends it, and fills up."""

    start: int
    end: int
    padding: int

    @classmethod
    def of(cls, bos: int | None, eos: int, pad: int | None) -> "SpecialTokens":
        """Take the end token where a tokenizer has none to begin with or to fill up."""
        return cls(eos if bos is None else bos, eos, eos if pad is None else pad)


class WrappedModel(nn.Module):
    """A module around one transformers model, whose needs it passes on to the model around it.

    Attributes:
        inner: name of the attribute that holds the transformers model.
    """

    inner: str

    @property
    def wrapped(self) -> PreTrainedModel:
        """The transformers model."""
        return getattr(self, self.inner)

    # transformers asks the direct children of a model for these.
    @property
    def all_tied_weights_keys(self) -> dict[str, str]:
        """Tied parameters, target → source."""
        tied = self.wrapped.all_tied_weights_keys
        return {
            f"{self.inner}.{target}": f"{self.inner}.{source}" for target, source in tied.items()
        }

    @property
    def _keep_in_fp32_modules(self) -> set[str]:
        return self.wrapped._keep_in_fp32_modules

    @property
    def _keep_in_fp32_modules_strict(self) -> set[str]:
        return self.wrapped._keep_in_fp32_modules_strict

    def log_likelihood(self, latents: Tensor, frame_mask: Tensor, tokens: Tensor) -> Tensor:
        """Natural logarithm [B] of texts' probabilities, end tokens included.

        Args:
            latents: [B, P, D].
            frame_mask: [B, P] bool, True = real.
            tokens: [B, L] int64 labels ending in the end token, padded with −100.
        """
        logits = self(latents, frame_mask, tokens).float()
        losses = F.cross_entropy(
            logits.transpose(1, 2), tokens, ignore_index=IGNORE, reduction="none"
        )
        return -losses.double().sum(1)

    def checkpoint_activations(self, enabled: bool) -> None:
        """Recompute the decoder's activations in backward, or keep them."""
        name = "enable" if enabled else "disable"
        options = ({"use_reentrant": False},) if enabled else ()
        model = self.wrapped
        switch = getattr(model, f"activation_checkpointing_{name}", None)
        (switch or getattr(model, f"gradient_checkpointing_{name}"))(*options)


def small_config(
    *,
    dim: int,
    depth: int,
    heads: int,
    ffn_dim: int,
    dropout: float,
    max_tokens: int,
    vocab_size: int,
    bos_token_id: int | None,
    eos_token_id: int,
    pad_token_id: int,
) -> PretrainedConfig:
    """Config of a small decoder to train from scratch.

    The architecture is mBART's, which is BART with the layer norms before the layers: it keeps to
    fp16's range, unlike T5, and six layers of it learn to align sooner than six of BART.
    """
    return AutoConfig.for_model(
        "mbart",
        vocab_size=vocab_size,
        max_position_embeddings=max_tokens,
        d_model=dim,
        encoder_layers=1,
        encoder_attention_heads=heads,
        encoder_ffn_dim=ffn_dim,
        decoder_layers=depth,
        decoder_attention_heads=heads,
        decoder_ffn_dim=ffn_dim,
        dropout=dropout,
        attention_dropout=dropout,
        # transformers' 0.02 suits widths near 1,000; narrow models align sooner with this.
        init_std=dim**-0.5,
        scale_embedding=False,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        decoder_start_token_id=eos_token_id if bos_token_id is None else bos_token_id,
        forced_eos_token_id=None,
    )


def small_causal_config(
    *,
    dim: int,
    depth: int,
    heads: int,
    ffn_dim: int,
    dropout: float,
    vocab_size: int,
    bos_token_id: int | None,
    eos_token_id: int,
    pad_token_id: int,
) -> PretrainedConfig:
    """Config of a small causal language model to train from scratch: Llama's architecture.

    Its positions are rotary, so that no number of frames before the text exceeds them.
    """
    return AutoConfig.for_model(
        "llama",
        vocab_size=vocab_size,
        max_position_embeddings=2**16,
        hidden_size=dim,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=ffn_dim,
        attention_dropout=dropout,
        initializer_range=dim**-0.5,
        tie_word_embeddings=True,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )


def config_from_mapping(
    mapping: dict[str, Any], kind: Kind = "seq2seq", **tokens: int | None
) -> PretrainedConfig:
    """Build a transformers config from a mapping with `model_type`.

    Args:
        mapping: fields of the transformers config.
        kind: what the model must be.
        tokens: `vocab_size` and special ids of the tokenizer, used where the mapping is silent.

    Raises:
        UserError: unknown or missing model type, or one of another kind.
    """
    fields = {**{key: value for key, value in tokens.items() if value is not None}, **mapping}
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise UserError("text_decoder.config: expected a key model_type, for example bart")
    try:
        config = AutoConfig.for_model(model_type, **fields)
    except ValueError as error:
        raise UserError(f"text_decoder.config (model_type {model_type}): {error}") from None
    if kind == "seq2seq" and "decoder_start_token_id" not in mapping:
        start = tokens.get("bos_token_id")
        config.decoder_start_token_id = tokens.get("eos_token_id") if start is None else start
    _require_kind(config, kind, f"text_decoder.config (model_type {model_type})")
    return config


def config_from_checkpoint(checkpoint: str, kind: Kind = "seq2seq") -> PretrainedConfig:
    """Read the config of a local folder or Hub id.

    Args:
        checkpoint: folder or Hub id.
        kind: what the model must be.

    Raises:
        UserError: neither a folder nor reachable on the Hub, or a model of another kind.
    """
    where = f"text_decoder.checkpoint={checkpoint}"
    looks_local = checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") > 1
    path = Path(checkpoint).expanduser()
    if looks_local and not path.is_dir():
        raise UserError(f"{where}: no such folder; expected one that save_pretrained wrote")
    try:
        config = AutoConfig.from_pretrained(str(path) if path.is_dir() else checkpoint)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{where}: could not be read as a local folder nor from the Hugging Face Hub "
            f"({reason}). Without a network, download the model elsewhere and give its folder."
        ) from None
    _require_kind(config, kind, where)
    return config


def _require_kind(config: PretrainedConfig, kind: Kind, where: str) -> None:
    attends = type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    if kind == "causal_lm":
        if attends or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UserError(
                f"{where}: model type {config.model_type!r} is no causal language model; choose "
                "one such as meta-llama/Llama-3.2-1B, or set text_decoder.kind=seq2seq"
            )
        return
    if not attends:
        raise UserError(
            f"{where}: model type {config.model_type!r} has no decoder that attends to an encoder; "
            "for a causal language model set text_decoder.kind=causal_lm, or "
            f"{_SUGGESTION}"
        )
    if getattr(config, "decoder_start_token_id", None) is None:
        raise UserError(
            f"{where}: its config has no decoder_start_token_id; set it in config.json to the "
            "token that begins every output"
        )


def build_text_model(config: PretrainedConfig, checkpoint: str | None) -> PreTrainedModel:
    """Build the model that a config describes, in float32.

    Args:
        config: of a sequence-to-sequence or causal language model.
        checkpoint: folder or Hub id whose weights it starts from; None starts at random.

    Raises:
        UserError: the weights cannot be read.
    """
    seq2seq = type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    if checkpoint is None:
        return auto.from_config(config)
    path = Path(checkpoint).expanduser()
    try:
        return auto.from_pretrained(
            str(path) if path.is_dir() else checkpoint, config=config, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"text_decoder.checkpoint={checkpoint}: its weights could not be read ({reason}); "
            "expected model.safetensors as save_pretrained writes it"
        ) from None


def generation_defaults(max_tokens: int, **special: int | None) -> GenerationConfig:
    """Greedy decoding with these special tokens and nothing of a checkpoint's habits."""
    return GenerationConfig(**special, max_new_tokens=max_tokens)


def text_width(config: PretrainedConfig) -> int:
    """Width of what the decoder reads: its hidden size, or that of its cross-attention."""
    decoder = config.get_text_config(decoder=True)
    for name in ("cross_attention_hidden_size", "d_model", "hidden_size"):
        width = getattr(decoder, name, None)
        if width is not None:
            return int(width)
    raise UserError(f"text_decoder: no width found in the config of {config.model_type!r}")
