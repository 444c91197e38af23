"""Nearest-code search in Triton: argmax of x·c − ½|c|² as the codebook streams past a tile of rows.

Letters: N rows, K codes, D width. A program keeps a tile of rows, walks over the codes, and keeps
for each row and each of its slots the best score and the tile it came from. A slot is a run of
eight codes inside one thread (see ``prepare.physical_row``), so that the loop spends about one
maximum, one multiply-add and three eighths of a compare-and-select on a score, and exchanges
nothing between threads. The index is recovered afterwards in the winning run of eight alone.

The bound behind ``exact``
--------------------------
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

import torch
import triton
import triton.language as tl
from torch import Tensor

from b2t_kernels import tuning
from b2t_kernels.prepare import (
    ERROR,
    GROUP,
    RADIUS,
    PreparedCodes,
    centred_rows,
    code_scale,
    padded_codes,
    padded_width,
    physical_row,
    prepare,
    row_scale,
)

FAR = tl.constexpr(2147483647)
REFINE_PROGRAMS = 1024


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


@triton.jit(do_not_specialize=["N", "bucket"])
def nearest_kernel(
    x_ptr,
    mask_ptr,
    codebook_ptr,
    codes_ptr,
    bias_ptr,
    mean_ptr,
    statistics_ptr,
    indices_ptr,
    counts_ptr,
    queue_ptr,
    length_ptr,
    slots_ptr,
    N,
    K,
    D,
    padded_K,
    padded_D,
    bucket,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
    WHOLE: tl.constexpr,
    EXACT: tl.constexpr,
    MASKED: tl.constexpr,
    SLOTS: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Indices [N] and counts [K]; with EXACT, a queue of the rows that need float64.

    WHOLE: BLOCK_D spans the width. STEP: columns at a time before and after the loop, which divide
    the padded width. SLOTS: room per queued row, at least BLOCK_K / 8.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = code_scale(statistics_ptr)
    finite, shrink = examine_rows(x_ptr, mean_ptr, scale, rows, N, D, padded_D, STEP)
    best, tile, second = search_codes(
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
        BLOCK_D,
        BLOCK_K,
        WHOLE,
        EXACT,
    )
    valid = (rows < N) & finite
    if MASKED:
        valid = valid & (tl.load(mask_ptr + rows, rows < N, other=0) != 0)
    runs = tile + 8 * tl.arange(0, BLOCK_K // 8)[None, :]
    top, run = winning_run(best, runs)
    valid = valid & (top > -float("inf"))
    run = tl.where(valid, run, 0)
    if EXACT:
        nearest, runner_up, index = run_distances(
            x_ptr, codebook_ptr, bias_ptr, rows, run, N, K, D, padded_D, STEP
        )
        squares, error = measure_rounding(
            x_ptr, mean_ptr, scale, shrink, rows, N, D, padded_D, STEP
        )
        least = score_threshold(top, squares, error, shrink, statistics_ptr, D)
        near = best >= least[:, None]
        hidden = tl.max((second >= least[:, None]).to(tl.int32), axis=1) > 0
        close = ~(runner_up > nearest * (1 + 4.7683716e-07 * (D + 8)))
        crowded = tl.sum(near.to(tl.int32), axis=1) > 1
        doubtful = valid & (crowded | hidden | close)
        queue_doubtful(rows, doubtful, hidden, near, runs, queue_ptr, length_ptr, slots_ptr, SLOTS)
        counted = valid & ~doubtful
    else:
        index = recover(
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
            STEP,
        )
        counted = valid
    tl.store(indices_ptr + rows, tl.where(valid, index, -1).to(tl.int64), rows < N)
    if COUNT:
        tl.atomic_add(counts_ptr + index, tl.full([BLOCK_N], 1, tl.int64), mask=counted)


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


def search(
    x: Tensor,
    codebook: Tensor,
    prepared: PreparedCodes,
    mask: Tensor | None,
    exact: bool,
    count: bool = True,
) -> tuple[Tensor, Tensor]:
    """Launch the search for contiguous x [N, D] and codebook [K, D] already prepared.

    Without ``count`` the counts stay zero (and exact ones incomplete): to time what counting costs.
    """
    N, D = x.shape
    K = codebook.shape[0]
    padded_D = padded_width(D)
    device = x.device
    indices = torch.empty(N, dtype=torch.int64, device=device)
    counts = torch.zeros(K, dtype=torch.int64, device=device)
    if N == 0:
        return indices, counts
    slots = tuning.MOST_SLOTS
    queued = N if exact else 0
    queue = torch.empty(queued, dtype=torch.int64, device=device)
    length = torch.zeros(1, dtype=torch.int32, device=device)
    listed = torch.full((queued, slots), -1, dtype=torch.int32, device=device)
    tuning.launch(
        nearest_kernel,
        tuning.nearest_space(tuning.architecture(device), padded_D),
        lambda meta: (triton.cdiv(N, meta["BLOCK_N"]),),
        (
            x,
            x if mask is None else mask.view(torch.uint8),
            codebook,
            *prepared,
            indices,
            counts,
            queue,
            length,
            listed,
            N,
            K,
            D,
            padded_codes(K),
            padded_D,
            tuning.bucket(N),
        ),
        {
            "WHOLE": padded_D <= tuning.WIDEST_WHOLE,
            "EXACT": exact,
            "MASKED": mask is not None,
            "SLOTS": slots,
            "COUNT": count,
            "STEP": tuning.step(padded_D),
        },
        accumulated=("counts_ptr", "length_ptr"),
    )
    if exact:
        refine_kernel[(min(N, REFINE_PROGRAMS),)](
            x,
            codebook,
            indices,
            counts,
            queue,
            length,
            listed,
            K,
            D,
            SLOTS=slots,
            BLOCK_K=32,
            BLOCK_D=128,
            num_warps=tuning.REFINE_WARPS,
        )
    return indices, counts


def nearest_code(
    x: Tensor, codebook: Tensor, mask: Tensor | None, exact: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`b2t_kernels.nearest_code`."""
    codebook = codebook.contiguous()
    mask = None if mask is None else mask.contiguous()
    return search(x.contiguous(), codebook, prepare(codebook), mask, exact)
