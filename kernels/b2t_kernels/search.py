"""The walk over the codes: best score of each slot, the winning run of eight, its best code.

Letters and slots as in ``nearest``.
"""

import triton
import triton.language as tl

from b2t_kernels.prepare import (
    GROUP,
    physical_row,
)
from b2t_kernels.rows import moved_rows

FAR = tl.constexpr(2147483647)


@triton.jit
def keep_best(scores, start, best, tile, second, EXACT: tl.constexpr):
    """Fold a tile of scores [n, BLOCK_K] into the slots [n, BLOCK_K/64, 2, 4]."""
    n: tl.constexpr = scores.shape[0]
    blocks: tl.constexpr = scores.shape[1] // 64
    runs = tl.reshape(scores, [n, blocks, 2, 2, 2, 4, 2])
    top = tl.max(tl.max(tl.max(runs, axis=6), axis=3), axis=2)
    better = top > best
    if EXACT:
        second = tl.maximum(second, tl.minimum(top, best))
    best = tl.where(better, top, best)
    tile = tl.where(better, start, tile)
    return best, tile, second


@triton.jit
def search_codes(
    x_ptr,
    mean_ptr,
    scale,
    shrink,
    rows,
    codes_ptr,
    bias_ptr,
    N,
    D,
    padded_K,
    padded_D,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Stream all codes past some rows. Returns best, tile and second-best of each slot, [n, slots].

    With WHOLE, x̂ stays on chip; otherwise the width comes in pieces, rounded anew for each tile.
    """
    n: tl.constexpr = rows.shape[0]
    SLOTS: tl.constexpr = BLOCK_K // 8
    best = tl.full([n, BLOCK_K // 64, 2, 4], -float("inf"), tl.float32)
    second = best
    tile = tl.zeros([n, BLOCK_K // 64, 2, 4], tl.int32)
    columns = tl.arange(0, BLOCK_D)
    if WHOLE:
        moved = moved_rows(x_ptr, mean_ptr, scale, shrink, rows, 0, N, D, BLOCK_D)
        resident = moved.to(tl.float16)
    for start in range(0, padded_K, BLOCK_K):
        places = start + tl.arange(0, BLOCK_K)
        bias = tl.load(bias_ptr + places)
        if WHOLE:
            address = places[None, :].to(tl.int64) * BLOCK_D + columns[:, None]
            scores = tl.dot(resident, tl.load(codes_ptr + address))
        else:
            scores = tl.zeros([n, BLOCK_K], tl.float32)
            for first in range(0, padded_D, BLOCK_D):
                address = places[None, :].to(tl.int64) * padded_D + (first + columns)[:, None]
                piece = moved_rows(x_ptr, mean_ptr, scale, shrink, rows, first, N, D, BLOCK_D)
                scores = tl.dot(piece.to(tl.float16), tl.load(codes_ptr + address), scores)
        scores += shrink[:, None] * bias[None, :]
        best, tile, second = keep_best(scores, start, best, tile, second, EXACT)
    best = tl.reshape(best, [n, SLOTS])
    return best, tl.reshape(tile, [n, SLOTS]), tl.reshape(second, [n, SLOTS])


@triton.jit
def winning_run(best, runs):
    """Best score of each row and the first code of its run, the lowest if several tie."""
    top = tl.max(best, axis=1)
    return top, tl.min(tl.where(best == top[:, None], runs, FAR), axis=1)


@triton.jit
def recover(
    x_ptr,
    mean_ptr,
    scale,
    shrink,
    rows,
    codes_ptr,
    bias_ptr,
    run,
    N,
    D,
    padded_D,
    STEP: tl.constexpr,
):
    """Index inside the winning run of eight, from the rounded vectors."""
    n: tl.constexpr = rows.shape[0]
    top = tl.full([n], -float("inf"), tl.float32)
    index = run
    for offset in range(GROUP):
        place = physical_row(run + offset).to(tl.int64)
        score = shrink * tl.load(bias_ptr + place)
        for first in range(0, padded_D, STEP):
            columns = first + tl.arange(0, STEP)
            moved = moved_rows(x_ptr, mean_ptr, scale, shrink, rows, first, N, D, STEP)
            codes = tl.load(codes_ptr + place[:, None] * padded_D + columns[None, :])
            score += tl.sum(moved.to(tl.float16).to(tl.float32) * codes.to(tl.float32), axis=1)
        better = score > top
        top = tl.where(better, score, top)
        index = tl.where(better, run + offset, index)
    return index
