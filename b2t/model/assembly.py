"""From a config to the components of the model."""

from typing import Any

from transformers import PretrainedConfig

from b2t.errors import UserError
from b2t.model.causal_text_decoder import CausalTextDecoder
from b2t.model.configuration import BrainToTextConfig
from b2t.model.ctc_text_decoder import CtcTextDecoder
from b2t.model.options import AdapterOptions, SavedTextDecoderOptions, SignalDecoderOptions
from b2t.model.phoneme_memory import PhonemeMemory
from b2t.model.session_adapter import SessionAdapter
from b2t.model.signal_decoder import SignalDecoder
from b2t.model.text_decoder import TextDecoder
from b2t.model.text_models import (
    SpecialTokens,
    config_from_checkpoint,
    config_from_mapping,
    small_causal_config,
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
    options = AdapterOptions(**config.adapter)
    return SessionAdapter(config.channels, len(config.sessions), options)


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
        SignalDecoderOptions(**config.signal_decoder),
    )


def build_text_decoder(
    config: BrainToTextConfig, resolved: PretrainedConfig | None, checkpoint: str | None
) -> TextDecoder | CausalTextDecoder | CtcTextDecoder:
    """Build the text decoder and what it reads with.

    Args:
        config: of the whole model.
        resolved: of transformers' model; None for a decoder without one.
        checkpoint: folder or Hub id that its weights start from, None for none.

    Raises:
        UserError: it is to read phonemes, and the model has no phoneme head; its weights cannot be
            read; peft is not installed.
    """
    section, width = config.text_decoder, config.encoder["dim"]
    memory = None
    if section["memory"] != "latents":
        width = section["dim"]
        memory = _phoneme_memory(config)
    options = SavedTextDecoderOptions(**section)
    tokens = SpecialTokens.of(config.bos_token_id, config.eos_token_id, config.pad_token_id)
    if resolved is None:
        return CtcTextDecoder(width, options, memory, tokens=tokens, vocabulary=config.vocab_size)
    if options.kind == "seq2seq":
        return TextDecoder(
            width,
            resolved,
            checkpoint,
            max_tokens=options.max_tokens,
            phonemes=memory,
            ctc_weight=options.ctc_weight,
        )
    return CausalTextDecoder(width, resolved, options, checkpoint, memory, tokens=tokens)


def _phoneme_memory(config: BrainToTextConfig) -> PhonemeMemory:
    if not config.phoneme_head["enabled"]:
        raise UserError(
            f"text_decoder.memory={config.text_decoder['memory']}, but this model has no phoneme "
            "head: it needs phoneme_head.enabled and phonemes in the data; memory=latents does "
            "without"
        )
    section = config.text_decoder
    return PhonemeMemory(
        section["dim"], section["memory_depth"], section["heads"], section["dropout"],
        section["phoneme_errors"], section["memory"] == "posteriors",
    )  # fmt: skip


def resolve_text_decoder(config: BrainToTextConfig) -> PretrainedConfig | None:
    """Find the config of transformers' model; stored, so that a saved model needs no checkpoint.

    None for a decoder that has no such model.
    """
    section = config.text_decoder
    if section["kind"] == "ctc":
        return None
    special = {
        "vocab_size": config.vocab_size,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    if section["checkpoint"] is not None:
        resolved = config_from_checkpoint(section["checkpoint"], section["kind"])
        section["initialized_from"] = section["checkpoint"]
    elif section["config"] is not None:
        resolved = config_from_mapping(section["config"], section["kind"], **special)
    else:
        sizes = {key: section[key] for key in ("dim", "depth", "heads", "ffn_dim", "dropout")}
        if section["kind"] == "causal_lm":
            resolved = small_causal_config(**sizes, **special)
        else:
            resolved = small_config(**sizes, max_tokens=section["max_tokens"], **special)
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
