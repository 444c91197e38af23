"""Sums of the rows that chose each code: a segment sum over rows sorted by code, or atomics.

Letters: N rows, K codes, D width. Sorted, a program owns one code and some columns and adds its
rows in their own order, 32 at a time, so the same input gives the same bits. Atomic, rows are added
as they come: one pass over x, but float addition then depends on the order of arrival.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def segment_kernel(
    x_ptr, order_ptr, offsets_ptr, sums_ptr, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """sums[k] = Σ x[order[i]] for i in offsets[k]..offsets[k + 1]."""
    code = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(offsets_ptr + code)
    last = tl.load(offsets_ptr + code + 1)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_N):
        places = start + tl.arange(0, BLOCK_N)
        rows = tl.load(order_ptr + places, places < last, other=0)
        inside = (places < last)[:, None] & (columns < D)[None, :]
        address = rows[:, None] * D + columns[None, :]
        values = tl.load(x_ptr + address, inside, other=0.0).to(tl.float32)
        total += tl.sum(values, axis=0)
    tl.store(sums_ptr + code * D + columns, total, columns < D)


@triton.jit(do_not_specialize=["N"])
def scatter_kernel(
    x_ptr,
    bins_ptr,
    sums_ptr,
    counts_ptr,
    N,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add each row to the sum of its code; bin 0 is left out."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    bins = tl.load(bins_ptr + rows, rows < N, other=0)
    chosen = bins > 0
    inside = chosen[:, None] & (columns < D)[None, :]
    address = rows[:, None] * D + columns[None, :]
    values = tl.load(x_ptr + address, inside, other=0.0).to(tl.float32)
    tl.atomic_add(sums_ptr + (bins - 1)[:, None] * D + columns[None, :], values, mask=inside)
    if tl.program_id(1) == 0:
        tl.atomic_add(counts_ptr + bins - 1, tl.full([BLOCK_N], 1, tl.int64), mask=chosen)


def code_sums(
    x: Tensor, indices: Tensor, K: int, mask: Tensor | None, atomic: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`b2t_kernels.code_sums`."""
    x, (N, D), device = x.contiguous(), x.shape, x.device
    bins = (indices if mask is None else indices.masked_fill(~mask, -1)).add(1).contiguous()
    width = min(128, triton.next_power_of_2(D))
    columns = triton.cdiv(D, width)
    if atomic:
        sums = torch.zeros(K, D, dtype=torch.float32, device=device)
        counts = torch.zeros(K, dtype=torch.int64, device=device)
        if N:
            grid = (triton.cdiv(N, 16), columns)
            scatter_kernel[grid](x, bins, sums, counts, N, D, BLOCK_N=16, BLOCK_D=width)
        return sums, counts
    ordered, order = bins.sort(stable=True)
    bounds = torch.arange(1, K + 2, device=device)
    offsets = torch.searchsorted(ordered, bounds)
    sums = torch.empty(K, D, dtype=torch.float32, device=device)
    segment_kernel[(K, columns)](x, order, offsets, sums, D, BLOCK_N=32, BLOCK_D=width)
    return sums, offsets.diff()
