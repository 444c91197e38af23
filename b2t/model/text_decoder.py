"""Text from latents: the decoder of any transformers sequence-to-sequence model."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from b2t.errors import UserError
from b2t.labels import IGNORE
from b2t.log import log_once
from b2t.model import losses as sums
from b2t.model.ctc_search import prefix_beam, spoken_tokens
from b2t.model.phoneme_memory import PhonemeMemory
from b2t.model.text_models import (
    WrappedModel,
    build_text_model,
    generation_defaults,
    text_width,
)
from b2t.model.transformer import attention_mask

_T5_FAMILY = ("t5", "mt5", "umt5", "longt5", "switch_transformers")


_SPECIAL = ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id")


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


class TextDecoder(WrappedModel):
    """A sequence-to-sequence model whose encoder is replaced by projected latents.

    The projection is a linear map, a layer norm and sinusoidal positions (Vaswani et al. 2017):
    without them cross-attention could not tell early frames from late ones.

    Args:
        latent_dim: D, or the width of `phonemes`.
        config: config of the sequence-to-sequence model.
        checkpoint: folder or Hub id whose weights it starts from; None starts at random.
        max_tokens: tokens generated at most, end token included.
        phonemes: makes what the decoder attends to of phonemes; None: it attends to latents.
        ctc_weight: share of CTC in the loss, and in the score of what a beam proposes: tokens are
            laid on what is attended to, in its order, which attention must find by itself. Source:
            Watanabe et al., Hybrid CTC/attention architecture for end-to-end speech recognition
            (2017). 0 builds none.

    Raises:
        UserError: the checkpoint's weights cannot be read.
    """

    inner = "seq2seq"

    def __init__(
        self,
        latent_dim: int,
        config: PretrainedConfig,
        checkpoint: str | None = None,
        *,
        max_tokens: int,
        phonemes: PhonemeMemory | None = None,
        ctc_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.phonemes = phonemes
        self.seq2seq = build_text_model(config, checkpoint)
        self.seq2seq.set_encoder(_DroppedEncoder(self.seq2seq.get_encoder()))
        self.max_tokens = max_tokens
        self.seq2seq.generation_config = generation_defaults(
            max_tokens, **{name: getattr(config, name, None) for name in _SPECIAL}
        )
        width = text_width(config)
        self.project = nn.Linear(latent_dim, width)
        self.norm = nn.LayerNorm(width)
        self.ctc_weight = ctc_weight
        if ctc_weight:
            self.ctc = nn.Linear(latent_dim, config.vocab_size)

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
            attention_mask=self._training_mask(frame_mask),
            decoder_input_ids=inputs,
            use_cache=False,
        ).logits

    def _training_mask(self, frame_mask: Tensor) -> Tensor:
        """Return the mask of the memory as the model takes it, without a wait for a GPU.

        Of a mask [B, P] transformers asks whether it hides anything; one that says by itself which
        keys [B, 1, 1, P] are seen is used as it is, where attention takes such masks.
        """
        config = self.seq2seq.config
        if frame_mask.is_cuda and getattr(config, "_attn_implementation", "") == "sdpa":
            return attention_mask(frame_mask)
        return _memory_mask(frame_mask)

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
        if self.ctc_weight and kwargs.get("num_beams", 1) > 1:
            return self._generate_jointly(latents, frame_mask, kwargs)
        return self._generate_alone(latents, frame_mask, kwargs)

    def _generate_alone(self, latents: Tensor, frame_mask: Tensor, kwargs: dict[str, Any]) -> Any:
        return self.seq2seq.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=self.memory(latents)),
            attention_mask=_memory_mask(frame_mask),
            **kwargs,
        )

    def _generate_jointly(
        self, latents: Tensor, frame_mask: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        """Let CTC and attention propose `num_beams` texts each, and both judge all of them."""
        proposed = self._proposed(latents, frame_mask, kwargs)
        texts = [torch.tensor(text, device=latents.device) for some in proposed for text in some]
        rows = [row for row, some in enumerate(proposed) for _ in some]
        tokens = pad_sequence(texts, True, IGNORE)
        inputs = latents[rows], frame_mask[rows]
        attended = self.log_likelihood(*inputs, tokens)
        labels, lengths = spoken_tokens(tokens)
        heard = -sums.ctc_nll(self.ctc(inputs[0]), inputs[1], labels, lengths, self._blank)
        scores = ((1 - self.ctc_weight) * attended + self.ctc_weight * heard.double()).tolist()
        wanted = kwargs.get("num_return_sequences", 1)
        start = texts[0].new_full((1,), self.seq2seq.config.decoder_start_token_id)
        best: list[Tensor] = []
        for row in range(len(latents)):
            ranked = sorted((i for i, r in enumerate(rows) if r == row), key=lambda i: -scores[i])
            ranked += ranked[-1:] * wanted
            best += [torch.cat((start, texts[i])) for i in ranked[:wanted]]
        return pad_sequence(best, True, self._blank)

    def _proposed(
        self, latents: Tensor, frame_mask: Tensor, kwargs: dict[str, Any]
    ) -> list[list[tuple[int, ...]]]:
        """Different texts of each row, end token included."""
        width, config, blank = kwargs["num_beams"], self.seq2seq.config, self._blank
        own = self._generate_alone(latents, frame_mask, {**kwargs, "num_return_sequences": width})
        special = {config.decoder_start_token_id, config.eos_token_id, blank}
        # A text of too many tokens is cut: the decoder could not judge what follows.
        limit = min(kwargs.get("max_new_tokens", self.max_tokens), self.max_tokens) - 1
        found = []
        frames = self.ctc(latents).float().log_softmax(-1).cpu()
        for row, (heard, mask) in enumerate(zip(frames, frame_mask.cpu(), strict=True)):
            said = own[row * width : (row + 1) * width, 1:].tolist()
            some = [tuple(token for token in text if token not in special) for text in said]
            some += [text for text, _ in prefix_beam(heard[mask], width, blank)]
            found.append(list(dict.fromkeys((*text[:limit], config.eos_token_id) for text in some)))
        return found

    def ctc_sums(self, latents: Tensor, frame_mask: Tensor, tokens: Tensor) -> sums.CtcSums:
        """CTC loss of texts; arguments as in `forward`, end tokens are not said."""
        labels, lengths = spoken_tokens(tokens)
        return sums.ctc_sums(self.ctc(latents), frame_mask, labels, lengths, self._blank)

    @property
    def _blank(self) -> int:
        padding = self.seq2seq.config.pad_token_id
        return self.seq2seq.config.eos_token_id if padding is None else padding

    def keep_frozen(self) -> None:
        """Freeze what never trains: nothing here."""

    def _warn_of_t5(self) -> None:
        if self.project.weight.dtype == torch.float16:
            kind = self.seq2seq.config.model_type
            if kind in _T5_FAMILY:
                log_once(
                    "t5-fp16",
                    f"text decoder: {kind} models overflow in fp16; train in bf16 "
                    "(ds_configs/zero2_bf16.json) or choose a BART-like decoder",
                )


def _memory_mask(frame_mask: Tensor) -> Tensor:
    return attention_mask(frame_mask)[:, 0, 0].long()


def _sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """Sinusoidal positions [P, width] in float32."""
    position = torch.arange(length, device=device, dtype=torch.float32)[:, None]
    pair = torch.arange(0, width, 2, device=device, dtype=torch.float32)
    angle = position * torch.pow(10_000.0, -pair / width)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :width]
