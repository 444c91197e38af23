"""The public operators, registered with torch for CPU, CUDA and shape propagation.

Letters: N frames, K codes, D width, Q quantizers. Each operator is a torch custom op, so that it
works under autograd, ``torch.compile`` and activation checkpointing; the device of x chooses the
implementation: Triton on CUDA, blocked torch elsewhere.
"""

from typing import Literal

import torch
from torch import Tensor

from b2t_kernels import blocked, cuda

Precision = Literal["fast", "exact"]


def _check_search(x: Tensor, codebook: Tensor, mask: Tensor | None) -> None:
    if x.ndim != 2 or codebook.ndim != 2 or x.shape[1] != codebook.shape[1]:
        raise ValueError(
            f"expected x [N, D] and codebook [K, D], found {list(x.shape)} and "
            f"{list(codebook.shape)}; flatten batch and time first"
        )
    if codebook.shape[0] == 0 or codebook.shape[1] == 0:
        raise ValueError(f"the codebook is empty: {list(codebook.shape)}")
    _check_rows("mask", mask, x, torch.bool)


def _check_rows(name: str, rows: Tensor | None, x: Tensor, dtype: torch.dtype) -> None:
    if rows is not None and (rows.shape != x.shape[:1] or rows.dtype != dtype):
        raise ValueError(
            f"expected {name} [{x.shape[0]}] {dtype}, found {list(rows.shape)} {rows.dtype}"
        )


def _check_precision(precision: str) -> bool:
    if precision not in ("fast", "exact"):
        raise ValueError(f"precision is 'fast' or 'exact', found {precision!r}")
    return precision == "exact"


@torch.library.custom_op("b2t_kernels::nearest_code", mutates_args=(), device_types="cpu")
def _nearest_code(
    x: Tensor, codebook: Tensor, mask: Tensor | None, exact: bool
) -> tuple[Tensor, Tensor]:
    return blocked.nearest_code(x, codebook, mask, exact)


@_nearest_code.register_kernel("cuda")
def _(x: Tensor, codebook: Tensor, mask: Tensor | None, exact: bool) -> tuple[Tensor, Tensor]:
    return cuda.nearest_code(x, codebook, mask, exact)


@_nearest_code.register_fake
def _(x: Tensor, codebook: Tensor, mask: Tensor | None, exact: bool) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape[0], dtype=torch.int64),
        x.new_empty(codebook.shape[0], dtype=torch.int64),
    )


def nearest_code(
    x: Tensor, codebook: Tensor, mask: Tensor | None = None, precision: Precision = "fast"
) -> tuple[Tensor, Tensor]:
    """Nearest code of every row by Euclidean distance, and how often each code was chosen.

    The N × K distances are never stored: argmax_k x·c_k − ½|c_k|² is kept as codes stream by.
    Ties go to the lowest index. Not differentiable.

    Args:
        x: [N, D] rows, any floating dtype.
        codebook: [K, D] codes. A code that is not finite is never chosen.
        mask: [N] bool, True = real; None means all.
        precision: "fast" scores once (float32 on CPU, fp16 tensor cores on centred data on a GPU).
            "exact" gives the float64 answer: rows whose best two scores lie within a proven bound
            of each other are scored again.

    Returns:
        indices [N] int64, −1 where masked or not finite, and counts [K] int64 of the others.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    exact = _check_precision(precision)
    _check_search(x, codebook, mask)
    return _nearest_code(x, codebook, mask, exact)


@torch.library.custom_op("b2t_kernels::rvq_encode", mutates_args=(), device_types="cpu")
def _rvq_encode(
    x: Tensor, codebooks: Tensor, mask: Tensor | None, exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return blocked.rvq_encode(x, codebooks, mask, exact)


@_rvq_encode.register_kernel("cuda")
def _(
    x: Tensor, codebooks: Tensor, mask: Tensor | None, exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return cuda.rvq_encode(x, codebooks, mask, exact)


@_rvq_encode.register_fake
def _(
    x: Tensor, codebooks: Tensor, mask: Tensor | None, exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    Q, K, _D = codebooks.shape
    return (
        x.new_empty(x.shape[0], Q, dtype=torch.int64),
        x.new_empty(Q, K, dtype=torch.int64),
        torch.empty_like(x, dtype=blocked.working_dtype(x), memory_format=torch.contiguous_format),
    )


def rvq_encode(
    x: Tensor, codebooks: Tensor, mask: Tensor | None = None, precision: Precision = "fast"
) -> tuple[Tensor, Tensor, Tensor]:
    """Encode rows with Q codebooks, each quantizing what the ones before left over.

    On a GPU all layers run in one launch while the residual stays on chip where that wins (small
    K·D), layer by layer otherwise. Not differentiable.

    Args:
        x: [N, D] rows.
        codebooks: [Q, K, D] codes, first layer first.
        mask: [N] bool, True = real.
        precision: as in :func:`nearest_code`.

    Returns:
        indices [N, Q] int64 (−1 where masked or not finite), counts [Q, K] int64, and quantized
        [N, D] float32, the sum of the chosen codes (zero where masked or not finite).

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    exact = _check_precision(precision)
    if codebooks.ndim != 3 or codebooks.shape[0] == 0:
        raise ValueError(f"expected codebooks [Q, K, D], found {list(codebooks.shape)}")
    _check_search(x, codebooks[0], mask)
    return _rvq_encode(x, codebooks, mask, exact)


@torch.library.custom_op("b2t_kernels::code_sums", mutates_args=(), device_types="cpu")
def _code_sums(
    x: Tensor, indices: Tensor, K: int, mask: Tensor | None, atomic: bool
) -> tuple[Tensor, Tensor]:
    return blocked.code_sums(x, indices, K, mask)


@_code_sums.register_kernel("cuda")
def _(
    x: Tensor, indices: Tensor, K: int, mask: Tensor | None, atomic: bool
) -> tuple[Tensor, Tensor]:
    return cuda.code_sums(x, indices, K, mask, atomic)


@_code_sums.register_fake
def _(
    x: Tensor, indices: Tensor, K: int, mask: Tensor | None, atomic: bool
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(K, x.shape[1], dtype=blocked.working_dtype(x)),
        x.new_empty(K, dtype=torch.int64),
    )


def code_sums(
    x: Tensor,
    indices: Tensor,
    K: int,
    mask: Tensor | None = None,
    method: Literal["sorted", "atomic"] = "sorted",
) -> tuple[Tensor, Tensor]:
    """Sum of the rows that chose each code, and their number: what an EMA update needs.

    Args:
        x: [N, D] rows.
        indices: [N] int64 in −1..K−1, as from :func:`nearest_code`; −1 is left out.
        K: number of codes.
        mask: [N] bool, True = real.
        method: "sorted" adds the rows of a code in their own order, so that the same input gives
            the same bits; "atomic" is faster on a GPU and rounds differently from run to run. On a
            CPU both are the sorted sum.

    Returns:
        sums [K, D] float32 and counts [K] int64. A row that is not finite enters the sums unless
        its index is −1.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if x.ndim != 2:
        raise ValueError(f"expected x [N, D], found {list(x.shape)}")
    if method not in ("sorted", "atomic"):
        raise ValueError(f"method is 'sorted' or 'atomic', found {method!r}")
    _check_rows("indices", indices, x, torch.int64)
    _check_rows("mask", mask, x, torch.bool)
    return _code_sums(x, indices, K, mask, method == "atomic")


@torch.library.custom_op("b2t_kernels::usage_forward", mutates_args=(), device_types="cpu")
def _usage_forward(
    x: Tensor, codebook: Tensor, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return blocked.usage_forward(x, codebook, temperature, mask)


@_usage_forward.register_kernel("cuda")
def _(
    x: Tensor, codebook: Tensor, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return cuda.usage_forward(x, codebook, temperature, mask)


@_usage_forward.register_fake
def _(
    x: Tensor, codebook: Tensor, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = blocked.working_dtype(x)
    return (
        x.new_empty(codebook.shape[0], dtype=dtype),
        x.new_empty(x.shape[0], dtype=dtype),
        x.new_empty((), dtype=torch.int64),
    )


@torch.library.custom_op("b2t_kernels::usage_backward", mutates_args=(), device_types="cpu")
def _usage_backward(
    grad: Tensor, x: Tensor, codebook: Tensor, temperature: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    return blocked.usage_backward(grad, x, codebook, temperature, lse)


@_usage_backward.register_kernel("cuda")
def _(
    grad: Tensor, x: Tensor, codebook: Tensor, temperature: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    return cuda.usage_backward(grad, x, codebook, temperature, lse)


@_usage_backward.register_fake
def _(
    grad: Tensor, x: Tensor, codebook: Tensor, temperature: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(codebook, memory_format=torch.contiguous_format),
    )


def _save_usage(ctx, inputs, output) -> None:
    x, codebook, temperature, _ = inputs
    _, lse, frames = output
    ctx.mark_non_differentiable(lse, frames)
    ctx.save_for_backward(x, codebook, temperature, lse)


def _differentiate_usage(ctx, grad, grad_lse, grad_frames):
    grad_x, grad_codebook = _usage_backward(grad.contiguous(), *ctx.saved_tensors)
    return grad_x, grad_codebook, None, None


_usage_forward.register_autograd(_differentiate_usage, setup_context=_save_usage)


def code_usage(
    x: Tensor,
    codebook: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Mean soft assignment of the rows to each code, differentiable in x and codebook.

    usage_k = 1/M Σ_n softmax_k(−|x_n − c_k|² / temperature), over the M valid rows. Memory is
    O(N + K·D): two streaming passes with an online softmax, and the same again backwards.

    Args:
        x: [N, D] rows.
        codebook: [K, D] codes.
        temperature: positive, in units of squared distance; a tensor avoids a device
            synchronisation. No gradient flows to it.
        mask: [N] bool, True = real. Rows that are not finite are left out as well.
        reduction: "sum" leaves out 1/M, for a mean over several ranks or micro-batches.

    Returns:
        [K] float32; all zero when no row is valid.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check_search(x, codebook, mask)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is 'mean' or 'sum', found {reduction!r}")
    scale = torch.as_tensor(temperature, dtype=torch.float32, device=x.device).detach()
    total, _, frames = _usage_forward(x, codebook, scale, mask)
    return total / frames.clamp(min=1) if reduction == "mean" else total
