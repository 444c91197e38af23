"""CTC whose gradient is the same bits each time, on a GPU too.

torch's own backward adds up on a GPU in whatever order its threads come. Here the occupancies of
Graves et al. 2006, eq. 14, are a matrix product: the forward variables are torch's, and so are the
backward variables, as the forward variables of everything reversed in time.
"""

from typing import Any

import torch
from torch import Tensor


def repeatable_ctc(
    log_probs: Tensor, labels: Tensor, frames: Tensor, lengths: Tensor, blank: int
) -> Tensor:
    """Negative log-likelihood [B] of labels over all alignments, in nats.

    Args:
        log_probs: [P, B, classes] logarithms of probabilities.
        labels: [B, S] int64 classes other than the blank.
        frames: [B] int64, at least 1: how many of P count.
        lengths: [B] int64: how many labels of S count; they fit into the frames.
        blank: class of the blank.
    """
    nll: Tensor = _Ctc.apply(log_probs, labels, frames, lengths, blank)
    return nll


class _Ctc(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, *labelling: Any) -> Tensor:
        nll, alpha = torch._ctc_loss(log_probs, *labelling)
        ctx.save_for_backward(log_probs, *labelling[:3], nll, alpha)
        ctx.blank = labelling[3]
        return nll

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        log_probs, labels, frames, lengths, nll, alpha = ctx.saved_tensors
        classes = _classes(labels, alpha.shape[2], ctx.blank)
        beta = _backward_variables(log_probs, labels, frames, lengths, ctx.blank)
        emission = log_probs.transpose(0, 1).gather(2, classes[:, None].expand(alpha.shape))
        state, time = (torch.arange(size, device=alpha.device) for size in alpha.shape[2:0:-1])
        real = (state <= 2 * lengths[:, None])[:, None] & (time < frames[:, None])[..., None]
        # A class of probability 0 has no path through it, on either side.
        real &= emission > -torch.inf
        exponent = torch.where(real, alpha + beta - emission + nll[:, None, None], -torch.inf)
        which = torch.nn.functional.one_hot(classes, log_probs.shape[2]).to(log_probs.dtype)
        occupancy = exponent.exp() @ which
        found = -occupancy * gradients[0][:, None, None]
        return found.transpose(0, 1), None, None, None, None


def _classes(labels: Tensor, states: int, blank: int) -> Tensor:
    """Class of every state of a path, blanks around all labels: [B, states]."""
    classes = labels.new_full((labels.shape[0], states), blank)
    classes[:, 1::2] = labels[:, : states // 2]
    return classes


def _backward_variables(
    log_probs: Tensor, labels: Tensor, frames: Tensor, lengths: Tensor, blank: int
) -> Tensor:
    """Return log β [B, P, states], the frame's emission included; arbitrary where nothing is."""
    rows = torch.arange(labels.shape[0], device=labels.device)[:, None]
    place = torch.arange(labels.shape[1], device=labels.device)
    time = torch.arange(log_probs.shape[0], device=labels.device)
    backwards = (frames[:, None] - 1 - time).clamp(min=0)
    reversed_labels = labels[rows, (lengths[:, None] - 1 - place).clamp(min=0)]
    reversed_probs = log_probs.transpose(0, 1)[rows, backwards].transpose(0, 1)
    beta = torch._ctc_loss(reversed_probs, reversed_labels, frames, lengths, blank)[1]
    states = 2 * lengths[:, None] - torch.arange(beta.shape[2], device=labels.device)
    return beta[rows[..., None], backwards[..., None], states.clamp(min=0)[:, None]]
