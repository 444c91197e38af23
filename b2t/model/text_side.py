"""What the text decoder reads and learns: latents, or phonemes heard in signals or in labels."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from b2t.errors import UserError
from b2t.labels import IGNORE
from b2t.model import losses as sums
from b2t.model.outputs import BrainToTextOutput, Encoded, Scored
from b2t.quantize import StepNorms

if TYPE_CHECKING:
    from b2t.data.batches import Batch
    from b2t.model.configuration import BrainToTextConfig
    from b2t.model.phoneme_head import PhonemeHead


class TextSide:
    """The half of `BrainToText` that writes text."""

    text_decoder: Any  # one of three kinds, asked by what it declares
    if TYPE_CHECKING:
        phoneme_head: PhonemeHead | None
        config: BrainToTextConfig
        frame_mask: Callable[[Tensor], Tensor]
        _counted: Callable[[StepNorms, Batch, Tensor], StepNorms]

    @property
    def reads_phonemes(self) -> bool:
        """Whether the text decoder reads phonemes instead of latents."""
        return self.text_decoder is not None and self.text_decoder.phonemes is not None

    @property
    def predicts_tokens(self) -> bool:
        """Whether the text decoder predicts each token from those before it."""
        return self.text_decoder is not None and self.config.text_decoder["kind"] != "ctc"

    @property
    def lays_tokens(self) -> bool:
        """Whether tokens are laid on frames by CTC."""
        section = self.config.text_decoder
        laid = section["kind"] == "ctc" or section["ctc_weight"] > 0
        return self.text_decoder is not None and laid

    def text_memory(
        self, encoded: Encoded | None, labelled: "Batch | None" = None
    ) -> tuple[Tensor, Tensor]:
        """What the text decoder reads: the quantized latents, or the phonemes heard in them.

        Args:
            encoded: signals; None where ``labelled`` has what is read.
            labelled: a batch whose phoneme labels are read instead of those heard.

        Returns:
            [B, N, width] and the mask [B, N].
        """
        memory = self.text_decoder.phonemes
        if memory is None:
            assert encoded is not None
            return encoded.quantized, encoded.frame_mask
        if labelled is not None:
            return memory.of_labels(labelled.phonemes, labelled.phoneme_lengths)
        assert encoded is not None and self.phoneme_head is not None
        with torch.no_grad():
            logits = self.phoneme_head(encoded.quantized)
        return memory.of_logits(logits, encoded.frame_mask)

    def _spell(
        self, batch: "Batch", norms: StepNorms, weights: Mapping[str, float]
    ) -> BrainToTextOutput:
        """Losses of text alone, from the phonemes of the labels."""
        mask = self.frame_mask(batch.signal_mask)
        logits, total, found = self._predict_text(batch, *self.text_memory(None, batch))
        loss = sums.normalise(total, self._counted(norms, batch, mask).count("tokens"))
        return BrainToTextOutput(
            loss=weights["generation"] * loss,
            losses={"generation": loss},
            frame_mask=mask,
            text_logits=logits,
            metrics={"frames": mask.sum(), **found},
        )

    def _predict_text(self, batch: "Batch", memory: Tensor, mask: Tensor) -> Scored:
        tokens, section = self._checked_tokens(batch), self.config.text_decoder
        if section["kind"] == "ctc":
            logits, found = self.text_decoder.score(memory, mask, tokens)
            rows = {"text_rows": found.rows, "text_rows_too_short": found.too_short}
            return Scored(logits, found.negative_log_likelihood, rows)
        shown, smoothing = tokens, 0.0
        if self.text_decoder.training:
            smoothing = section["label_smoothing"]
            if section["token_errors"]:
                shown = sums.with_slips(tokens, section["token_errors"], self.config.vocab_size)
        logits = self.text_decoder(memory, mask, shown)
        found = sums.token_sums(logits, tokens, smoothing)
        metrics = {"tokens": (tokens != IGNORE).sum(), "tokens_correct": found.correct}
        share = section["ctc_weight"]
        if not share:
            return Scored(logits, found.cross_entropy, metrics)
        heard = self.text_decoder.ctc_sums(memory, mask, tokens)
        total = (1 - share) * found.cross_entropy + share * heard.negative_log_likelihood
        metrics |= {"text_rows": heard.rows, "text_rows_too_short": heard.too_short}
        return Scored(logits, total, metrics)

    def _checked_tokens(self, batch: "Batch") -> Tensor:
        tokens = batch.tokens
        limit = self.config.text_decoder["max_tokens"]
        if tokens.shape[1] > limit:
            lengths = (tokens != IGNORE).sum(1).tolist()
            longest = max(range(len(lengths)), key=lengths.__getitem__)
            if lengths[longest] > limit:
                raise UserError(
                    f"{batch.rows[longest]}: its text has {lengths[longest]} tokens, the text "
                    f"decoder takes {limit}; raise data.max_text_tokens or drop the trial"
                )
            tokens = tokens[:, :limit]
        if tokens.shape[1] == 0:
            return tokens.new_full((tokens.shape[0], 1), IGNORE)
        return tokens
