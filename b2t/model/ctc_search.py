"""Token sequences out of CTC frames: the best path, or a prefix beam."""

import math

import torch
from torch import Tensor

from b2t.labels import IGNORE

PER_FRAME = 20
"""Classes that a beam considers in each frame at most, the likeliest ones."""

_NEVER = -math.inf


def spoken_tokens(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Labels [B, L] without their end tokens, which nobody says, and how many there are, [B]."""
    labelled = tokens != IGNORE
    return tokens.clamp(min=0), (labelled.sum(1) - 1).clamp(min=0)


def best_path(logits: Tensor, mask: Tensor, blank: int) -> list[list[int]]:
    """Read the likeliest class of each frame, repeats merged, blanks dropped.

    Source: Graves et al., Connectionist Temporal Classification (2006), best path decoding.

    Args:
        logits: [B, P, classes].
        mask: [B, P] bool, True = real; masked frames are as if absent.
        blank: class of the blank.

    Returns:
        B lists of classes.
    """
    best, mask = logits.argmax(-1).cpu(), mask.cpu()
    return [
        [c for c in torch.unique_consecutive(classes[keep]).tolist() if c != blank]
        for classes, keep in zip(best, mask, strict=True)
    ]


def prefix_beam(
    frames: Tensor, width: int, blank: int, per_frame: int = PER_FRAME
) -> list[tuple[tuple[int, ...], float]]:
    """Search the label sequences of most probability over all their alignments.

    Source: Hannun et al., First-pass large vocabulary continuous speech recognition using
    bi-directional recurrent DNNs (2014), arXiv 1408.2873, algorithm 1 without a language model.

    Args:
        frames: [P, classes] log-probabilities of the real frames.
        width: prefixes kept after each frame.
        blank: class of the blank.
        per_frame: classes considered in each frame.

    Returns:
        At most ``width`` sequences with the natural logarithm of the probability that the beam has
        seen of them, the best first.
    """
    # Of each prefix: what ends in a blank, and what ends in its last label.
    beam: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, _NEVER)}
    values, classes = frames.double().topk(min(per_frame, frames.shape[1]), dim=1)
    blanks = frames[:, blank].double().tolist()
    for scores, labels, silent in zip(values.tolist(), classes.tolist(), blanks, strict=True):
        scored = [(k, s) for k, s in zip(labels, scores, strict=True) if k != blank]
        known = dict(scored)
        found: dict[tuple[int, ...], tuple[float, float]] = {}
        for prefix, (in_blank, in_label) in beam.items():
            whole = _add(in_blank, in_label)
            stays = in_label + known[prefix[-1]] if prefix and prefix[-1] in known else _NEVER
            _put(found, prefix, whole + silent, stays)
            for label, score in scored:
                repeats = prefix and prefix[-1] == label
                _put(found, (*prefix, label), _NEVER, (in_blank if repeats else whole) + score)
        ranked = sorted(found.items(), key=lambda item: -_add(*item[1]))
        beam = dict(ranked[:width])
    return [(prefix, _add(*ends)) for prefix, ends in beam.items()]


def _put(
    found: dict[tuple[int, ...], tuple[float, float]],
    prefix: tuple[int, ...],
    in_blank: float,
    in_label: float,
) -> None:
    before = found.get(prefix, (_NEVER, _NEVER))
    found[prefix] = (_add(before[0], in_blank), _add(before[1], in_label))


def _add(left: float, right: float) -> float:
    """Logarithm of the sum of two probabilities given by theirs."""
    high, low = (left, right) if left > right else (right, left)
    return high if low == _NEVER else high + math.log1p(math.exp(low - high))
