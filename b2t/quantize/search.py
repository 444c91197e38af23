"""Searches over a codebook in blocks of frames: no N × K matrix is ever held."""

from __future__ import annotations

import torch
from torch import Tensor

from b2t.quantize.frame_hash import frame_gumbel

_BLOCK_SCORES = 1 << 22


def _blocks(frames: int, codes: int) -> range:
    return range(0, frames, _block(codes))


def _block(codes: int) -> int:
    return max(1, _BLOCK_SCORES // codes)


def _centred(codebook: Tensor) -> tuple[Tensor, Tensor]:
    center = codebook.mean(0)
    return center, codebook - center


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code of ``codebook`` [K, D] for each frame of ``x`` [N, D]; int64 [N].

    Maximizes x·c − ½|c|² after subtracting the codebook's mean from both, so that an offset shared
    by frames and codes costs no precision.
    """
    center, codes = _centred(codebook)
    bias = -0.5 * codes.square().sum(1)
    result = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    step = _block(codes.shape[0])
    for start in _blocks(x.shape[0], codes.shape[0]):
        block = x[start : start + step] - center
        result[start : start + step] = torch.addmm(bias, block, codes.T).argmax(1)
    return result


def sample(
    x: Tensor, codebook: Tensor, inverse_scale: Tensor, hashes: Tensor, layer: int
) -> Tensor:
    """Codes drawn with probability ∝ exp(−‖x−c‖² · inverse_scale) by the Gumbel-max trick."""
    center, codes = _centred(codebook)
    bias = -0.5 * codes.square().sum(1)
    result = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    step = _block(codes.shape[0])
    for start in _blocks(x.shape[0], codes.shape[0]):
        scores = torch.addmm(bias, x[start : start + step] - center, codes.T)
        noise = frame_gumbel(hashes[start : start + step], codes.shape[0], layer)
        result[start : start + step] = (2 * inverse_scale * scores + noise).argmax(1)
    return result


def code_sums(x: Tensor, indices: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Sum [K, D] float32 and number [K] int64 of the frames ``x`` [N, D] of each code."""
    sums = x.new_zeros(codes, x.shape[1])
    sums.index_add_(0, indices, x)
    return sums, torch.bincount(indices, minlength=codes)


class _Usage(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, codebook: Tensor) -> Tensor:  # type: ignore[override]
        center, codes = _centred(codebook)
        bias = -codes.square().sum(1)
        total = x.new_zeros(codes.shape[0])
        log_norm = x.new_zeros(x.shape[0])
        step = _block(codes.shape[0])
        for start in _blocks(x.shape[0], codes.shape[0]):
            rows = slice(start, start + step)
            logits = torch.addmm(bias, x[rows] - center, codes.T, alpha=2.0)
            log_norm[rows] = torch.logsumexp(logits, 1)
            total += logits.sub_(log_norm[rows, None]).exp_().sum(0)
        ctx.save_for_backward(x, codebook, log_norm)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, codebook, log_norm = ctx.saved_tensors
        center, codes = _centred(codebook)
        bias = -codes.square().sum(1)
        grad_x = torch.empty_like(x)
        grad_codes = torch.zeros_like(codes)
        column = x.new_zeros(codes.shape[0])
        step = _block(codes.shape[0])
        for start in _blocks(x.shape[0], codes.shape[0]):
            rows = slice(start, start + step)
            block = x[rows] - center
            p = torch.addmm(bias, block, codes.T, alpha=2.0).sub_(log_norm[rows, None]).exp_()
            p.mul_(grad - (p @ grad)[:, None])
            grad_x[rows] = 2.0 * (p @ codes)
            grad_codes.addmm_(p.T, block, alpha=2.0)
            column += p.sum(0)
        grad_codes -= 2.0 * column[:, None] * codes
        return grad_x, grad_codes


def soft_usage(x: Tensor, codebook: Tensor, inverse_scale: Tensor) -> Tensor:
    """Sum over frames of softmax(−‖x−c‖² · inverse_scale); [K], differentiable in x and codebook.

    Two streaming passes (online normalizer, then gradients), memory O(N + K·D).
    """
    root = inverse_scale.sqrt()
    return _Usage.apply(x * root, codebook * root)
