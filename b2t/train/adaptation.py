"""A session that nobody labelled: its map of the channels learns from what the model hears in it.

Source: self-training on labels that a language model has corrected, as Fan et al. 2023 (arXiv
2311.03611) do for a decoder of handwriting; here the session's map alone moves, and without a
language model the phonemes that CTC hears are the labels.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from b2t.data.batches import Batch
from b2t.data.phonemes import sentence_to_ids
from b2t.errors import UserError
from b2t.evaluate.decode import collapse_ctc, to_model
from b2t.evaluate.metrics import phoneme_error_rate
from b2t.model.brain_to_text import COMPONENTS
from b2t.quantize import StepNorms

if TYPE_CHECKING:
    from b2t.evaluate.words import WordDecoder
    from b2t.model.brain_to_text import BrainToText


class PseudoLabel(NamedTuple):
    """What a model hears in a trial."""

    phonemes: list[int]
    """Class ids 1–40."""
    confidence: float
    """Between 0 and 1: mean posterior of the phonemes that CTC hears; with a language model times
    the share of phonemes that both agree on."""


@dataclass(frozen=True, kw_only=True)
class AdaptationOptions:
    """How a session's map is adapted.

    Args:
        rounds: times that labels are made anew.
        epochs: passes over the labelled trials in a round.
        lr: of AdamW, without weight decay.
        keep: share of the trials that are learnt from, the most confident ones.
    """

    rounds: int = 4
    epochs: int = 3
    lr: float = 1e-3
    keep: float = 0.8


def add_sessions(model: "BrainToText", names: Sequence[str]) -> "BrainToText":
    """Return a copy of a model with maps for more sessions, each the mean of the others.

    Args:
        model: a `BrainToText` with an adapter and trained sessions.
        names: of the new sessions.

    Raises:
        UserError: there is no adapter, or none of its maps belongs to a session.
    """
    if model.adapter is None or not model.config.sessions:
        raise UserError(
            "this model has no maps of sessions (model.adapter.enabled), which are what adapts"
        )
    grown = copy.deepcopy(model)
    grown.tokenizer = model.tokenizer
    grown.config.sessions = [*model.config.sessions, *names]
    for name in ("weight", "bias"):
        maps: Tensor = getattr(grown.adapter, name).detach()
        mean = maps.mean(0, keepdim=True).repeat(len(names), *[1] * (maps.dim() - 1))
        setattr(grown.adapter, name, nn.Parameter(torch.cat((maps, mean))))
    return grown


@torch.no_grad()
def hear(
    model: "BrainToText", batches: Iterable[Batch], words: "WordDecoder | None" = None
) -> dict[str, PseudoLabel]:
    """Label every row by what the model hears in it.

    Args:
        model: a `BrainToText` with a phoneme head.
        batches: unaugmented; their labels are not looked at.
        words: a `WordDecoder` that corrects; None takes the phonemes as heard.

    Returns:
        Labels by row id.
    """
    found = {}
    model.eval()
    for batch in batches:
        batch = to_model(batch, model)
        output = model(batch, weights={"phoneme": 1.0})
        logits, mask = output.phoneme_logits, output.frame_mask
        heard = collapse_ctc(logits, mask)
        sure = _confidence(logits, mask)
        texts = [None] * len(heard) if words is None else words.decode(logits, mask)
        for row, phonemes, confidence, text in zip(batch.rows, heard, sure, texts, strict=True):
            if text is not None:
                said = sentence_to_ids(text)
                confidence *= max(1.0 - (phoneme_error_rate([said], [phonemes]) or 0.0), 0.0)
                phonemes = said
            found[row] = PseudoLabel(phonemes, confidence if phonemes else 0.0)
    return found


def _confidence(logits: Tensor, mask: Tensor) -> list[float]:
    """Mean posterior of the best class over real frames where it is no blank, per row."""
    best, classes = logits.softmax(-1).max(-1)
    spoken = (mask & (classes != 0)).float()
    return ((best * spoken).sum(1) / spoken.sum(1).clamp(min=1.0)).tolist()


class Round(NamedTuple):
    """What a round of adaptation did."""

    labels: dict[str, PseudoLabel]
    """Heard after it."""
    confidence: float
    """Their mean."""
    loss: float
    """Mean CTC loss per phoneme, in nats, of its last epoch; NaN before the first round."""


def adapt(
    model: "BrainToText",
    sessions: Sequence[int],
    heard: Callable[[], dict[str, PseudoLabel]],
    batches: Callable[[int, set[str]], Iterable[Batch]],
    options: AdaptationOptions,
) -> Iterator[Round]:
    """Adapt the maps of sessions to what is heard in their trials; yield after each round.

    Nothing else of the model moves, and its dropout stays off. The first that is yielded is what
    was heard before.

    Args:
        model: a `BrainToText`, changed.
        sessions: indices of the maps that move.
        heard: labels all trials by the model as it is.
        batches: an epoch of augmented trials: of its number, and of the rows to learn from.
        options: rounds, epochs, learning rate and share of the trials.

    Raises:
        UserError: nothing is heard in any trial.
    """
    model.freeze([name for name in COMPONENTS if name != "adapter"])
    assert model.adapter is not None
    maps: list[Tensor] = [model.adapter.weight, model.adapter.bias]
    fixed = torch.ones(len(maps[1]), dtype=torch.bool, device=maps[1].device)
    fixed[list(sessions)] = False
    optimizer = torch.optim.AdamW(maps, lr=options.lr, weight_decay=0.0)
    labels = heard()
    yield Round(labels, _mean(labels), float("nan"))
    for number in range(options.rounds):
        chosen = _confident(labels, options.keep)
        total = count = 0.0
        for epoch in range(options.epochs):
            total = count = 0.0
            for batch in batches(number * options.epochs + epoch, chosen):
                loss, phonemes = _learn(model, _labelled(batch, labels), optimizer, maps, fixed)
                total, count = total + loss, count + phonemes
        labels = heard()
        yield Round(labels, _mean(labels), total / max(count, 1.0))
    model.freeze()


def _learn(
    model: "BrainToText",
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    maps: list[Tensor],
    fixed: Tensor,
) -> tuple[float, float]:
    """Take one step; return the sum of the CTC losses, and the phonemes that it is over."""
    batch = to_model(batch, model)
    model.eval()
    counts = model.counts(batch)
    loss = model(batch, StepNorms(counts), {"phoneme": 1.0}).loss
    optimizer.zero_grad()
    loss.backward()
    for each in maps:
        assert each.grad is not None
        # Without gradient and decay, AdamW leaves the maps of other sessions as they are.
        each.grad[fixed] = 0.0
    nn.utils.clip_grad_norm_(maps, 1.0)
    optimizer.step()
    phonemes = float(counts["phonemes"])
    return float(loss.detach()) * phonemes, phonemes


def _labelled(batch: Batch, labels: dict[str, PseudoLabel]) -> Batch:
    """Put pseudo-labels in the place of a batch's own."""
    said = [labels[row].phonemes for row in batch.rows]
    ids = torch.zeros(len(said), max(map(len, said)), dtype=torch.int64)
    for row, phonemes in zip(ids, said, strict=True):
        row[: len(phonemes)] = torch.tensor(phonemes)
    lengths = torch.tensor([len(phonemes) for phonemes in said])
    return replace(batch, phonemes=ids, phoneme_lengths=lengths, _counts=None)


def _confident(labels: dict[str, PseudoLabel], keep: float) -> set[str]:
    heard = sorted(row for row in labels if labels[row].phonemes)
    if not heard:
        raise UserError("the model hears no phoneme in any trial: there is nothing to learn from")
    order = np.argsort([-labels[row].confidence for row in heard], kind="stable")
    return {heard[place] for place in order[: max(round(keep * len(heard)), 1)]}


def _mean(labels: dict[str, PseudoLabel]) -> float:
    return float(np.mean([label.confidence for label in labels.values()]))
