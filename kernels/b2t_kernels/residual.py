"""The residual between two layers, and the sum of the codes chosen, each in one pass.

Letters: N rows, Q layers, L codebooks (Q, or 1 that all share), K codes, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from b2t_kernels.launching import ceildiv, launched


@triton.jit
def chosen_codes(codebook_ptr, gain_ptr, codes, columns, K, D, GAIN: tl.constexpr):
    """Gain · c of codes [n], some columns of it, zero for codes outside 0..K−1."""
    inside = ((codes >= 0) & (codes < K))[:, None] & (columns < D)[None, :]
    values = tl.load(codebook_ptr + codes[:, None] * D + columns[None, :], inside, other=0.0)
    values = values.to(tl.float32)
    if GAIN:
        values *= tl.load(gain_ptr)
    return values


@triton.jit(do_not_specialize=["N"])
def leave_kernel(
    residual_ptr, errors_ptr, codebook_ptr, gain_ptr, indices_ptr, squares_ptr, N, K, D,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ERRORS: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    """Residual −= chosen, errors += residual, and Σ residual² of each program's rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    codes = tl.load(indices_ptr + rows, rows < N, other=-1)
    squares = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, D, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        inside = (rows < N)[:, None] & (columns < D)[None, :]
        place = rows[:, None] * D + columns[None, :]
        left = tl.load(residual_ptr + place, inside, other=0.0)
        left -= chosen_codes(codebook_ptr, gain_ptr, codes, columns, K, D, GAIN)
        tl.store(residual_ptr + place, left, inside)
        if ERRORS:
            errors = tl.load(errors_ptr + place, inside, other=0.0)
            tl.store(errors_ptr + place, errors + left, inside)
        squares += tl.sum(left * left, axis=1)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(squares, axis=0))


@triton.jit(do_not_specialize=["N"])
def total_kernel(
    codebooks_ptr, gain_ptr, codes_ptr, total_ptr, N, Q, K, D, layer_stride, row_stride,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    """Σ_q gain_q · c_q of codes [N, Q], in the order of the layers."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for layer in range(Q):
        codes = tl.load(codes_ptr + rows * row_stride + layer, rows < N, other=-1)
        book = layer * layer_stride
        codebook = codebooks_ptr + book.to(tl.int64) * K * D
        total += chosen_codes(codebook, gain_ptr + book, codes, columns, K, D, GAIN)
    inside = (rows < N)[:, None] & (columns < D)[None, :]
    tl.store(total_ptr + rows[:, None] * D + columns[None, :], total, inside)


def leave(
    residual: Tensor, codebook: Tensor, indices: Tensor, gain: Tensor | None, errors: Tensor | None
) -> Tensor:
    """See :func:`b2t_kernels.leave`."""
    N, D = residual.shape
    programs = ceildiv(N, 16)
    squares = torch.empty(programs, dtype=torch.float32, device=residual.device)
    if N:
        launched(leave_kernel)[(programs,)](
            residual, residual if errors is None else errors, codebook.contiguous(),
            squares if gain is None else gain, indices.contiguous(), squares,
            N, codebook.shape[0], D,
            BLOCK_N=16, BLOCK_D=128, ERRORS=errors is not None, GAIN=gain is not None,
        )  # fmt: skip
    return squares.sum()


def sum_codes(codebooks: Tensor, codes: Tensor, gain: Tensor | None) -> Tensor:
    """See :func:`b2t_kernels.sum_codes`."""
    (L, K, D), (N, Q) = codebooks.shape, codes.shape
    total = torch.empty(N, D, dtype=torch.float32, device=codes.device)
    # A column of a walk's codes is taken as it lies.
    codes = codes if Q == 1 or codes.stride(1) == 1 else codes.contiguous()
    if N:
        launched(total_kernel)[(ceildiv(N, 16), ceildiv(D, 128))](
            codebooks.contiguous(), total if gain is None else gain.contiguous(),
            codes, total, N, Q, K, D, int(L > 1), codes.stride(0),
            BLOCK_N=16, BLOCK_D=128, GAIN=gain is not None,
        )  # fmt: skip
    return total
