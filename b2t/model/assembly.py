"""From a config to the components of the model."""

from typing import Any

from transformers import PretrainedConfig

from b2t.errors import UserError
from b2t.model.configuration import BrainToTextConfig
from b2t.model.phoneme_memory import PhonemeMemory
from b2t.model.session_adapter import SessionAdapter
from b2t.model.signal_decoder import SignalDecoder
from b2t.model.text_decoder import (
    TextDecoder,
    config_from_checkpoint,
    config_from_mapping,
    small_config,
)
from b2t.quantize import ResidualVQ


def without(section: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Return a section less some keys."""
    return {key: value for key, value in section.items() if key not in keys}


def build_adapter(config: BrainToTextConfig) -> SessionAdapter | None:
    """Build the session adapter, None where the config has none."""
    if not config.adapter["enabled"]:
        return None
    options = without(config.adapter, "enabled")
    return SessionAdapter(config.channels, len(config.sessions), **options)


def build_quantizer(config: BrainToTextConfig) -> ResidualVQ | None:
    """Build the quantizer, None where the config has none."""
    if not config.quantizer["enabled"]:
        return None
    return ResidualVQ(config.encoder["dim"], **without(config.quantizer, "enabled"))


def build_signal_decoder(config: BrainToTextConfig) -> SignalDecoder:
    """Build the signal decoder, whose patches are the encoder's."""
    encoder = config.encoder
    return SignalDecoder(
        config.channels,
        encoder["dim"],
        encoder["patch_size"],
        encoder["patch_stride"],
        **config.signal_decoder,
    )


def build_text_decoder(
    config: BrainToTextConfig, resolved: PretrainedConfig, checkpoint: str | None
) -> TextDecoder:
    """Build the text decoder and what it reads with.

    Raises:
        UserError: it is to read phonemes, and the model has no phoneme head.
    """
    section, dim = config.text_decoder, config.encoder["dim"]
    if section["memory"] != "phonemes":
        return TextDecoder(dim, resolved, checkpoint, section["max_tokens"])
    if not config.phoneme_head["enabled"]:
        raise UserError(
            "text_decoder.memory=phonemes, but this model has no phoneme head: it needs "
            "phoneme_head.enabled and phonemes in the data; memory=latents does without"
        )
    width = section["dim"]
    memory = PhonemeMemory(
        width, section["memory_depth"], section["heads"], section["dropout"],
        section["phoneme_errors"],
    )  # fmt: skip
    return TextDecoder(width, resolved, checkpoint, section["max_tokens"], memory)


def resolve_text_decoder(config: BrainToTextConfig) -> PretrainedConfig:
    """Find the seq2seq config and store it, so that a saved model needs no checkpoint."""
    section = config.text_decoder
    special = {
        "vocab_size": config.vocab_size,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    if section["checkpoint"] is not None:
        resolved = config_from_checkpoint(section["checkpoint"])
        section["initialized_from"] = section["checkpoint"]
    elif section["config"] is not None:
        resolved = config_from_mapping(section["config"], **special)
    else:
        keys = ("dim", "depth", "heads", "ffn_dim", "dropout", "max_tokens")
        resolved = small_config(**{key: section[key] for key in keys}, **special)
    vocabulary = resolved.get_text_config(decoder=True).vocab_size
    if vocabulary < config.vocab_size:
        raise UserError(
            f"text_decoder: the tokenizer has {config.vocab_size} tokens, the model's vocabulary "
            f"only {vocabulary}; use the checkpoint's own tokenizer or a larger vocab_size"
        )
    limit = getattr(resolved, "max_position_embeddings", None)
    if limit is not None and limit < section["max_tokens"]:
        raise UserError(
            f"text_decoder: texts of up to {section['max_tokens']} tokens need as many positions, "
            f"its config has max_position_embeddings={limit}; lower data.max_text_tokens"
        )
    section["config"] = without(resolved.to_dict(), "dtype", "torch_dtype", "_name_or_path")
    return resolved
