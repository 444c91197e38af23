"""The walk over the codes: rows stay on chip, codes stream past, each slot keeps its best.

Letters: N rows, K codes, D width; K′ and D′ padded; W partial results per row. A slot is a run of
eight codes of a tile inside one thread (see ``prepare.physical_row``), so that the loop spends one
multiply-add, about one maximum and three eighths of a compare-and-select on a score, and exchanges
nothing between threads. With SOFT it also sums 2^(z − best) in each slot, z the logits of the soft
assignment: one more multiply-add, exponential and addition. With DRAW the scores are those logits
plus Gumbel noise, so that the best of them is a draw from the soft assignment.

Few rows leave most of a GPU idle: the codes are then split over a second axis of the grid, and
``settle`` merges what the splits found. No score depends on how they are split.
"""

import triton
import triton.language as tl

from b2t_kernels.noise import LOG2_E, noise
from b2t_kernels.prepare import code_scale, logical_row

FAR = tl.constexpr(2147483647)
LOWEST = tl.constexpr(-3e38)
STEEPEST = tl.constexpr(1e25)  # beyond it an assignment is one-hot, and a logit might overflow


@triton.jit
def runs_of(tile):
    """A tile [n, BLOCK_K] by slot: [n, BLOCK_K/64, 2, 2, 2, 4, 2]; axes 3 and 6 and 2 are runs."""
    return tl.reshape(tile, [tile.shape[0], tile.shape[1] // 64, 2, 2, 2, 4, 2])


@triton.jit
def keep_best(scores, start, best, tile, second, EXACT: tl.constexpr):
    """Fold a tile of scores [n, BLOCK_K] into the slots [n, BLOCK_K/64, 2, 4]."""
    top = tl.max(tl.max(tl.max(runs_of(scores), axis=6), axis=3), axis=2)
    better = top > best
    if EXACT:
        second = tl.maximum(second, tl.minimum(top, best))
    best = tl.where(better, top, best)
    tile = tl.where(better, start, tile)
    return best, tile, second


@triton.jit
def add_mass(scores, factor, before, best, mass):
    """Σ 2^(f(s − best)) of each slot, whose best was ``before`` until this tile."""
    n: tl.constexpr = scores.shape[0]
    blocks: tl.constexpr = scores.shape[1] // 64
    anchor = tl.maximum(best, LOWEST)
    slope = tl.reshape(factor, [n, 1, 1, 1])
    # A slot that has seen no code yet takes 2^(−∞ − 0): nothing.
    low = tl.where(best > -float("inf"), anchor * slope, 0.0)
    low = tl.reshape(low, [n, blocks, 1, 1, 2, 4, 1])
    logits = runs_of(scores) * tl.reshape(factor, [n, 1, 1, 1, 1, 1, 1])
    added = tl.sum(tl.sum(tl.sum(tl.exp2(logits - low), axis=6), axis=3), axis=2)
    return mass * tl.exp2((tl.maximum(before, LOWEST) - anchor) * slope) + added


@triton.jit
def code_tile(codes_ptr, places, padded_D, columns):
    """ĉ of some places, [d, k]."""
    return tl.load(codes_ptr + places[None, :].to(tl.int64) * padded_D + columns[:, None])


@triton.jit
def row_tile(rows_ptr, rows, N, padded_D, columns):
    """x̂ of some rows, [n, d], zero outside."""
    address = rows[:, None] * padded_D + columns[None, :]
    return tl.load(rows_ptr + address, (rows < N)[:, None], other=0.0)


@triton.jit
def logit_factor(temperature_ptr, scale, shrink):
    """What turns a score of the scaled vectors into z · log2(e)."""
    factor = 2.0 * LOG2_E / tl.load(temperature_ptr) / scale / scale / shrink
    return tl.minimum(factor, STEEPEST)


@triton.jit
def scan_codes(
    rows_ptr, rows, shrink, factor, row_keys, code_keys_ptr, codes_ptr, bias_ptr, first, last,
    N, padded_D,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr,
    SOFT: tl.constexpr, DRAW: tl.constexpr,
):  # fmt: skip
    """Best, tile, second-best and mass of each slot over codes first..last, [n, slots] each.

    With WHOLE, x̂ stays on chip; otherwise rows and codes come in pieces of BLOCK_D columns. The
    bias of a tile is loaded while the tile before it is multiplied.
    """
    n: tl.constexpr = rows.shape[0]
    SLOTS: tl.constexpr = BLOCK_K // 8
    best = tl.full([n, BLOCK_K // 64, 2, 4], -float("inf"), tl.float32)
    second = best
    mass = tl.zeros([n, BLOCK_K // 64, 2, 4], tl.float32)
    tile = tl.zeros([n, BLOCK_K // 64, 2, 4], tl.int32)
    columns = tl.arange(0, BLOCK_D)
    within = tl.arange(0, BLOCK_K)
    if DRAW:
        order = logical_row(within)
    if WHOLE:
        resident = row_tile(rows_ptr, rows, N, BLOCK_D, columns)
    bias = tl.load(bias_ptr + first + within)
    for start in range(first, last, BLOCK_K):
        ahead = tl.load(bias_ptr + tl.minimum(start + BLOCK_K, last - BLOCK_K) + within)
        if WHOLE:
            scores = tl.dot(resident, code_tile(codes_ptr, start + within, BLOCK_D, columns))
        else:
            scores = tl.zeros([n, BLOCK_K], tl.float32)
            for left in range(0, padded_D, BLOCK_D):
                piece = row_tile(rows_ptr, rows, N, padded_D, left + columns)
                codes = code_tile(codes_ptr, start + within, padded_D, left + columns)
                scores = tl.dot(piece, codes, scores)
        scores += shrink[:, None] * bias[None, :]
        if DRAW:
            keys = tl.load(code_keys_ptr + start + order).to(tl.uint64)
            scores = scores * factor[:, None] + noise(row_keys[:, None], keys[None, :])
        before = best
        best, tile, second = keep_best(scores, start, best, tile, second, EXACT)
        if SOFT:
            mass = add_mass(scores, factor, before, best, mass)
        bias = ahead
    best, tile = tl.reshape(best, [n, SLOTS]), tl.reshape(tile, [n, SLOTS])
    return best, tile, tl.reshape(second, [n, SLOTS]), tl.reshape(mass, [n, SLOTS])


@triton.jit
def winning_run(best, runs):
    """Best score of each row and the first code of its run, the lowest if several tie."""
    top = tl.max(best, axis=1)
    return top, tl.min(tl.where(best == top[:, None], runs, FAR), axis=1)


@triton.jit
def kept_parts(best_ptr, runs_ptr, rows, inside, parts_of_row, W: tl.constexpr):
    """Where the splits left their results of each row, which hold one, scores and runs: [n, W]."""
    slots = tl.arange(0, W)
    place = rows[:, None] * parts_of_row + slots[None, :]
    held = inside[:, None] & (slots < parts_of_row)[None, :]
    best = tl.load(best_ptr + place, held, other=-float("inf"))
    return place, held, best, tl.load(runs_ptr + place, held, other=0)


@triton.jit
def winner(best, runs, valid):
    """Which rows have a best score, the score and the first code of its run, 0 without one: [n]."""
    top, run = winning_run(best, runs)
    valid = valid & (top > -float("inf"))
    return valid, top, tl.where(valid, run, 0)


@triton.jit(do_not_specialize=["N"])
def scan_kernel(
    rows_ptr, shrink_ptr, codes_ptr, bias_ptr, statistics_ptr, temperature_ptr, row_keys_ptr,
    code_keys_ptr, best_ptr, runs_ptr, second_ptr, mass_ptr, N, padded_D, padded_K, share,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
    EXACT: tl.constexpr, SOFT: tl.constexpr, DRAW: tl.constexpr,
):  # fmt: skip
    """Scan one split of the codes, ``share`` of them, for a tile of rows.

    Written per row and split: with EXACT every slot's best score, run and second-best score, else
    the best of the split alone; with SOFT the mass beside each best.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    first = split * share
    last = tl.minimum(first + share, padded_K)
    inside = rows < N
    shrink = tl.load(shrink_ptr + rows, inside, other=1.0)
    factor = shrink
    row_keys = rows
    if SOFT or DRAW:
        factor = logit_factor(temperature_ptr, code_scale(statistics_ptr), shrink)
    if DRAW:
        row_keys = tl.load(row_keys_ptr + rows, inside, other=0).to(tl.uint64)
    best, tile, second, mass = scan_codes(
        rows_ptr, rows, shrink, factor, row_keys, code_keys_ptr, codes_ptr, bias_ptr, first, last,
        N, padded_D, BLOCK_K, BLOCK_D, WHOLE, EXACT, SOFT, DRAW,
    )  # fmt: skip
    SLOTS: tl.constexpr = BLOCK_K // 8
    slots = tl.arange(0, SLOTS)
    runs = tile + 8 * slots[None, :]
    place = rows * tl.num_programs(1) + split
    if EXACT:
        every = place[:, None] * SLOTS + slots[None, :]
        tl.store(best_ptr + every, best, inside[:, None])
        tl.store(runs_ptr + every, runs, inside[:, None])
        tl.store(second_ptr + every, second, inside[:, None])
        if SOFT:
            tl.store(mass_ptr + every, mass, inside[:, None])
    else:
        top, run = winning_run(best, runs)
        tl.store(best_ptr + place, top, inside)
        tl.store(runs_ptr + place, run, inside)
        if SOFT:
            anchor = tl.maximum(top, LOWEST)
            lower = (tl.maximum(best, LOWEST) - anchor[:, None]) * factor[:, None]
            tl.store(mass_ptr + place, tl.sum(mass * tl.exp2(lower), axis=1), inside)
