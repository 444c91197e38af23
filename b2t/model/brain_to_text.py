"""The whole model: signal to codes, and codes to signal, phonemes and text."""

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, GenerationConfig

from b2t.model import losses as sums
from b2t.model.assembly import (
    build_adapter,
    build_quantizer,
    build_signal_decoder,
    build_text_decoder,
    resolve_text_decoder,
)
from b2t.model.configuration import BrainToTextConfig
from b2t.model.encoder import Encoder
from b2t.model.inference import Inference
from b2t.model.masked_prediction import MaskedPrediction
from b2t.model.objectives import COMPONENTS, DEFAULT_WEIGHTS, OBJECTIVES
from b2t.model.options import EncoderOptions
from b2t.model.outputs import BrainToTextOutput, Encoded, Scored
from b2t.model.phoneme_head import PhonemeHead
from b2t.model.pretrained import Pretrained
from b2t.model.recurrence import Recurrence
from b2t.model.text_side import TextSide
from b2t.model.transformer import Transformer
from b2t.quantize import StepNorms
from b2t.quantize.frame_hash import frame_ids
from b2t.quantize.objectives import LOSSES as QUANTIZER_LOSSES

if TYPE_CHECKING:
    from b2t.data.batches import Batch


class BrainToText(Inference, TextSide, MaskedPrediction, Pretrained):
    """Brain signals to discrete codes, and codes to signal, phonemes and text.

    Attributes:
        adapter, encoder, quantizer, signal_decoder, phoneme_head, text_decoder: the components;
            None where the config leaves one out.

    Args:
        config: the architecture. It is copied: the model's own has the text decoder's config
            resolved, and no checkpoint left to load.

    Raises:
        UserError: the text decoder's config or checkpoint cannot be used.
    """

    config_class = BrainToTextConfig
    base_model_prefix = ""
    main_input_name = "signal"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: BrainToTextConfig) -> None:
        config = copy.deepcopy(config)
        writes = config.text_decoder["enabled"]
        text_config = resolve_text_decoder(config) if writes else None
        checkpoint = config.text_decoder["checkpoint"]
        config.text_decoder["checkpoint"] = None
        super().__init__(config)
        self._frozen: frozenset[str] = frozenset()
        self.adapter = build_adapter(config)
        self.encoder = Encoder(config.channels, EncoderOptions(**config.encoder))
        self.quantizer = build_quantizer(config)
        self.signal_decoder = build_signal_decoder(config)
        dim = config.encoder["dim"]
        head = config.phoneme_head
        self.phoneme_head = PhonemeHead(dim, head["dropout"]) if head["enabled"] else None
        self.text_decoder = build_text_decoder(config, text_config, checkpoint) if writes else None
        self.generation_config = _decoding(config) if self.text_decoder is not None else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    @property
    def patch_size(self) -> int:
        """Bins per patch."""
        return self.encoder.patch_size

    def frame_mask(self, signal_mask: Tensor) -> Tensor:
        """Real latent frames [B, P] bool for real bins [B, T] bool."""
        return self.encoder.frame_mask(signal_mask)

    def counts(self, batch: "Batch") -> dict[str, sums.Number]:
        """Elements that normalise the losses.

        Those of `Batch.counts`, but of `phonemes` only those of rows that have enough frames for
        them, which the loss leaves out too; and `frames`, the real frames.
        """
        frames = self.frame_mask(batch.signal_mask)
        if frames.device.type == "cpu":
            batch.frames = int(frames.sum())
        return self._counts(batch, frames)

    def _counts(self, batch: "Batch", frames: Tensor) -> dict[str, sums.Number]:
        lengths = batch.phoneme_lengths
        used, _ = sums.fitting_rows(frames, batch.phonemes, lengths)
        return {**batch.counts(), "frames": frames.sum(), "phonemes": (lengths * used).sum()}

    def _counted(self, norms: StepNorms, batch: "Batch", frames: Tensor) -> StepNorms:
        """Normalisers whose counts are the batch's own where the step has none."""
        if norms.counts is not None:
            return norms
        return replace(norms, counts=self._counts(batch, frames))

    def latents(
        self,
        signal: Tensor,
        signal_mask: Tensor | None = None,
        session: Tensor | None = None,
        hidden: Tensor | None = None,
        count: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode without quantizing.

        Args:
            signal: [B, T, C].
            signal_mask: [B, T] bool, True = real; None is all real.
            session: [B] int64, −1 = unseen; None is all unseen.
            hidden: [B, T] bool, True = bins that the encoder sees as zeros; None hides none.
            count: real latent frames, where that is known.

        Returns:
            Latents [B, P, D], zero under the mask, and the mask of real frames [B, P] bool.
        """
        if signal_mask is None:
            signal_mask = torch.ones(signal.shape[:2], dtype=torch.bool, device=signal.device)
        if session is None:
            session = torch.full(signal.shape[:1], -1, dtype=torch.int64, device=signal.device)
        signal = signal.to(self.encoder.embed.weight.dtype)
        signal = signal.masked_fill(~signal_mask[..., None], 0.0)
        if self.adapter is not None:
            signal = self.adapter(signal, session)
        if hidden is not None:
            signal = signal.masked_fill(hidden[..., None], 0.0)
        latents, frames = self.encoder(signal, signal_mask, count)
        return latents, frames

    def encode_batch(
        self,
        signal: Tensor,
        signal_mask: Tensor | None = None,
        session: Tensor | None = None,
    ) -> Encoded:
        """Encode and quantize signals as batches hold them; `encode` takes a user's own.

        Args:
            signal: [B, T, C], smoothed.
            signal_mask: [B, T] bool, True = real; None is all real.
            session: [B] int64, −1 = unseen; None is all unseen.
        """
        return self._quantize(*self.latents(signal, signal_mask, session))

    def _quantize(
        self,
        latents: Tensor,
        mask: Tensor,
        norms: StepNorms | None = None,
        losses: Collection[str] = (),
        row_ids: Tensor | None = None,
        count: int | None = None,
    ) -> Encoded:
        """Quantize latents [B, P, D] of real frames ``mask`` [B, P].

        Args:
            latents: of `latents`.
            mask: likewise.
            norms: of the step.
            losses: those of the quantizer to compute, of all in `OBJECTIVES`.
            row_ids: [B] int64, what the rows are; the quantizer draws frames by them.
            count: real frames of ``mask``, where that is known.
        """
        if self.quantizer is None:
            return Encoded(latents, latents, None, mask, {}, None)
        out = self.quantizer(
            latents,
            mask,
            norms=norms,
            losses=[name for name in QUANTIZER_LOSSES if name in losses],
            ids=None if row_ids is None else frame_ids(row_ids, latents.shape[1]),
            across_ranks=self.training,
            count=count,
        )
        return Encoded(latents, out.quantized, out.codes, mask, dict(out.losses), out.stats)

    def forward(
        self,
        batch: "Batch",
        norms: StepNorms | None = None,
        weights: Mapping[str, float] | None = None,
        *,
        text_from_labels: bool = False,
    ) -> BrainToTextOutput:
        """Compute the losses of a batch.

        Args:
            batch: signals and labels.
            norms: of the optimizer step that the batch is a part of: the mean of its losses over
                micro-batches and ranks is then that over all its elements. None takes the batch
                for the whole step.
            weights: weight per loss; a loss of weight 0, or not named, is not computed. None is
                `DEFAULT_WEIGHTS`. A loss whose component the model lacks is left out. The
                quantizer's gradient rule brings a loss `codebook`, of weight 1 unless named.
            text_from_labels: a text decoder that reads phonemes reads those of the labels; signals
                are not encoded where text is all that is learnt.

        Raises:
            UserError: a text longer than the text decoder allows.
            ValueError: an unknown name among the weights.
        """
        weights = self._active_weights(weights)
        norms = norms or StepNorms()
        reads_labels = text_from_labels and self.reads_phonemes
        if reads_labels and set(weights) == {"generation"}:
            return self._spell(batch, norms, weights)
        if set(weights) == {"masked"}:
            return self._pretrain(batch, norms, weights)
        latents, frames = self.latents(
            batch.signal, batch.signal_mask, batch.session, count=batch.frames
        )
        norms = self._counted(norms, batch, frames)
        encoded = self._quantize(latents, frames, norms, weights, batch.row_ids, batch.frames)
        labelled = batch if reads_labels else None
        losses, outputs, metrics = self._score(batch, encoded, norms, weights, labelled)
        zero = torch.zeros((), device=batch.signal.device)
        return BrainToTextOutput(
            loss=sum((weights.get(name, 1.0) * loss for name, loss in losses.items()), zero),
            losses=losses,
            latents=encoded.latents,
            quantized=encoded.quantized,
            codes=encoded.codes,
            frame_mask=encoded.frame_mask,
            stats=encoded.stats,
            metrics={"frames": encoded.frame_mask.sum(), **metrics},
            **outputs,
        )

    def _score(
        self,
        batch: "Batch",
        encoded: Encoded,
        norms: StepNorms,
        weights: Mapping[str, float],
        labelled: "Batch | None",
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Losses by name, outputs by field and sums for metrics of the decoders that are learnt."""

        def predict_text(batch: "Batch", encoded: Encoded) -> Scored:
            return self._predict_text(batch, *self.text_memory(encoded, labelled))

        decoders: tuple[tuple[str, str, Callable[[Batch, Encoded], Scored]], ...] = (
            ("reconstruction", "reconstruction", self._reconstruct),
            ("phoneme", "phoneme_logits", self._classify_phonemes),
            ("generation", "text_logits", predict_text),
        )
        losses: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        for name, field, decode in decoders:
            per = OBJECTIVES[name].per
            if name in weights and per is not None:
                outputs[field], total, found = decode(batch, encoded)
                losses[name] = sums.normalise(total, norms.count(per))
                metrics |= found
        if "masked" in weights:
            total = self._predict_hidden(batch)[0]
            losses["masked"] = sums.normalise(total, norms.count("hidden"))
        return {**losses, **encoded.losses}, outputs, metrics

    def _active_weights(self, weights: Mapping[str, float] | None) -> dict[str, float]:
        """Positive weights of losses whose components exist."""
        weights = DEFAULT_WEIGHTS if weights is None else weights
        unknown = set(weights) - set(OBJECTIVES)
        if unknown:
            raise ValueError(f"unknown losses {sorted(unknown)}; expected {sorted(OBJECTIVES)}")
        return {
            name: float(weight)
            for name, weight in weights.items()
            if weight and getattr(self, OBJECTIVES[name].component) is not None
        }

    def _reconstruct(self, batch: "Batch", encoded: Encoded) -> Scored:
        bins = batch.signal.shape[1]
        signal = self.signal_decoder(encoded.quantized, encoded.frame_mask, bins, batch.frames)
        found = sums.reconstruction_sums(signal, batch.target, batch.signal_mask)
        metrics = {
            "squared_error": found.squared_error.detach(),
            "signal_power": found.power,
            "bins": batch.signal_mask.sum() * batch.signal.shape[2],
        }
        return Scored(signal, found.squared_error, metrics)

    def _classify_phonemes(self, batch: "Batch", encoded: Encoded) -> Scored:
        assert self.phoneme_head is not None
        logits = self.phoneme_head(encoded.quantized)
        found = sums.ctc_sums(logits, encoded.frame_mask, batch.phonemes, batch.phoneme_lengths)
        metrics = {"phoneme_rows": found.rows, "phoneme_rows_too_short": found.too_short}
        return Scored(logits, found.negative_log_likelihood, metrics)

    def freeze(self, components: Iterable[str] = ()) -> None:
        """Freeze exactly these components and train all others.

        The parameters of a frozen component need no gradient and it stays in eval mode (no
        dropout, nearest codes) also under `train()`. A frozen component whose input needs no
        gradient either, such as adapter and encoder together, builds no graph and keeps no
        activations; behind a trained one it still passes the gradient on.

        Raises:
            ValueError: an unknown component.
        """
        components = frozenset(components)
        if components - set(COMPONENTS):
            raise ValueError(
                f"unknown components {sorted(components - set(COMPONENTS))}; expected {COMPONENTS}"
            )
        self._frozen = components
        for name in COMPONENTS:
            module = getattr(self, name)
            if module is not None:
                module.requires_grad_(name not in components)
        if self.text_decoder is not None:
            self.text_decoder.keep_frozen()
        self.train(self.training)

    def train(self, mode: bool = True) -> "BrainToText":
        """Set training mode; frozen components stay in eval mode."""
        super().train(mode)
        for name in getattr(self, "_frozen", ()):
            module = getattr(self, name)
            if module is not None:
                module.eval()
        return self

    def checkpoint_activations(
        self, encoder: int = 0, signal_decoder: int = 0, text_decoder: int = 0
    ) -> None:
        """Recompute activations in backward instead of keeping them; the quantizer never is.

        Args:
            encoder: recompute every n-th block; 0 keeps all.
            signal_decoder: likewise.
            text_decoder: 1 recomputes all layers, 0 none.
        """
        self.encoder.body.checkpoint_every = encoder
        self.signal_decoder.transformer.checkpoint_every = signal_decoder
        if self.text_decoder is not None:
            self.text_decoder.checkpoint_activations(bool(text_decoder))

    def compile_blocks(self, enabled: bool = True) -> None:
        """Run the blocks of encoder and signal decoder through `torch.compile` in training.

        Recurrent layers, the text decoder, validation and decoding stay as they are.
        """
        for stack in (self.encoder.body, self.signal_decoder.transformer):
            if not isinstance(stack, Recurrence):
                stack.compiled = enabled

    def pack_frames(self, enabled: bool = True) -> None:
        """Leave padding out of the transformers of encoder and signal decoder, in training.

        On a GPU in 16 bit, with torch 2.10 or later, where a batch's real frames were counted
        before it moved there (`counts`); elsewhere frames stay padded, and the log says so.
        """
        for stack in (self.encoder.body, self.signal_decoder.transformer):
            if isinstance(stack, Transformer):
                stack.packs = enabled

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recompute the activations of encoder, signal decoder and text decoder in backward."""
        self.checkpoint_activations(encoder=1, signal_decoder=1, text_decoder=1)

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations."""
        self.checkpoint_activations()

    activation_checkpointing_enable = gradient_checkpointing_enable
    activation_checkpointing_disable = gradient_checkpointing_disable


AutoConfig.register(BrainToTextConfig.model_type, BrainToTextConfig, exist_ok=True)
AutoModel.register(BrainToTextConfig, BrainToText, exist_ok=True)


def _decoding(config: BrainToTextConfig) -> GenerationConfig:
    """Return greedy decoding of texts as long as the text decoder allows."""
    return GenerationConfig(
        max_new_tokens=config.text_decoder["max_tokens"],
        num_beams=1,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
