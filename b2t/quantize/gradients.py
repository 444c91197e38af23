"""Gradients that a quantizer defines itself."""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-6
_ROWS = 8192


class _Quantized(torch.autograd.Function):
    """Value of the quantized sum, bit for bit, with a gradient for its input."""

    @staticmethod
    def forward(ctx, x: Tensor, quantized: Tensor, rotation: bool) -> Tensor:  # type: ignore[override]
        ctx.rotation = rotation
        if rotation:
            ctx.save_for_backward(x, quantized)
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        if not ctx.rotation:
            return grad, None, None
        x, quantized = ctx.saved_tensors
        rotated = torch.empty_like(grad)
        # A dozen temporaries: in blocks of rows they stay small.
        for start in range(0, grad.shape[0], _ROWS):
            rows = slice(start, start + _ROWS)
            rotated[rows] = _rotate_back(x[rows], quantized[rows], grad[rows])
        return rotated, None, None


def _rotate_back(x: Tensor, quantized: Tensor, grad: Tensor) -> Tensor:
    """λRᵀ·grad, R the rotation of x onto quantized and λ the ratio of their lengths."""
    x_norm = x.norm(dim=-1, keepdim=True)
    q_norm = quantized.norm(dim=-1, keepdim=True)
    u = x / x_norm.clamp(min=_TINY)
    v = quantized / q_norm.clamp(min=_TINY)
    between = u + v
    between_norm = between.norm(dim=-1, keepdim=True)
    w = between / between_norm.clamp(min=_TINY)
    rotated = (
        grad - 2 * w * (w * grad).sum(-1, keepdim=True) + 2 * u * (v * grad).sum(-1, keepdim=True)
    )
    # Without a direction there is no rotation: at either end zero, or exactly opposite.
    defined = (x_norm > _TINY) & (q_norm > _TINY) & (between_norm > _TINY)
    return torch.where(defined, rotated * (q_norm / x_norm.clamp(min=_TINY)), grad)


def pass_gradient(x: Tensor, quantized: Tensor, rotation_trick: bool) -> Tensor:
    """``quantized`` [N, D] exactly, with gradients to ``x`` [N, D].

    Straight through, or by the rotation trick (Fifty et al. 2024, arXiv 2410.06424) where the
    rotation and rescaling that carry x onto the whole quantized sum are held constant.
    """
    return _Quantized.apply(x, quantized.detach(), rotation_trick)


class _Commitment(torch.autograd.Function):
    """Σ over layers of ‖residual after the layer‖², from what was kept while searching."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, x: Tensor, total: Tensor, errors: Tensor | None, quantized: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*([x, quantized] if errors is None else [errors]))
        return total.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        saved = ctx.saved_tensors
        if len(saved) == 1:
            return 2.0 * grad * saved[0], None, None, None
        return torch.sub(*saved).mul_(2.0 * grad), None, None, None


def squared_commitment(
    x: Tensor, total: Tensor, errors: Tensor | None, quantized: Tensor
) -> Tensor:
    """``total`` = Σ_q‖r_q − sg(c_q)‖² with gradient 2·Σ_q (r_q − c_q) into ``x`` [N, D].

    One saved tensor instead of one for each layer, and none beside the output where there is one
    layer.

    Args:
        x: [N, D].
        total: [] the loss's value.
        errors: [N, D], Σ_q (r_q − c_q); None for a single layer, whose error is x − ``quantized``.
        quantized: [N, D].
    """
    return _Commitment.apply(x, total, errors, quantized)


class _Codebook(torch.autograd.Function):
    """Σ over frames of ‖sg(r) − c‖², from counts and sums."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, embed: Tensor, counts: Tensor, sums: Tensor, total: Tensor
    ) -> Tensor:
        ctx.save_for_backward(embed, counts, sums)
        return total.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        embed, counts, sums = ctx.saved_tensors
        return 2.0 * grad * (counts[..., None] * embed - sums), None, None, None


def squared_codebook(embed: Tensor, counts: Tensor, sums: Tensor, total: Tensor) -> Tensor:
    """``total`` = Σ‖sg(r) − c‖² with its gradient into ``embed`` [L, K, D], 2·(n·c − Σr).

    Args:
        embed: [L, K, D].
        counts: [L, K], frames of each code.
        sums: [L, K, D], their residuals summed.
        total: [] the loss's value.
    """
    return _Codebook.apply(embed, counts, sums, total)


class _Master(torch.autograd.Function):
    """Float32 value of a parameter that may be stored in less, with a scaled gradient."""

    @staticmethod
    def forward(ctx, weight: Tensor, value: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        ctx.scale, ctx.dtype = scale, weight.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return (grad * ctx.scale).to(ctx.dtype), None, None


def master_value(weight: Tensor, value: Tensor, scale: float) -> Tensor:
    """``value`` (float32), whose gradient goes to ``weight`` times ``scale``."""
    return _Master.apply(weight, value, scale)
