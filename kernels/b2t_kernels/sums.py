"""Sums of the rows that chose each code: gathered, a segment sum of sorted rows, or atomics.

Letters: N rows, K codes, D width. Sorted, a code's rows are added in their own order, in chunks of
``CHUNK`` that start at its first row, and its chunks in their order: the same input gives the same
bits, and a code that took every row is summed by as many programs as any other rows. Atomic, rows
are added as they come: one pass over x, but float addition then depends on the order of arrival.
Few rows are gathered by code in one launch, block by block: the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from b2t_kernels.launching import ceildiv, launched, power_of_two_above

CHUNK = 512
# Up to so many, looking for a code's rows among all takes less than the twenty launches of a sort.
FEW_ROWS = 4096


@triton.jit
def add_rows(x_ptr, order_ptr, first, last, columns, D, BLOCK_N: tl.constexpr):
    """Σ x[order[i]] for i in first..last, some columns of it."""
    total = tl.zeros([columns.shape[0]], tl.float32)
    for start in range(first, last, BLOCK_N):
        places = start + tl.arange(0, BLOCK_N)
        rows = tl.load(order_ptr + places, places < last, other=0)
        inside = (places < last)[:, None] & (columns < D)[None, :]
        values = tl.load(x_ptr + rows[:, None] * D + columns[None, :], inside, other=0.0)
        total += tl.sum(values.to(tl.float32), axis=0)
    return total


@triton.jit
def segment_kernel(
    x_ptr, order_ptr, offsets_ptr, owners_ptr, chunks_ptr, sums_ptr, partial_ptr, K, D,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """First chunk of every code into sums [K, D], chunk i of the others into partial [i, D].

    Program k < K takes code k; program K + i the i-th further chunk, which belongs to
    ``owners[i]`` (K where there are not so many) as its number i − chunks[owner].
    """
    program = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    extra = program - K
    code = program
    skipped = tl.zeros([], tl.int64)
    if extra >= 0:
        code = tl.load(owners_ptr + extra)
        if code < K:
            skipped = (extra - tl.load(chunks_ptr + code) + 1) * CHUNK
    if code < K:
        first = tl.load(offsets_ptr + code) + skipped
        last = tl.minimum(tl.load(offsets_ptr + code + 1), first + CHUNK)
        total = add_rows(x_ptr, order_ptr, first, last, columns, D, BLOCK_N)
        target = tl.where(extra >= 0, extra, code) * D + columns
        if extra >= 0:
            tl.store(partial_ptr + target, total, columns < D)
        else:
            tl.store(sums_ptr + target, total, columns < D)


@triton.jit
def gather_kernel(
    chunks_ptr, partial_ptr, sums_ptr, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Add the further chunks of each code to its sum, in their order."""
    code = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(chunks_ptr + code)
    last = tl.load(chunks_ptr + code + 1)
    if last > first:
        total = tl.load(sums_ptr + code * D + columns, columns < D, other=0.0)
        for start in range(first, last, BLOCK_N):
            places = start + tl.arange(0, BLOCK_N)
            inside = (places < last)[:, None] & (columns < D)[None, :]
            address = places[:, None] * D + columns[None, :]
            total += tl.sum(tl.load(partial_ptr + address, inside, other=0.0), axis=0)
        tl.store(sums_ptr + code * D + columns, total, columns < D)


@triton.jit(do_not_specialize=["N"])
def scatter_kernel(
    x_ptr, bins_ptr, sums_ptr, counts_ptr, N, K, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Add each row to the sum of its code; bins outside 0..K−1 are left out."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    bins = tl.load(bins_ptr + rows, rows < N, other=-1)
    chosen = (bins >= 0) & (bins < K)
    inside = chosen[:, None] & (columns < D)[None, :]
    address = rows[:, None] * D + columns[None, :]
    values = tl.load(x_ptr + address, inside, other=0.0).to(tl.float32)
    tl.atomic_add(sums_ptr + bins[:, None] * D + columns[None, :], values, mask=inside)
    if tl.program_id(1) == 0:
        tl.atomic_add(counts_ptr + bins, tl.full([BLOCK_N], 1, tl.int64), mask=chosen)


@triton.jit(do_not_specialize=["N"])
def gathered_kernel(
    x_ptr, bins_ptr, sums_ptr, counts_ptr, N, K, D,
    BLOCK_N: tl.constexpr, STEP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums and counts of a few codes, whose rows each program looks for among all of them."""
    codes = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    low, high = tl.program_id(0) * BLOCK_K, tl.program_id(0) * BLOCK_K + BLOCK_K
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    number = tl.zeros([BLOCK_K], tl.int32)
    for start in range(0, N, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        bins = tl.load(bins_ptr + rows, rows < N, other=-1)
        if tl.max(((bins >= low) & (bins < high)).to(tl.int32), axis=0) > 0:
            for first in range(start, start + BLOCK_N, STEP):
                few = first + tl.arange(0, STEP)
                chosen = tl.load(bins_ptr + few, few < N, other=-1)
                taken = (chosen >= low) & (chosen < high)
                if tl.max(taken.to(tl.int32), axis=0) > 0:
                    inside = taken[:, None] & (columns < D)[None, :]
                    address = few.to(tl.int64)[:, None] * D + columns[None, :]
                    values = tl.load(x_ptr + address, inside, other=0.0).to(tl.float32)
                    own = codes[:, None] == chosen[None, :]
                    total += tl.sum(tl.where(own[:, :, None], values[None, :, :], 0.0), axis=1)
                    number += tl.sum(own.to(tl.int32), axis=1)
    place = codes.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(sums_ptr + place, total, (codes < K)[:, None] & (columns < D)[None, :])
    if tl.program_id(1) == 0:
        tl.store(counts_ptr + codes, number.to(tl.int64), codes < K)


def _gathered_sums(x: Tensor, bins: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Sums and counts of few rows, in one launch."""
    (N, D), width = x.shape, 64
    sums = torch.empty(K, D, dtype=torch.float32, device=x.device)
    counts = torch.empty(K, dtype=torch.int64, device=x.device)
    launched(gathered_kernel)[(ceildiv(K, 8), ceildiv(D, width))](
        x, bins, sums, counts, N, K, D, BLOCK_N=128, STEP=16, BLOCK_K=8, BLOCK_D=width
    )
    return sums, counts


def code_sums(
    x: Tensor, indices: Tensor, K: int, mask: Tensor | None, known: Tensor | None, atomic: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`b2t_kernels.code_sums`."""
    x, (N, D), device = x.contiguous(), x.shape, x.device
    bins = (indices if mask is None else indices.masked_fill(~mask, -1)).contiguous()
    width = min(128, power_of_two_above(D))
    columns = ceildiv(D, width)
    if atomic:
        sums = torch.zeros(K, D, dtype=torch.float32, device=device)
        counts = torch.zeros(K, dtype=torch.int64, device=device)
        if N:
            grid = (ceildiv(N, 16), columns)
            launched(scatter_kernel)[grid](
                x, bins, sums, counts, N, K, D, BLOCK_N=16, BLOCK_D=width
            )
        return sums, counts
    if N <= FEW_ROWS:
        return _gathered_sums(x, bins, K)
    # A narrower key takes fewer passes of the radix sort; what lies outside sorts first or last.
    narrow = bins.clamp(-1, K).to(torch.int16 if K < 1 << 15 else torch.int32)
    ordered, order = narrow.sort(stable=True)
    if known is None:
        every = torch.arange(K + 1, dtype=narrow.dtype, device=device)
        offsets = torch.searchsorted(ordered, every)
        counts = offsets.diff()
    else:
        # Those of no code come first. Counts of other indices must not lead out of the rows.
        counts = known.clone()
        offsets = torch.cat([(N - counts.sum())[None], counts]).cumsum(0).clamp_(0, N)
    further = (counts - 1).clamp(min=0) // CHUNK
    chunks = torch.cat([further.new_zeros(1), further.cumsum(0)])
    most = N // CHUNK
    owners = torch.searchsorted(chunks[1:], torch.arange(most, device=device), right=True)
    sums = torch.empty(K, D, dtype=torch.float32, device=device)
    partial = torch.empty(most, D, dtype=torch.float32, device=device)
    launched(segment_kernel)[(K + most, columns)](
        x, order, offsets, owners, chunks, sums, partial, K, D,
        BLOCK_N=32, BLOCK_D=width, CHUNK=CHUNK,
    )  # fmt: skip
    if most:
        launched(gather_kernel)[(K, columns)](chunks, partial, sums, D, BLOCK_N=32, BLOCK_D=width)
    return sums, counts
