"""What ``exact`` adds: a bound that proves most rows, and float64 for the others.

All quantities in the scaled units of ``prepare``, distances multiplied by r (r_n of the row). Let x̂
and ĉ be the rounded vectors, e = |x̂ − rS(x − μ)| measured for the row, E = max_k |ĉ_k − S(c_k − μ)|
measured for the codebook, R = max_k |ĉ_k|, X = |x̂|², u = 2⁻²⁴.

1. Rounding. By the triangle inequality the distance of the rounded vectors differs from the true
   one by at most δ = e + rE + 2u(|x̂| + rR); the last term covers the float32 rounding of x − μ and
   c − μ themselves. This is far smaller than a bound on the scalar product: it is multiplied by the
   distance to the code and not by the norms.
2. Arithmetic. A score is a sum of D exact fp16 products and the bias. Tensor cores may truncate, so
   each addition is charged 4u: η = 4u(D + 8)(|x̂|R + ½rR²) bounds the error of a computed score.
3. Let m be the best computed score and d² = X − 2rm + 2rη + 4u(D + 8)X, no less than the squared
   rounded distance of the winner. The true nearest code k* satisfies d_k* ≤ d_winner, hence its
   rounded distance is at most d + 2δ, hence its computed score is at least

       t = m − 2η − (2δd + 2δ²)/r.

So a row with a single run of eight codes at t or above has its nearest code in that run. There the
distances |x − c|² are summed in float32, whose relative error is at most (D + 3)u; if the two best
differ by more than 8u(D + 8) of their size the answer is proven. Every other row (a few per cent)
is settled in float64 among the runs at or above t, by ``refine_kernel``.
"""

import triton
import triton.language as tl

from b2t_kernels.prepare import (
    ERROR,
    GROUP,
    RADIUS,
    physical_row,
)
from b2t_kernels.rows import load_rows, moved_rows
from b2t_kernels.search import FAR

REFINE_PROGRAMS = 1024


@triton.jit
def measure_rounding(x_ptr, mean_ptr, scale, shrink, rows, N, D, padded_D, STEP: tl.constexpr):
    """|x̂|² and the squared rounding error of each row."""
    squares = tl.zeros([rows.shape[0]], tl.float32)
    error = tl.zeros([rows.shape[0]], tl.float32)
    for first in range(0, padded_D, STEP):
        moved = moved_rows(x_ptr, mean_ptr, scale, shrink, rows, first, N, D, STEP)
        rounded = moved.to(tl.float16).to(tl.float32)
        squares += tl.sum(rounded * rounded, axis=1)
        error += tl.sum((rounded - moved) * (rounded - moved), axis=1)
    return squares, error


@triton.jit
def run_distances(x_ptr, codebook_ptr, bias_ptr, rows, run, N, K, D, padded_D, STEP: tl.constexpr):
    """Float32 |x − c|² over the winning run: nearest and second distance, and the index."""
    n: tl.constexpr = rows.shape[0]
    nearest = tl.full([n], float("inf"), tl.float32)
    second = nearest
    index = run
    for offset in range(GROUP):
        code = run + offset
        distance = tl.zeros([n], tl.float32)
        usable = (code < K) & (tl.load(bias_ptr + physical_row(code)) > -float("inf"))
        for first in range(0, padded_D, STEP):
            columns = first + tl.arange(0, STEP)
            values = load_rows(x_ptr, rows, columns, N, D)
            inside = usable[:, None] & (columns < D)[None, :]
            address = code.to(tl.int64)[:, None] * D + columns[None, :]
            codes = tl.load(codebook_ptr + address, inside, other=0.0).to(tl.float32)
            distance += tl.sum((values - codes) * (values - codes), axis=1)
        distance = tl.where(usable, distance, float("inf"))
        better = distance < nearest
        second = tl.where(better, nearest, tl.minimum(second, distance))
        index = tl.where(better, code, index)
        nearest = tl.where(better, distance, nearest)
    return nearest, second, index


@triton.jit
def score_threshold(top, squares, error, shrink, statistics_ptr, D):
    """The t of the module's docstring: scores below it cannot belong to the nearest code."""
    unit: tl.constexpr = 5.9604645e-08
    slack = 4 * unit * (D + 8)
    radius = tl.load(statistics_ptr + RADIUS) * (1 + slack)
    norm = tl.sqrt(squares) * (1 + slack)
    delta = tl.sqrt(error) * (1 + slack) + shrink * tl.load(statistics_ptr + ERROR) * (1 + slack)
    delta += 2 * unit * (norm + shrink * radius)
    eta = slack * (norm * radius + 0.5 * shrink * radius * radius)
    square = squares - 2 * shrink * top + 2 * shrink * eta + slack * squares
    distance = tl.sqrt(tl.maximum(square, 0.0)) * (1 + slack)
    return top - 2 * eta - (2 * delta * distance + 2 * delta * delta) / shrink


@triton.jit
def queue_doubtful(
    rows, doubtful, hard, near, runs, queue_ptr, length_ptr, slots_ptr, SLOTS: tl.constexpr
):
    """Append doubtful rows to the queue, with the runs to compare (or −2: all of them)."""
    n: tl.constexpr = rows.shape[0]
    used: tl.constexpr = near.shape[1]
    place = tl.atomic_add(length_ptr + tl.zeros([n], tl.int32), 1, mask=doubtful)
    tl.store(queue_ptr + place, rows, doubtful)
    listed = tl.where(hard[:, None], -2, tl.where(near, runs, -1))
    address = place.to(tl.int64)[:, None] * SLOTS + tl.arange(0, used)[None, :]
    tl.store(slots_ptr + address, listed, doubtful[:, None])


@triton.jit
def row_distances(x_ptr, codebook_ptr, row, codes, K, D, BLOCK_D: tl.constexpr, wide: tl.constexpr):
    """|x − c|² of one row to some codes, summed in the type ``wide``; infinite if not a number."""
    total = tl.zeros([codes.shape[0]], wide)
    for first in range(0, D, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        values = tl.load(x_ptr + row * D + columns, columns < D, other=0.0).to(wide)
        inside = (codes < K)[:, None] & (columns < D)[None, :]
        address = codes.to(tl.int64)[:, None] * D + columns[None, :]
        chosen = tl.load(codebook_ptr + address, inside, other=0.0).to(wide)
        difference = tl.where(inside, values[None, :] - chosen, 0.0)
        total += tl.sum(difference * difference, axis=1)
    return tl.where((codes < K) & (total < float("inf")), total, float("inf"))


@triton.jit
def take_nearest(distances, codes, nearest, index):
    """Fold distances to some codes into the nearest so far, ties to the lowest index."""
    least = tl.min(distances, axis=0)
    code = tl.min(tl.where(distances == least, codes, FAR), axis=0)
    better = (least < nearest) | ((least == nearest) & (code < index))
    return tl.where(better, least, nearest), tl.where(better, code, index)


@triton.jit
def refine_kernel(
    x_ptr,
    codebook_ptr,
    indices_ptr,
    counts_ptr,
    queue_ptr,
    length_ptr,
    slots_ptr,
    K,
    D,
    SLOTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Settle queued rows in float64, one row at a time, programs striding over the queue."""
    length = tl.load(length_ptr)
    for item in range(tl.program_id(0).to(tl.int64), length, tl.num_programs(0)):
        row = tl.load(queue_ptr + item)
        slots = slots_ptr + item * SLOTS
        nearest = tl.full([], float("inf"), tl.float64)
        index = tl.full([], 2147483647, tl.int32)
        if tl.load(slots) == -2:
            for start in range(0, K, BLOCK_K):
                codes = start + tl.arange(0, BLOCK_K)
                rough = row_distances(x_ptr, codebook_ptr, row, codes, K, D, BLOCK_D, tl.float32)
                tolerance = 1 + 4.7683716e-07 * (D + 8)
                if tl.min(rough, axis=0).to(tl.float64) <= nearest * tolerance:
                    sure = row_distances(x_ptr, codebook_ptr, row, codes, K, D, BLOCK_D, tl.float64)
                    nearest, index = take_nearest(sure, codes, nearest, index)
        else:
            for slot in range(SLOTS):
                run = tl.load(slots + slot)
                if run >= 0:
                    codes = run + tl.arange(0, GROUP)
                    sure = row_distances(x_ptr, codebook_ptr, row, codes, K, D, BLOCK_D, tl.float64)
                    nearest, index = take_nearest(sure, codes, nearest, index)
        tl.store(indices_ptr + row, index.to(tl.int64))
        tl.atomic_add(counts_ptr + index, tl.full([], 1, tl.int64), mask=index < K)
