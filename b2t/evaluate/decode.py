"""Free-running decoding: what a model says of a signal without being shown the target."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from b2t.data.batches import Batch
from b2t.model.ctc_search import best_path
from b2t.model.tokenizer import decode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from b2t.evaluate.rescoring import WordReader
    from b2t.model.brain_to_text import BrainToText
    from b2t.model.outputs import Encoded

BLANK = 0


def collapse_ctc(logits: Tensor, mask: Tensor) -> list[list[int]]:
    """Greedy CTC decoding: best class per frame, repeats merged, blanks (class 0) dropped.

    Source: Graves et al., Connectionist Temporal Classification (2006), best path decoding.

    Args:
        logits: [B, P, classes].
        mask: [B, P] bool, True = real frame; masked frames are as if absent.

    Returns:
        B lists of class ids.
    """
    return best_path(logits, mask, BLANK)


@torch.no_grad()
def decode_text(
    model: "BrainToText", batch: Batch, tokenizer: "PreTrainedTokenizerBase", **generation: Any
) -> list[str]:
    """Decode the text of each row with ``model.generate``.

    Args:
        model: a `BrainToText` with a text decoder.
        batch: signals on the model's device; its labels are not looked at.
        tokenizer: the tokenizer saved with the model.
        generation: `num_beams`, `max_new_tokens` and other arguments of transformers' generate.

    Returns:
        B strings.
    """
    tokens = model.generate(batch, **generation)
    return [text.strip() for text in decode_texts(tokenizer, tokens)]


@torch.no_grad()
def decode_encoded(
    model: "BrainToText",
    encoded: "Encoded",
    tokenizer: "PreTrainedTokenizerBase",
    **generation: Any,
) -> list[str]:
    """Decode texts of latents that are there, as `decode_text` does of signals.

    Args:
        model: a `BrainToText` with a text decoder, in evaluation mode.
        encoded: with `quantized` [B, P, D] and `frame_mask` [B, P].
        tokenizer: as in `decode_text`.
        generation: as in `decode_text`, `num_beams` and `max_new_tokens` included.
    """
    tokens = model.text_decoder.generate(*model.text_memory(encoded), **generation)
    return [text.strip() for text in decode_texts(tokenizer, tokens)]


def decode_batches(
    model: "BrainToText",
    batches: Iterable[Batch],
    tokenizer: "PreTrainedTokenizerBase",
    **generation: Any,
) -> Iterator[tuple[str, str]]:
    """Yield (row id, text) for every row of ``batches``, the model in evaluation mode."""
    training = model.training
    model.eval()
    try:
        for batch in batches:
            batch = to_model(batch, model)
            yield from zip(
                batch.rows, decode_text(model, batch, tokenizer, **generation), strict=True
            )
    finally:
        model.train(training)


@torch.no_grad()
def read_batches(
    model: "BrainToText", batches: Iterable[Batch], words: "WordReader"
) -> Iterator[tuple[str, str]]:
    """Yield (row id, text) for every row, words read by a `WordReader`, jointly where it can."""
    for batch in batches:
        output = model.eval()(to_model(batch, model), weights={"phoneme": 1.0})
        found = words.read(output)
        yield from zip(batch.rows, found.first if found.joint is None else found.joint, strict=True)


@torch.no_grad()
def rank_batches(
    model: "BrainToText", batches: Iterable[Batch], words: "WordReader", number: int
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield (row id, hypotheses) for every row: their `text`, `score` and its parts, best first."""
    for batch in batches:
        output = model.eval()(to_model(batch, model), weights={"phoneme": 1.0})
        yield from zip(batch.rows, words.ranked(output, number), strict=True)


def to_model(batch: Batch, model: "BrainToText") -> Batch:
    """Move a batch to the device and floating-point type of the model's parameters."""
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    return batch.to(parameter.device, parameter.dtype)
