"""CTC whose gradient is the same bits each time, on a GPU too, and asks nothing of the device.

torch's own backward adds up on a GPU in whatever order its threads come. Here the occupancies of
Graves et al. 2006, eq. 14, are a matrix product: the forward variables are torch's, and so are the
backward variables, as the forward variables of everything reversed in time. Neither depends on how
many frames and labels a row really has, so that torch need not wait to know.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def repeatable_ctc(
    log_probs: Tensor, labels: Tensor, frames: Tensor, lengths: Tensor, blank: int
) -> Tensor:
    """Negative log-likelihood [B] of labels over all alignments, in nats.

    Args:
        log_probs: [P, B, classes] logarithms of probabilities.
        labels: [B, S] int64 classes other than the blank.
        frames: [B] int64, at least 1: how many of P count.
        lengths: [B] int64: how many labels of S count. What does not fit into the frames has an
            infinite result, and no gradient.
        blank: class of the blank.
    """
    nll: Tensor = _Ctc.apply(log_probs, labels.clamp(min=0), frames, lengths, blank)
    return nll


class _Ctc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, log_probs: Tensor, labels: Tensor, frames: Tensor, lengths: Tensor, blank: int
    ) -> Tensor:
        both = log_probs, labels
        if ctx.needs_input_grad[0]:
            pairs = zip(both, _reversed(log_probs, labels, frames, lengths), strict=True)
            both = torch.cat((next(pairs)), dim=1), torch.cat(next(pairs))
        found = _forward_variables(*both, blank)
        alpha, beta = found[: len(labels)], found[len(labels) :]
        row, last = torch.arange(len(labels), device=labels.device), frames - 1
        before = alpha[row, last, (2 * lengths - 1).clamp(min=0)]
        before = before.masked_fill(lengths == 0, -torch.inf)
        nll = -torch.logaddexp(before, alpha[row, last, 2 * lengths])
        ctx.save_for_backward(log_probs, labels, frames, lengths, nll, alpha, beta)
        ctx.blank = blank
        return nll

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        log_probs, labels, frames, lengths, nll, alpha, beta = ctx.saved_tensors
        beta = _turned_back(beta, frames, lengths)
        classes = _classes(labels, alpha.shape[2], ctx.blank)
        emission = log_probs.transpose(0, 1).gather(2, classes[:, None].expand(alpha.shape))
        state, time = (torch.arange(size, device=alpha.device) for size in alpha.shape[2:0:-1])
        real = (state <= 2 * lengths[:, None])[:, None] & (time < frames[:, None])[..., None]
        # A class of probability 0 has no path through it, on either side.
        real &= (emission > -torch.inf) & nll.isfinite()[:, None, None]
        exponent = torch.where(real, alpha + beta - emission + nll[:, None, None], -torch.inf)
        which = F.one_hot(classes, log_probs.shape[2]).to(log_probs.dtype)
        occupancy = exponent.exp() @ which
        found = -occupancy * gradients[0][:, None, None]
        return found.transpose(0, 1), None, None, None, None


def _forward_variables(log_probs: Tensor, labels: Tensor, blank: int) -> Tensor:
    """Return log α [B, P, 2 S + 1] of all frames and labels, as if every one counted."""
    rows, places = labels.shape
    frames = [log_probs.shape[0]] * rows
    alpha: Tensor = torch._ctc_loss(log_probs, labels, frames, [places] * rows, blank)[1]
    return alpha


def _classes(labels: Tensor, states: int, blank: int) -> Tensor:
    """Class of every state of a path, blanks around all labels: [B, states]."""
    classes = labels.new_full((labels.shape[0], states), blank)
    classes[:, 1::2] = labels
    return classes


def _reversed(
    log_probs: Tensor, labels: Tensor, frames: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Return log_probs and labels with those of each row that count in the opposite order."""
    rows = torch.arange(len(labels), device=labels.device)[:, None]
    place = torch.arange(labels.shape[1], device=labels.device)
    backwards = _backwards(log_probs.shape[0], frames)
    turned = labels[rows, (lengths[:, None] - 1 - place).clamp(min=0)]
    return log_probs.transpose(0, 1)[rows, backwards].transpose(0, 1), turned


def _backwards(length: int, counts: Tensor) -> Tensor:
    """Return the places [B, length] of what counts, the last first; what follows is arbitrary."""
    place = torch.arange(length, device=counts.device)
    return (counts[:, None] - 1 - place).clamp(min=0)


def _turned_back(beta: Tensor, frames: Tensor, lengths: Tensor) -> Tensor:
    """Return log β [B, P, states], the frame's emission included, of α of what was reversed."""
    rows = torch.arange(len(beta), device=beta.device)[:, None, None]
    time = _backwards(beta.shape[1], frames)[..., None]
    return beta[rows, time, _backwards(beta.shape[2], 2 * lengths + 1)[:, None]]
