"""Rows made ready for fp16 tensor cores: x̂, its scale, and what ``exact`` needs to know of it.

Letters: N rows, D width, D′ padded. Written once for all passes over the same rows, into a scratch
that is bounded because callers take long inputs in parts of ``part_size`` rows.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from b2t_kernels.launching import Buffer, ceildiv, launched, power_of_two_above, scratch
from b2t_kernels.prepare import (
    ROW_EXPONENT,
    PreparedCodes,
    code_scale,
    exponent_of,
    padded_width,
    power_of_two,
)

SCRATCH_BYTES = 1 << 26
LARGEST_MOVED = tl.constexpr(1e38)
CLEARED = tl.constexpr(256)


class PreparedRows(NamedTuple):
    """What the kernels read instead of x.

    rows: [N, D′] fp16, x̂ = fp16(r·S·(x − μ)); zero where the row is not finite.
    shrink: [N] float32, r ≤ 1, a power of two.
    squares: [N] float32, |x̂|².
    error: [N] float32, |x̂ − rS(x − μ)|²; infinite where x lies too far out to be scaled.
    valid: [N] uint8, 1 where the row is finite and not masked.
    N, width, device: sizes, the width D′, and where they lie.
    """

    rows: Buffer
    shrink: Buffer
    squares: Buffer
    error: Buffer
    valid: Buffer
    N: int
    width: int
    device: torch.device


@triton.jit
def row_scale(largest):
    """The power of two r ≤ 1 that brings the largest element of a row under 2¹⁴."""
    return power_of_two(tl.minimum(-exponent_of(largest) + (ROW_EXPONENT - 1), 0))


@triton.jit(do_not_specialize=["N", "cleared"])
def rows_kernel(
    x_ptr,
    mask_ptr,
    mean_ptr,
    statistics_ptr,
    rows_ptr,
    shrink_ptr,
    squares_ptr,
    error_ptr,
    valid_ptr,
    state_ptr,
    N,
    D,
    padded_D,
    cleared,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    CLEARS: tl.constexpr,
):
    """Round a tile of rows that spans the width; with CLEARS, zero what later launches add to."""
    if CLEARS:
        step = tl.num_programs(0) * CLEARED
        for first in range(tl.program_id(0) * CLEARED, cleared, step):
            places = first + tl.arange(0, CLEARED)
            tl.store(state_ptr + places, tl.zeros([CLEARED], tl.int64), places < cleared)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    scale = code_scale(statistics_ptr)
    inside = (rows < N)[:, None] & (columns < D)[None, :]
    values = tl.load(x_ptr + rows[:, None] * D + columns[None, :], inside, other=0.0)
    values = values.to(tl.float32)
    mean = tl.load(mean_ptr + columns, columns < padded_D, other=0.0)
    finite = tl.min((tl.abs(values) < float("inf")).to(tl.int32), axis=1) > 0
    moved = (values - mean[None, :]) * scale
    moved = tl.minimum(tl.maximum(moved, -LARGEST_MOVED), LARGEST_MOVED)
    moved = tl.where(finite[:, None], moved, 0.0)
    largest = tl.max(tl.abs(moved), axis=1)
    shrink = row_scale(largest)
    moved *= shrink[:, None]
    rounded = moved.to(tl.float16)
    here = (rows < N)[:, None] & (columns < padded_D)[None, :]
    tl.store(rows_ptr + rows[:, None] * padded_D + columns[None, :], rounded, here)
    wide = rounded.to(tl.float32)
    error = tl.sum((wide - moved) * (wide - moved), axis=1)
    error = tl.where(largest < LARGEST_MOVED, error, float("inf"))
    valid = finite
    if MASKED:
        valid = valid & (tl.load(mask_ptr + rows, rows < N, other=0) != 0)
    tl.store(shrink_ptr + rows, shrink, rows < N)
    tl.store(squares_ptr + rows, tl.sum(wide * wide, axis=1), rows < N)
    tl.store(error_ptr + rows, error, rows < N)
    tl.store(valid_ptr + rows, valid.to(tl.uint8), rows < N)


def rows_tile(padded_D: int) -> tuple[int, int]:
    """Rows and columns of one program's tile."""
    width = power_of_two_above(padded_D)
    return max(1, 4096 // width), width


def prepare_rows(
    x: Tensor, prepared: PreparedCodes, mask: Tensor | None, state: Tensor | None = None
) -> PreparedRows:
    """Prepare contiguous x [N, D], N > 0, for one codebook, in one launch.

    ``state``, int64, is zeroed by it, for launches that follow.
    """
    (N, D), device = x.shape, x.device
    width, single = padded_width(D), (N, torch.float32)
    rows, shrink, squares, error, valid = scratch(
        device, (N * width, torch.float16), single, single, single, (N, torch.uint8)
    )
    block_N, block_D = rows_tile(width)
    launched(rows_kernel)[(ceildiv(N, block_N),)](
        x,
        x if mask is None else mask.view(torch.uint8),
        prepared.mean,
        prepared.statistics,
        rows,
        shrink,
        squares,
        error,
        valid,
        shrink if state is None else state,
        N,
        D,
        width,
        0 if state is None else state.shape[0],
        BLOCK_N=block_N,
        BLOCK_D=block_D,
        MASKED=mask is not None,
        CLEARS=state is not None,
    )
    return PreparedRows(rows, shrink, squares, error, valid, N, width, device)


def parts(N: int, D: int) -> Iterator[slice]:
    """Consecutive slices of N rows whose x̂ fits the scratch."""
    size = max(1, SCRATCH_BYTES // (2 * padded_width(D)) // 128) * 128
    for start in range(0, N, size):
        yield slice(start, min(start + size, N))
