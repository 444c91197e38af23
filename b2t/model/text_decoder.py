"""Text from latents: the decoder of any transformers sequence-to-sequence model."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

from b2t.errors import UserError
from b2t.labels import IGNORE
from b2t.log import log_once
from b2t.model.phoneme_memory import PhonemeMemory
from b2t.model.transformer import attention_mask

_T5_FAMILY = ("t5", "mt5", "umt5", "longt5", "switch_transformers")
_SUGGESTION = "choose an encoder–decoder model such as facebook/bart-base or google/byt5-small"


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


def config_from_mapping(mapping: dict[str, Any], **tokens: int | None) -> PretrainedConfig:
    """Build a sequence-to-sequence config from a mapping with `model_type`.

    Args:
        mapping: fields of the transformers config.
        tokens: `vocab_size` and special ids of the tokenizer, used where the mapping is silent.

    Raises:
        UserError: unknown or missing model type, or one that is no sequence-to-sequence model.
    """
    fields = {**{key: value for key, value in tokens.items() if value is not None}, **mapping}
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise UserError("text_decoder.config: expected a key model_type, for example bart")
    try:
        config = AutoConfig.for_model(model_type, **fields)
    except ValueError as error:
        raise UserError(f"text_decoder.config (model_type {model_type}): {error}") from None
    if "decoder_start_token_id" not in mapping:
        start = tokens.get("bos_token_id")
        config.decoder_start_token_id = tokens.get("eos_token_id") if start is None else start
    _require_seq2seq(config, f"text_decoder.config (model_type {model_type})")
    return config


def config_from_checkpoint(checkpoint: str) -> PretrainedConfig:
    """Read the config of a local folder or Hub id.

    Raises:
        UserError: neither a folder nor reachable on the Hub, or no sequence-to-sequence model.
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
    _require_seq2seq(config, where)
    return config


def _require_seq2seq(config: PretrainedConfig, where: str) -> None:
    if type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{where}: model type {config.model_type!r} has no decoder that attends to an encoder "
            f"(a causal language model?); {_SUGGESTION}"
        )
    if getattr(config, "decoder_start_token_id", None) is None:
        raise UserError(
            f"{where}: its config has no decoder_start_token_id; set it in config.json to the "
            "token that begins every output"
        )


class _DroppedEncoder(nn.Module):
    """Stands where the model's own encoder was; its tied embedding stays, its layers are gone."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.config = getattr(encoder, "config", None)
        self.main_input_name = "input_ids"
        if isinstance(getattr(encoder, "embed_tokens", None), nn.Embedding):
            self.embed_tokens = encoder.embed_tokens

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        raise RuntimeError("the text decoder's own encoder was dropped: give encoder_outputs")


class TextDecoder(nn.Module):
    """A sequence-to-sequence model whose encoder is replaced by projected latents.

    The projection is a linear map, a layer norm and sinusoidal positions (Vaswani et al. 2017):
    without them cross-attention could not tell early frames from late ones.

    Args:
        latent_dim: D, or the width of `phonemes`.
        config: config of the sequence-to-sequence model.
        checkpoint: folder or Hub id whose weights it starts from; None starts at random.
        max_tokens: tokens generated at most, end token included.
        phonemes: makes what the decoder attends to of phonemes; None: it attends to latents.

    Raises:
        UserError: the checkpoint's weights cannot be read.
    """

    def __init__(
        self,
        latent_dim: int,
        config: PretrainedConfig,
        checkpoint: str | None = None,
        max_tokens: int = 128,
        phonemes: PhonemeMemory | None = None,
    ) -> None:
        super().__init__()
        self.phonemes = phonemes
        self.seq2seq = _build(config, checkpoint)
        self.seq2seq.set_encoder(_DroppedEncoder(self.seq2seq.get_encoder()))
        self.max_tokens = max_tokens
        self.seq2seq.generation_config = _generation_config(config, max_tokens)
        width = _memory_width(config)
        self.project = nn.Linear(latent_dim, width)
        self.norm = nn.LayerNorm(width)

    # transformers asks the direct children of a model for these.
    @property
    def all_tied_weights_keys(self) -> dict[str, str]:
        """Tied parameters, target → source."""
        tied = self.seq2seq.all_tied_weights_keys
        return {f"seq2seq.{target}": f"seq2seq.{source}" for target, source in tied.items()}

    @property
    def _keep_in_fp32_modules(self) -> set[str]:
        return self.seq2seq._keep_in_fp32_modules

    @property
    def _keep_in_fp32_modules_strict(self) -> set[str]:
        return self.seq2seq._keep_in_fp32_modules_strict

    def memory(self, latents: Tensor) -> Tensor:
        """Project latents [B, P, D] to what the decoder attends to, [B, P, width]."""
        x = self.norm(self.project(latents))
        return x + _sinusoids(x.shape[1], x.shape[2], x.device).to(x.dtype)

    def forward(self, latents: Tensor, frame_mask: Tensor, tokens: Tensor) -> Tensor:
        """Predict every token from the latents and the true tokens before it.

        Args:
            latents: [B, P, D].
            frame_mask: [B, P] bool, True = real.
            tokens: [B, L] int64 labels with −100 where there is none.

        Returns:
            Logits [B, L, V]. V may be wider than the tokenizer where a checkpoint's is.
        """
        self._warn_of_t5()
        config = self.seq2seq.config
        inputs = tokens.new_full(tokens.shape, config.decoder_start_token_id)
        inputs[:, 1:] = tokens[:, :-1]
        inputs = inputs.masked_fill(inputs == IGNORE, config.pad_token_id or 0)
        return self.seq2seq(
            encoder_outputs=BaseModelOutput(last_hidden_state=self.memory(latents)),
            attention_mask=_memory_mask(frame_mask),
            decoder_input_ids=inputs,
            use_cache=False,
        ).logits

    @torch.no_grad()
    def generate(self, latents: Tensor, frame_mask: Tensor, **kwargs: Any) -> Any:
        """Generate freely: tokens [B, ≤ max_tokens + 1] that begin with the start token.

        Args:
            latents: [B, P, D].
            frame_mask: [B, P] bool, True = real.
            kwargs: as in transformers' `generate` (`num_beams`, `max_new_tokens`, …).

        Raises:
            UserError: more new tokens than the model has positions.
        """
        positions = getattr(self.seq2seq.config, "max_position_embeddings", None)
        asked = kwargs.get("max_new_tokens", 0)
        if positions is not None and asked > positions:
            raise UserError(
                f"max_new_tokens={asked}: the text decoder has {positions} positions; "
                f"expected at most {positions}"
            )
        return self.seq2seq.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=self.memory(latents)),
            attention_mask=_memory_mask(frame_mask),
            **kwargs,
        )

    def checkpoint_activations(self, enabled: bool) -> None:
        """Recompute the decoder's activations in backward, or keep them."""
        name = "enable" if enabled else "disable"
        options = ({"use_reentrant": False},) if enabled else ()
        model = self.seq2seq
        switch = getattr(model, f"activation_checkpointing_{name}", None)
        (switch or getattr(model, f"gradient_checkpointing_{name}"))(*options)

    def _warn_of_t5(self) -> None:
        if self.project.weight.dtype == torch.float16:
            kind = self.seq2seq.config.model_type
            if kind in _T5_FAMILY:
                log_once(
                    "t5-fp16",
                    f"text decoder: {kind} models overflow in fp16; train in bf16 "
                    "(ds_configs/zero2_bf16.json) or choose a BART-like decoder",
                )


def _build(config: PretrainedConfig, checkpoint: str | None) -> PreTrainedModel:
    if checkpoint is None:
        return AutoModelForSeq2SeqLM.from_config(config)
    path = Path(checkpoint).expanduser()
    try:
        return AutoModelForSeq2SeqLM.from_pretrained(
            str(path) if path.is_dir() else checkpoint, config=config, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"text_decoder.checkpoint={checkpoint}: its weights could not be read ({reason}); "
            "expected model.safetensors as save_pretrained writes it"
        ) from None


def _generation_config(config: PretrainedConfig, max_tokens: int) -> GenerationConfig:
    """Greedy decoding with the model's special tokens and nothing of a checkpoint's habits."""
    names = ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
    return GenerationConfig(
        **{name: getattr(config, name, None) for name in names}, max_new_tokens=max_tokens
    )


def _memory_width(config: PretrainedConfig) -> int:
    decoder = config.get_text_config(decoder=True)
    for name in ("cross_attention_hidden_size", "d_model", "hidden_size"):
        width = getattr(decoder, name, None)
        if width is not None:
            return int(width)
    raise UserError(f"text_decoder: no width found in the config of {config.model_type!r}")


def _memory_mask(frame_mask: Tensor) -> Tensor:
    return attention_mask(frame_mask)[:, 0, 0].long()


def _sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """Sinusoidal positions [P, width] in float32."""
    position = torch.arange(length, device=device, dtype=torch.float32)[:, None]
    pair = torch.arange(0, width, 2, device=device, dtype=torch.float32)
    angle = position * torch.pow(10_000.0, -pair / width)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :width]
