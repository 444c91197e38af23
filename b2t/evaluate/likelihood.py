"""How likely whole sentences are: by CTC, by a model's own text decoder, by a causal model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from b2t.data.batches.rows import encode_texts
from b2t.errors import UserError
from b2t.labels import IGNORE

if TYPE_CHECKING:
    from b2t.model.brain_to_text import BrainToText

PAIRS = 64
"""Sentences in one forward of a model."""


def ctc_log_likelihood(frames: Tensor, labels: Sequence[Sequence[int]]) -> list[float]:
    """Log-probability of label sequences, summed over all alignments.

    Source: Graves et al., Connectionist Temporal Classification (2006), equation 3.

    Args:
        frames: [P, 41] log-probabilities.
        labels: H sequences of class ids without blanks.

    Returns:
        H numbers; −inf where a sequence needs more frames than there are.
    """
    if not labels:
        return []
    if not len(frames):
        return [0.0 if not len(row) else float("-inf") for row in labels]
    losses = F.ctc_loss(
        frames.double()[:, None].expand(-1, len(labels), -1),
        torch.tensor([label for row in labels for label in row], dtype=torch.int64),
        torch.full((len(labels),), len(frames)),
        torch.tensor([len(row) for row in labels]),
        reduction="none",
    )
    return [-float(loss) for loss in losses]


@torch.no_grad()
def text_decoder_log_likelihood(
    model: "BrainToText", output: Any, rows: Sequence[int], texts: Sequence[str]
) -> list[float]:
    """Log-probability of texts, end token included, under the text decoder of a `BrainToText`.

    Args:
        model: with a text decoder and its tokenizer, in evaluation mode.
        output: what `forward` or `encode_batch` made of B signals.
        rows: H rows of the output, one for each text.
        texts: H texts as the decoder was trained to write them.

    Returns:
        H natural logarithms; −inf for a text longer than the decoder takes.
    """
    memory, mask = model.text_memory(output)
    limit = model.config.text_decoder["max_tokens"]
    labels = [torch.from_numpy(ids) for ids in encode_texts(texts, model.tokenizer)]
    scores = [float("-inf")] * len(texts)
    fitting = [i for i, ids in enumerate(labels) if len(ids) <= limit]
    for some in _alike(fitting, [len(ids) for ids in labels]):
        tokens = pad_sequence([labels[i] for i in some], True, IGNORE).to(memory.device)
        chosen = torch.tensor([rows[i] for i in some], device=memory.device)
        found = model.text_decoder.log_likelihood(memory[chosen], mask[chosen], tokens)
        for i, score in zip(some, found.tolist(), strict=True):
            scores[i] = score
    return scores


class CausalScorer:
    """Any causal language model of transformers, asked how likely sentences are.

    Args:
        checkpoint: folder or Hub id.
        device: a torch device; None takes a GPU where there is one.

    Raises:
        UserError: it cannot be loaded, or is no causal language model.
    """

    def __init__(self, checkpoint: str, device: str | None = None) -> None:
        self.checkpoint = checkpoint
        self._model, self._tokenizer = _load_causal(checkpoint)
        self._model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        ids = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
        self._start = next((i for i in ids if i is not None), None)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[float]:
        """Return the natural logarithm of each text's probability.

        A text begins after the model's start token (its end token where it has no start token);
        no end token is asked for, as models that write stories give it to no sentence.

        Raises:
            UserError: a text of more tokens than the model takes.
        """
        tokens = self._tokenize(texts)
        scores = [0.0] * len(texts)
        known = [i for i, ids in enumerate(tokens) if len(ids) > 1]
        for some in _alike(known, [len(ids) for ids in tokens]):
            rows = [tokens[i] for i in some]
            inputs = pad_sequence(rows, True, 0).to(self._model.device)
            labels = pad_sequence(rows, True, IGNORE).to(self._model.device)
            logits = self._model(
                input_ids=inputs, attention_mask=(labels != IGNORE).long(), use_cache=False
            ).logits
            for i, score in zip(some, _summed(logits[:, :-1], labels[:, 1:]), strict=True):
                scores[i] = score
        return scores

    def _tokenize(self, texts: Sequence[str]) -> list[Tensor]:
        if not texts:
            return []
        start = [] if self._start is None else [self._start]
        found = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        tokens = [torch.tensor([*start, *ids], dtype=torch.int64) for ids in found]
        limit = getattr(self._model.config, "max_position_embeddings", None)
        longest = max(range(len(texts)), key=lambda i: len(tokens[i]))
        if limit is not None and len(tokens[longest]) > limit:
            raise UserError(
                f"{self.checkpoint}: a hypothesis has {len(tokens[longest])} tokens, the model "
                f"takes {limit} ({texts[longest][:40]!r} …); choose one with a longer context"
            )
        return tokens


def _load_causal(checkpoint: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(checkpoint).expanduser()
    place = str(path) if path.is_dir() else checkpoint
    dtype = "auto" if torch.cuda.is_available() else torch.float32
    try:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(place)
    except Exception as error:  # transformers and tokenizers raise bare exceptions on bad files
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{checkpoint}: no causal language model could be loaded ({reason}); expected a folder "
            "that save_pretrained wrote, or a Hub id that can be reached"
        ) from None
    return model.eval(), tokenizer


def _alike(indices: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Groups of at most `PAIRS` of similar length, so that little is padded."""
    ordered = sorted(indices, key=lambda i: lengths[i])
    return [ordered[i : i + PAIRS] for i in range(0, len(ordered), PAIRS)]


def _summed(logits: Tensor, labels: Tensor) -> list[float]:
    """Log-probabilities [B] of labels [B, L] under logits [B, L, V]."""
    losses = F.cross_entropy(
        logits.float().transpose(1, 2), labels, ignore_index=IGNORE, reduction="none"
    )
    return (-losses.double().sum(1)).tolist()
