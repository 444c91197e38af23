"""Text from latents: any causal language model of transformers, which reads them first."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from b2t.errors import UserError
from b2t.labels import IGNORE
from b2t.model.options import SavedTextDecoderOptions
from b2t.model.phoneme_memory import PhonemeMemory
from b2t.model.text_models import (
    SpecialTokens,
    WrappedModel,
    build_text_model,
    generation_defaults,
    text_width,
)


class CausalTextDecoder(WrappedModel):
    """A causal language model that reads projected latents as if they were tokens before its text.

    The projection is a linear map, a layer norm and a factor that starts at the size of the
    model's token embeddings. A row is [padding, frames, start token, text]: padding stands on the
    left, takes no position and is attended to by nothing, so that a row alone is the same row.
    Source: prefixes of continuous embeddings, Tsimpoukelli et al. 2021, arXiv 2106.13884.

    Args:
        latent_dim: D, or the width of `phonemes`.
        config: config of the language model.
        options: of its longest text, and of what trains besides the projection: all of the model,
            low-rank additions (Hu et al. 2021, arXiv 2106.09685; made by peft), or nothing.
        checkpoint: folder or Hub id whose weights it starts from; None starts at random.
        phonemes: makes what the model reads of phonemes; None: it reads latents.
        tokens: ids of the tokenizer.

    Raises:
        UserError: the checkpoint's weights cannot be read; `lora` without peft, or that finds no
            layer.
    """

    inner = "lm"

    def __init__(
        self,
        latent_dim: int,
        config: PretrainedConfig,
        options: SavedTextDecoderOptions,
        checkpoint: str | None = None,
        phonemes: PhonemeMemory | None = None,
        *,
        tokens: SpecialTokens,
    ) -> None:
        super().__init__()
        self.phonemes = phonemes
        self.tokens = tokens
        self.tuning = options.tuning
        self.max_tokens = options.max_tokens
        self.lm = build_text_model(config, checkpoint)
        self.lm.generation_config = generation_defaults(
            self.max_tokens,
            bos_token_id=tokens.start,
            eos_token_id=tokens.end,
            pad_token_id=tokens.padding,
        )
        if self.tuning == "lora":
            _add_lora(self.lm, options)
        width = text_width(config)
        self.project = nn.Linear(latent_dim, width)
        self.norm = nn.LayerNorm(width)
        embedding = self.lm.get_input_embeddings().weight.detach().float()
        self.scale = nn.Parameter(embedding.square().mean().sqrt().reshape(1))
        self._takes = set(inspect.signature(self.lm.forward).parameters)
        self.keep_frozen()

    def keep_frozen(self) -> None:
        """Freeze what never trains: the language model, but for low-rank additions."""
        if self.tuning == "full":
            return
        for name, parameter in self.lm.named_parameters():
            if self.tuning == "frozen" or "lora_" not in name:
                parameter.requires_grad_(False)

    def memory(self, latents: Tensor) -> Tensor:
        """Project latents [B, P, D] to embeddings of the language model, [B, P, width]."""
        return self.norm(self.project(latents)) * self.scale

    def forward(self, latents: Tensor, frame_mask: Tensor, tokens: Tensor) -> Tensor:
        """Predict every token from the latents and the true tokens before it.

        Args:
            latents: [B, P, D].
            frame_mask: [B, P] bool, True = real.
            tokens: [B, L] int64 labels with −100 where there is none.

        Returns:
            Logits [B, L, V]. V may be wider than the tokenizer where a checkpoint's is.

        Raises:
            UserError: more frames and tokens than the model has positions.
        """
        count = tokens.shape[1]
        self._require_positions(latents.shape[1], count)
        before = tokens[:, :-1]
        before = before.masked_fill(before == IGNORE, self.tokens.padding)
        prefix, real = self._prefix(latents, frame_mask)
        embedded = torch.cat((prefix, self._embed(before, prefix.dtype)), dim=1)
        real = torch.cat((real, tokens[:, :-1] != IGNORE), dim=1)
        inputs: dict[str, Any] = {"inputs_embeds": embedded, "attention_mask": real.long()}
        if "position_ids" in self._takes:
            inputs["position_ids"] = (real.long().cumsum(1) - 1).clamp(min=0)
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = count
        return self.lm(**inputs, use_cache=False).logits[:, -count:]

    @torch.no_grad()
    def generate(self, latents: Tensor, frame_mask: Tensor, **kwargs: Any) -> Any:
        """Generate freely: tokens [B, ≤ max_tokens + 1] that begin with the start token.

        Args:
            latents: [B, P, D].
            frame_mask: [B, P] bool, True = real.
            kwargs: as in transformers' `generate` (`num_beams`, `max_new_tokens`, …).

        Raises:
            UserError: more frames and new tokens than the model has positions.
        """
        self._require_positions(latents.shape[1], kwargs.get("max_new_tokens", self.max_tokens))
        prefix, real = self._prefix(latents, frame_mask)
        found = self.lm.generate(inputs_embeds=prefix, attention_mask=real.long(), **kwargs)
        said = found if isinstance(found, Tensor) else found.sequences
        started = torch.cat((said.new_full((len(said), 1), self.tokens.start), said), dim=1)
        if isinstance(found, Tensor):
            return started
        found.sequences = started
        return found

    def _prefix(self, latents: Tensor, frame_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [B, P + 1, width] of the real frames, all to the right, and the start token.

        Also returns which are real, [B, P + 1] bool.
        """
        order = frame_mask.to(torch.uint8).argsort(dim=1, stable=True)
        frames = self.memory(latents)
        frames = frames.gather(1, order[..., None].expand_as(frames))
        real = frame_mask.gather(1, order)
        frames = frames.masked_fill(~real[..., None], 0.0)
        start = order.new_full((len(order), 1), self.tokens.start)
        prefix = torch.cat((frames, self._embed(start, frames.dtype)), dim=1)
        return prefix, torch.cat((real, torch.ones_like(real[:, :1])), dim=1)

    def _embed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        return self.lm.get_input_embeddings()(tokens).to(dtype)

    def _require_positions(self, frames: int, tokens: int) -> None:
        text = self.lm.config.get_text_config(decoder=True)
        positions = getattr(text, "max_position_embeddings", None)
        if positions is not None and frames + 1 + tokens > positions:
            raise UserError(
                f"text decoder: {frames} latent frames, a start token and {tokens} tokens of text "
                f"are more than the {positions} positions of its language model; take larger "
                "patches (model.encoder.patch_stride), fewer tokens (data.max_text_tokens, "
                "evaluation.max_new_tokens), shorter trials, or another model"
            )


def _add_lora(lm: PreTrainedModel, options: SavedTextDecoderOptions) -> None:
    """Put low-rank additions, zero at the start, beside the linear layers of ``lm``."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError(
            'text_decoder.tuning=lora needs peft: pip install "b2t[lora]", or choose full or frozen'
        ) from None
    additions = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=options.lora_targets or "all-linear",
    )
    try:
        inject_adapter_in_model(additions, lm)
    except ValueError as error:
        raise UserError(
            f"text_decoder.lora_targets={options.lora_targets}: {str(error).splitlines()[0]}"
        ) from None
    for name, module in lm.named_modules():
        if "lora_" in name:
            # Their start is peft's: the model around them must not draw them anew.
            module._is_hf_initialized = True
