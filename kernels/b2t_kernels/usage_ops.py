"""Soft assignment as a public operator, alone or found in the same pass as the nearest codes.

Letters as in ``ops``.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from b2t_kernels import blocked, blocked_codes, cuda
from b2t_kernels.checks import check_precision, check_search
from b2t_kernels.ops import Precision, Prepared, on_device, undispatched

_Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("b2t_kernels::usage_forward", mutates_args=(), device_types="cpu")
def _usage_forward(
    x: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    exact: bool | None,
    prepared: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    codes = blocked_codes.centred(prepared, x)
    return blocked.usage_forward(x, codebook, temperature, mask, codes, exact)


@_usage_forward.register_kernel("cuda")
def _(x, codebook, temperature, mask, exact, prepared) -> _Forward:
    found = cuda.usage_forward(x, codebook, temperature, mask, exact, prepared)
    total, lse, frames, indices, counts = found
    # Counts lie in one buffer with the number of rows, and results must not share memory.
    return total, lse, frames.clone(), indices, counts.clone()


@_usage_forward.register_fake
def _(x, codebook, temperature, mask, exact, prepared) -> _Forward:
    dtype, K, N = blocked_codes.working_dtype(x), codebook.shape[0], x.shape[0]
    return (
        x.new_empty(K, dtype=dtype),
        x.new_empty(N, dtype=dtype),
        x.new_empty((), dtype=torch.int64),
        x.new_empty(0 if exact is None else N, dtype=torch.int64),
        x.new_empty(0 if exact is None else K, dtype=torch.int64),
    )


@torch.library.custom_op("b2t_kernels::usage_backward", mutates_args=(), device_types="cpu")
def _usage_backward(
    grad: Tensor,
    x: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    lse: Tensor,
    rows: bool,
    codes: bool,
    prepared: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    return blocked.usage_backward(
        grad, x, codebook, temperature, lse, blocked_codes.centred(prepared, x), (rows, codes)
    )


@_usage_backward.register_kernel("cuda")
def _run_backward(
    grad, x, codebook, temperature, lse, rows, codes, prepared
) -> tuple[Tensor, Tensor]:
    return cuda.usage_backward(grad, x, codebook, temperature, lse, (rows, codes), prepared)


@_usage_backward.register_fake
def _(grad, x, codebook, temperature, lse, rows, codes, prepared) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape if rows else (0, x.shape[1])),
        codebook.new_empty(codebook.shape if codes else (0, codebook.shape[1])),
    )


def _gradients(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, int]:
    """Of x and the codebook, each only where something needs it: either is a third of the work.

    And how many prepared tensors there are: they may be unpacked only once.
    """
    x, codebook, temperature, lse, *prepared = ctx.saved_tensors
    rows, codes = ctx.needs_input_grad[:2]
    backward = _run_backward if undispatched(x) and undispatched(grad) else _usage_backward
    grad_x, grad_codebook = backward(
        grad.contiguous(), x, codebook, temperature, lse, rows, codes, prepared
    )
    return grad_x if rows else None, grad_codebook if codes else None, len(prepared)


def _save_usage(ctx, inputs, output) -> None:
    x, codebook, temperature, _, _, prepared = inputs
    _, lse, *others = output
    ctx.mark_non_differentiable(lse, *others)
    ctx.save_for_backward(x, codebook, temperature, lse, *prepared)


def _differentiate_usage(ctx, grad, *_):
    grad_x, grad_codebook, prepared = _gradients(ctx, grad)
    return grad_x, grad_codebook, None, None, None, [None] * prepared


_usage_forward.register_autograd(_differentiate_usage, setup_context=_save_usage)


def _scale(temperature: float | Tensor, x: Tensor) -> Tensor:
    return on_device(temperature, x).detach()


class SearchedUsage(NamedTuple):
    """What :func:`search_usage` finds.

    indices: [N] int64 and counts: [K] int64, as :func:`b2t_kernels.nearest_code` gives them.
    usage: [K] float32, soft assignments summed over valid rows. lse: [N], for :func:`known_usage`.
    """

    indices: Tensor
    counts: Tensor
    usage: Tensor
    lse: Tensor


@torch.no_grad()
def search_usage(
    x: Tensor,
    codebook: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None = None,
    precision: Precision = "fast",
    prepared: Prepared = (),
) -> SearchedUsage:
    """Nearest codes and soft assignments from one pass over the scores; not differentiable.

    Arguments as in :func:`b2t_kernels.nearest_code` and :func:`code_usage`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    exact = check_precision(precision)
    check_search(x, codebook, mask)
    forward = cuda.usage_forward if undispatched(x) else _usage_forward
    usage, lse, _, indices, counts = forward(
        x, codebook, _scale(temperature, x), mask, exact, list(prepared)
    )
    return SearchedUsage(indices, counts, usage, lse)


class _Direct(torch.autograd.Function):
    """The summed usage and the number of valid rows, without torch's dispatcher."""

    @staticmethod
    def forward(ctx, x, codebook, temperature, mask, *prepared):  # type: ignore[override]
        found = cuda.usage_forward(x, codebook, temperature, mask, None, prepared)
        total, lse, frames, _, _ = found
        ctx.mark_non_differentiable(frames)
        ctx.save_for_backward(x, codebook, temperature, lse, *prepared)
        return total, frames

    @staticmethod
    def backward(ctx, grad, _):  # type: ignore[override]
        grad_x, grad_codebook, prepared = _gradients(ctx, grad)
        return (grad_x, grad_codebook, *[None] * (2 + prepared))


class _Known(torch.autograd.Function):
    """A usage that was found already, with the gradient that finding it would have had."""

    @staticmethod
    def forward(ctx, x, codebook, temperature, usage, lse, *prepared):  # type: ignore[override]
        ctx.save_for_backward(x, codebook, temperature, lse, *prepared)
        return usage.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        grad_x, grad_codebook, prepared = _gradients(ctx, grad)
        return (grad_x, grad_codebook, *[None] * (3 + prepared))


def known_usage(
    x: Tensor,
    codebook: Tensor,
    temperature: float | Tensor,
    found: SearchedUsage,
    prepared: Prepared = (),
) -> Tensor:
    """The summed :func:`code_usage` that :func:`search_usage` found of the same x: [K].

    Differentiable in x and codebook, at the cost of the backward pass alone.
    """
    scale = _scale(temperature, x)
    return _Known.apply(x, codebook, scale, found.usage, found.lse, *prepared)


def code_usage(
    x: Tensor,
    codebook: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    prepared: Prepared = (),
) -> Tensor:
    """Mean soft assignment of the rows to each code, differentiable in x and codebook.

    usage_k = 1/M Σ_n softmax_k(−|x_n − c_k|² / temperature), over the M valid rows. Memory is
    O(N + K·D): two streaming passes with an online softmax, and as many again backwards for each
    of x and the codebook that needs a gradient.

    Args:
        x: [N, D] rows.
        codebook: [K, D] codes.
        temperature: positive, in units of squared distance; a tensor avoids a device
            synchronisation. No gradient flows to it.
        mask: [N] bool, True = real. Rows that are not finite are left out as well.
        reduction: "sum" leaves out 1/M, for a mean over several ranks or micro-batches.
        prepared: the codebook's entry of :func:`b2t_kernels.prepare_codes`.

    Returns:
        [K] float32; all zero when no row is valid.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    check_search(x, codebook, mask)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is 'mean' or 'sum', found {reduction!r}")
    scale = _scale(temperature, x)
    if undispatched(x):
        # Backward takes what is prepared here, and so does not prepare the codes again.
        entry = prepared or cuda.prepare_codes(codebook.detach()[None])[0]
        total, frames = _Direct.apply(x, codebook, scale, mask, *entry)
    else:
        total, _, frames, _, _ = _usage_forward(x, codebook, scale, mask, None, list(prepared))
    return total / frames.clamp(min=1) if reduction == "mean" else total
