"""Sums over real elements, in float32, for losses that a count normalises.

Every function returns sums, not means: divided by counts of the whole global batch they add up to
the global mean over any split into micro-batches and ranks.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from b2t.labels import IGNORE
from b2t.model.ctc_gradient import repeatable_ctc
from b2t.quantize.norms import Number


class ReconstructionSums(NamedTuple):
    """Sums over the real bins and all channels; SNR in dB is 10·log10(power / squared_error)."""

    squared_error: Tensor
    """0-d, differentiable."""
    power: Tensor
    """0-d, sum of the squared target."""


def reconstruction_sums(prediction: Tensor, target: Tensor, mask: Tensor) -> ReconstructionSums:
    """Squared error and power of the target over real bins.

    Args:
        prediction: [B, T, C].
        target: [B, T, C].
        mask: [B, T] bool, True = real; what stands elsewhere, NaN included, changes nothing.
    """
    hidden = ~mask[..., None]
    target = target.float().masked_fill(hidden, 0.0)
    error = prediction.float().masked_fill(hidden, 0.0) - target
    return ReconstructionSums(error.square().sum(), target.square().sum().detach())


class TokenSums(NamedTuple):
    """Sums over the tokens that count."""

    cross_entropy: Tensor
    """0-d, differentiable, in nats."""
    correct: Tensor
    """0-d, tokens whose most likely prediction is right, given the true ones before."""


def token_sums(logits: Tensor, tokens: Tensor, smoothing: float = 0.0) -> TokenSums:
    """Cross entropy of the text.

    Args:
        logits: [B, L, V].
        tokens: [B, L] int64; positions with −100 do not count.
        smoothing: share of each target that is spread over all V tokens (Szegedy et al. 2016).
    """
    logits = logits.float()
    entropy = F.cross_entropy(
        logits.flatten(0, 1),
        tokens.flatten(),
        ignore_index=IGNORE,
        reduction="sum",
        label_smoothing=smoothing,
    )
    return TokenSums(entropy, (logits.argmax(-1) == tokens).sum().detach())


def with_slips(tokens: Tensor, rate: float, vocabulary: int) -> Tensor:
    """Replace a share of the tokens by random ones, for a decoder that is to go on from mistakes.

    Args:
        tokens: [B, L] int64; positions with −100 stay.
        rate: probability of each.
        vocabulary: V.
    """
    slips = torch.rand(tokens.shape, device=tokens.device) < rate
    others = torch.randint(0, vocabulary, tokens.shape, device=tokens.device)
    return torch.where(slips & (tokens != IGNORE), others, tokens)


class CtcSums(NamedTuple):
    """Sums over the rows whose labels fit into their frames."""

    negative_log_likelihood: Tensor
    """0-d, differentiable, in nats."""
    rows: Tensor
    """0-d, rows that count."""
    too_short: Tensor
    """0-d, rows left out because they have labels but too few frames for them."""


def fitting_rows(frame_mask: Tensor, labels: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Tell rows whose labels CTC can lay on their frames from rows that are too short for them.

    A path needs one frame per label and one more between two equal ones.

    Args:
        frame_mask: [B, P] bool, True = real.
        labels: [B, S] int64, phonemes or tokens; what stands beyond the lengths does not count.
        lengths: [B] int64, 0 = no labels.

    Returns:
        Rows that count and rows that are too short, [B] bool each; rows without labels are
        neither.
    """
    place = torch.arange(1, max(1, labels.shape[1]), device=labels.device)
    repeated = (labels[:, 1:] == labels[:, :-1]) & (place < lengths[:, None])
    fits = frame_mask.sum(1) >= lengths + repeated.sum(1)
    return fits & (lengths > 0), ~fits & (lengths > 0)


def ctc_sums(
    logits: Tensor, frame_mask: Tensor, labels: Tensor, lengths: Tensor, blank: int = 0
) -> CtcSums:
    """CTC loss (Graves et al. 2006).

    Rows that have fewer frames than a path needs (`fitting_rows`) are left out and counted. Rows
    without labels are left out.

    Args:
        logits: [B, P, classes].
        frame_mask: [B, P] bool, True = real; the real frames count, wherever they stand.
        labels: [B, S] int64 classes other than the blank.
        lengths: [B] int64, 0 = no labels.
        blank: class of the blank.
    """
    if labels.shape[1] == 0:
        labels = labels.new_zeros(labels.shape[0], 1)
    used, too_short = fitting_rows(frame_mask, labels, lengths)
    nll = ctc_nll(logits, frame_mask, labels, torch.where(used, lengths, 0), blank)
    total = torch.where(used, nll, 0.0).sum()
    return CtcSums(total, used.sum(), too_short.sum())


def ctc_nll(
    logits: Tensor, frame_mask: Tensor, labels: Tensor, lengths: Tensor, blank: int
) -> Tensor:
    """Negative log-likelihood [B] of labels over all alignments; arguments as in `ctc_sums`."""
    real_first = frame_mask.int().argsort(dim=1, descending=True, stable=True)
    logits = logits.float().masked_fill(~frame_mask[..., None], 0.0)
    logits = logits[torch.arange(len(logits), device=logits.device)[:, None], real_first]
    log_probs, frames = logits.log_softmax(-1).transpose(0, 1), frame_mask.sum(1).clamp(min=1)
    if logits.is_cuda and torch.are_deterministic_algorithms_enabled():
        return repeatable_ctc(log_probs, labels, frames, lengths, blank)
    return F.ctc_loss(log_probs, labels, frames, lengths, blank=blank, reduction="none")


def normalise(total: Tensor, count: Number) -> Tensor:
    """Divide a sum by a count; nothing to count gives a zero that still has its graph."""
    if isinstance(count, Tensor):
        return total / count.to(total.device, torch.float32).clamp(min=1e-6)
    return total / max(float(count), 1e-6)
