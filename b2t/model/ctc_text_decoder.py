"""Text from what is heard by CTC: tokens laid on the frames, none by the ones before it."""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from b2t.model import losses as sums
from b2t.model.convolution import Convolution
from b2t.model.ctc_search import best_path, prefix_beam, spoken_tokens
from b2t.model.options import SavedTextDecoderOptions
from b2t.model.phoneme_memory import PhonemeMemory
from b2t.model.text_models import SpecialTokens


class CtcTextDecoder(nn.Module):
    """Convolutions over what is heard, and a linear map to tokens, learnt by CTC.

    Nothing has to find its place in a sentence, as attention must: tokens follow in the order of
    what is heard, and few sentences are enough. Token of padding is CTC's blank.

    Args:
        latent_dim: D, or the width of `phonemes`.
        options: sizes.
        tokens: ids of the tokenizer.
        vocabulary: V.
        phonemes: makes what is read of phonemes; None: it reads latents.
    """

    def __init__(
        self,
        latent_dim: int,
        options: SavedTextDecoderOptions,
        phonemes: PhonemeMemory | None = None,
        *,
        tokens: SpecialTokens,
        vocabulary: int,
    ) -> None:
        super().__init__()
        self.phonemes = phonemes
        self.tokens = tokens
        self.max_tokens = options.max_tokens
        ratio = options.ffn_dim / options.dim
        self.project = nn.Linear(latent_dim, options.dim)
        self.conv = Convolution(
            options.dim, options.depth, options.kernel_size, ratio, options.dropout
        )
        self.classify = nn.Linear(options.dim, vocabulary)

    def forward(self, latents: Tensor, frame_mask: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Score the tokens of every frame.

        Args:
            latents: [B, P, D].
            frame_mask: [B, P] bool, True = real.
            tokens: not looked at; other text decoders read them.

        Returns:
            Logits [B, P, V].
        """
        return self.classify(self.conv(self.project(latents), frame_mask))

    def score(
        self, latents: Tensor, frame_mask: Tensor, tokens: Tensor
    ) -> tuple[Tensor, sums.CtcSums]:
        """Return logits [B, P, V] and the CTC loss of the texts.

        Args:
            latents: [B, P, D].
            frame_mask: [B, P] bool, True = real.
            tokens: [B, L] int64 labels ending in the end token, padded with −100. The end token is
                not learnt: a text ends with the frames.
        """
        logits = self(latents, frame_mask)
        labels, lengths = spoken_tokens(tokens)
        return logits, sums.ctc_sums(logits, frame_mask, labels, lengths, self.tokens.padding)

    def log_likelihood(self, latents: Tensor, frame_mask: Tensor, tokens: Tensor) -> Tensor:
        """Natural logarithm [B] of texts' probabilities; −inf where the frames are too few.

        Arguments as in `score`.
        """
        logits = self(latents, frame_mask)
        labels, lengths = spoken_tokens(tokens)
        return -sums.ctc_nll(logits, frame_mask, labels, lengths, self.tokens.padding)

    @torch.no_grad()
    def generate(
        self,
        latents: Tensor,
        frame_mask: Tensor,
        *,
        num_beams: int = 1,
        num_return_sequences: int = 1,
        max_new_tokens: int | None = None,
        do_sample: bool = False,
    ) -> Tensor:
        """Read tokens [B · returned, ≤ max_new_tokens + 1] that begin with the start token.

        Args:
            latents: [B, P, D].
            frame_mask: [B, P] bool, True = real.
            num_beams: width of a prefix beam; 1 takes the best path.
            num_return_sequences: best sequences of each row; the last is repeated where the beam
                holds fewer.
            max_new_tokens: end token included.
            do_sample: must be False.

        Raises:
            ValueError: sampling, or more sequences than the beam is wide.
        """
        if do_sample or num_return_sequences > num_beams:
            raise ValueError("a CTC decoder reads at most num_beams sequences, and samples none")
        blank = self.tokens.padding
        logits = self(latents, frame_mask).float()
        if num_beams == 1:
            said = best_path(logits, frame_mask, blank)
        else:
            said = []
            for row, mask in zip(logits.log_softmax(-1).cpu(), frame_mask.cpu(), strict=True):
                found = [list(s) for s, _ in prefix_beam(row[mask], num_beams, blank)]
                found += found[-1:] * num_return_sequences
                said += found[:num_return_sequences]
        limit = (self.max_tokens if max_new_tokens is None else max_new_tokens) - 1
        start, end = self.tokens.start, self.tokens.end
        rows = [torch.tensor([start, *row[: max(limit, 0)], end]) for row in said]
        return pad_sequence(rows, True, blank).to(latents.device)

    def checkpoint_activations(self, enabled: bool) -> None:
        """Recompute the activations of every block in backward, or keep them."""
        self.conv.checkpoint_every = int(enabled)

    def keep_frozen(self) -> None:
        """Freeze what never trains: nothing here."""
