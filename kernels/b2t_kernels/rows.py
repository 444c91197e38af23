"""Rows of x as the kernels take them: loaded, scaled, examined."""

import triton
import triton.language as tl

from b2t_kernels.prepare import (
    centred_rows,
    row_scale,
)


@triton.jit
def load_rows(x_ptr, rows, columns, N, D):
    """A [n, d] tile of x in float32, zero outside."""
    inside = (rows < N)[:, None] & (columns < D)[None, :]
    return tl.load(x_ptr + rows[:, None] * D + columns[None, :], inside, other=0.0).to(tl.float32)


@triton.jit
def moved_rows(x_ptr, mean_ptr, scale, shrink, rows, first, N, D, BLOCK_D: tl.constexpr):
    """BLOCK_D columns from ``first`` of r·S·(x − μ), float32: x̂ before rounding."""
    columns = first + tl.arange(0, BLOCK_D)
    mean = tl.load(mean_ptr + columns)
    values = load_rows(x_ptr, rows, columns, N, D)
    return centred_rows(values, mean, scale) * shrink[:, None]


@triton.jit
def examine_rows(x_ptr, mean_ptr, scale, rows, N, D, padded_D, STEP: tl.constexpr):
    """Whether each row is finite, and its r."""
    largest = tl.zeros([rows.shape[0]], tl.float32)
    wrong = tl.zeros([rows.shape[0]], tl.int32)
    for first in range(0, padded_D, STEP):
        columns = first + tl.arange(0, STEP)
        values = load_rows(x_ptr, rows, columns, N, D)
        wrong = tl.maximum(wrong, tl.max((~(tl.abs(values) < float("inf"))).to(tl.int32), axis=1))
        moved = centred_rows(values, tl.load(mean_ptr + columns), scale)
        largest = tl.maximum(largest, tl.max(tl.abs(moved), axis=1))
    return wrong == 0, row_scale(largest)
