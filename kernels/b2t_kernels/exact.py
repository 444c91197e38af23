"""What ``exact`` adds: a bound that proves most rows, and wider sums for the others.

All quantities in the scaled units of ``prepare``, distances multiplied by r (r_n of the row). Let x̂
and ĉ be the rounded vectors, e = |x̂ − rS(x − μ)| measured for the row, E_k = |ĉ_k − S(c_k − μ)|
measured for each code, X = |x̂|², u = 2⁻²⁴.

1. A distance that is reached. In the run of eight codes that won the scan, |x − c|² is summed in
   float32, with a relative error of at most (D + 3)u. The nearest of them gives U, no less than the
   true distance of the nearest code k*. Where the sum over- or underflows, the score gives it.
2. Rounding. The distance of the rounded vectors differs from the true one by at most
   δ_k = e + rE_k + 2u(|x̂| + r|ĉ_k|); the last term covers the float32 rounding of x − μ and c − μ.
   So k* has a rounded distance of at most U + δ_k*.
3. Lengths. Then r|ĉ_k*| ≤ |x̂| + U + δ_k*: a code longer than ρ = (|x̂| + U + e)(1 + 2⁻⁹)/r + 10⁻⁶D
   is not k* (fp16 keeps E_k below 2⁻¹⁰|ĉ_k| + 2⁻²⁵√D). So the row needs the largest E_k among codes
   no longer than ρ, which ``prepare`` tabulates, and a few codes far out cost it nothing.
4. Arithmetic. A score is a sum of D exact fp16 products and the bias. Tensor cores may truncate, so
   each addition is charged 4u: η = 4u(D + 8)(|x̂|ρ + ½rρ²) bounds the error of a computed score.
   Hence the computed score of k* is at least

       t = (X − (U + δ)²)/(2r) − η.

So a row with a single run of eight codes at t or above has its nearest code in that run; if the two
best distances there differ by more than 8u(D + 8) of their size the answer is proven. Every other
row (a few per cent) goes to ``refine_kernel`` with the runs at or above t. A slot whose second-best
score reaches t hides a run: of that slot, and of no other, all runs are compared.
"""

import triton
import triton.language as tl

from b2t_kernels.prepare import ERRORS, GROUP, LENGTH_BINS, RADIUS, length_bin, physical_row
from b2t_kernels.scan import FAR

REFINE_PROGRAMS = 1024
UNIT = tl.constexpr(5.9604645e-08)
# Float32 distances are trusted where squares neither overflow nor lose bits below this.
SMALLEST_SQUARE = tl.constexpr(1e-30)
NOTHING = tl.constexpr(-1)
WHOLE_SLOT = tl.constexpr(-2)
LANES = tl.constexpr(32)


@triton.jit
def tolerance_of(D):
    """1 + 8u(D + 8): two float32 sums of D squares farther apart than this are in true order."""
    return 1 + 8 * UNIT * (D + 8)


@triton.jit
def run_distances(x_ptr, codebook_ptr, bias_ptr, rows, run, N, K, D, padded_D, STEP: tl.constexpr):
    """Float32 |x − c|² to the eight codes of each row's run: [n, 8], infinite where there is none.

    A sum that overflows is infinite too.
    """
    n: tl.constexpr = rows.shape[0]
    codes = run[:, None] + tl.arange(0, GROUP)[None, :]
    usable = tl.load(bias_ptr + physical_row(codes)) > -float("inf")
    distance = tl.zeros([n, GROUP], tl.float32)
    for first in range(0, padded_D, STEP):
        columns = first + tl.arange(0, STEP)
        inside = (rows < N)[:, None] & (columns < D)[None, :]
        values = tl.load(x_ptr + rows[:, None] * D + columns[None, :], inside, other=0.0)
        here = usable[:, :, None] & (columns < D)[None, None, :]
        address = codes.to(tl.int64)[:, :, None] * D + columns[None, None, :]
        chosen = tl.load(codebook_ptr + address, here, other=0.0).to(tl.float32)
        moved = values.to(tl.float32)[:, None, :] - chosen
        distance += tl.sum(moved * moved, axis=2)
    return tl.where(usable & (distance == distance), distance, float("inf"))


@triton.jit
def two_least(distances, run):
    """The nearest and second distance of each row of [n, 8], and the code of the nearest."""
    offsets = tl.arange(0, GROUP)[None, :]
    nearest = tl.min(distances, axis=1)
    offset = tl.min(tl.where(distances == nearest[:, None], offsets, GROUP), axis=1)
    others = tl.where(offsets == offset[:, None], float("inf"), distances)
    return nearest, tl.min(others, axis=1), run + offset


@triton.jit
def score_threshold(top, nearest, squares, error, scale, shrink, statistics_ptr, D):
    """The t of the module's docstring: scores below it cannot belong to the nearest code."""
    slack = 4 * UNIT * (D + 8)
    radius = tl.load(statistics_ptr + RADIUS) * (1 + slack)
    largest = tl.load(statistics_ptr + ERRORS + LENGTH_BINS - 1)
    length = tl.sqrt(squares) * (1 + slack)
    own = tl.sqrt(error) * (1 + slack)
    # What the score says of the winner's distance, for where float32 squares do not hold it.
    eta = slack * (length * radius + 0.5 * shrink * radius * radius)
    square = squares * (1 + slack) - 2 * shrink * (top - eta)
    reach = tl.sqrt(tl.maximum(square, 0.0)) * (1 + slack)
    reach += own + shrink * largest * (1 + slack) + 2 * UNIT * (length + shrink * radius)
    trusted = (nearest > SMALLEST_SQUARE) & (nearest < float("inf"))
    reach = tl.where(trusted, tl.sqrt(nearest) * (1 + slack) * scale * shrink, reach)
    return threshold_of_reach(reach, squares, error, shrink, statistics_ptr, D)


@triton.jit
def threshold_of_reach(reach, squares, error, shrink, statistics_ptr, D):
    """The t of the module's docstring for codes within a scaled distance ``reach`` of a row."""
    slack = 4 * UNIT * (D + 8)
    radius = tl.load(statistics_ptr + RADIUS) * (1 + slack)
    length = tl.sqrt(squares) * (1 + slack)
    own = tl.sqrt(error) * (1 + slack)
    longest = (length + reach + own) * (1 + 0.001953125) / shrink + 1e-6 * D
    error_there = tl.load(statistics_ptr + ERRORS + length_bin(longest))
    longest = tl.minimum(longest, radius)
    delta = own + shrink * error_there * (1 + slack) + 2 * UNIT * (length + shrink * longest)
    eta = slack * (length * longest + 0.5 * shrink * longest * longest)
    bound = (reach + delta) * (reach + delta) * (1 + slack)
    return (squares * (1 - slack) - bound) / (2 * shrink) - eta


@triton.jit
def queue_doubtful(
    rows, doubtful, near, hidden, runs, queue_ptr, length_ptr, slots_ptr, W: tl.constexpr
):
    """Append doubtful rows to the queue with what to compare: per slot a run, all, or nothing."""
    n: tl.constexpr = rows.shape[0]
    place = tl.atomic_add(length_ptr + tl.zeros([n], tl.int32), 1, mask=doubtful)
    tl.store(queue_ptr + place, rows, doubtful)
    listed = tl.where(hidden, WHOLE_SLOT, tl.where(near, runs, NOTHING))
    address = place.to(tl.int64)[:, None] * W + tl.arange(0, W)[None, :]
    tl.store(slots_ptr + address, listed, doubtful[:, None])


@triton.jit
def row_distances(x_ptr, codebook_ptr, row, codes, usable, D, BLOCK_D: tl.constexpr, wide):
    """|x − c|² of one row to some codes, summed in the type ``wide``; infinite if not usable."""
    total = tl.zeros([codes.shape[0]], wide)
    for first in range(0, D, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        values = tl.load(x_ptr + row * D + columns, columns < D, other=0.0).to(wide)
        inside = usable[:, None] & (columns < D)[None, :]
        address = codes.to(tl.int64)[:, None] * D + columns[None, :]
        chosen = tl.load(codebook_ptr + address, inside, other=0.0).to(wide)
        difference = tl.where(inside, values[None, :] - chosen, 0.0)
        total += tl.sum(difference * difference, axis=1)
    return tl.where(usable & (total == total), total, float("inf"))


@triton.jit
def take_nearest(distances, codes, nearest, second, index):
    """Fold distances to some codes into the two nearest so far, ties to the lowest index."""
    least = tl.min(distances, axis=0)
    code = tl.min(tl.where(distances == least, codes, FAR), axis=0)
    other = tl.min(tl.where(codes == code, float("inf"), distances), axis=0)
    better = (least < nearest) | ((least == nearest) & (code < index))
    second = tl.minimum(tl.minimum(second, other), tl.where(better, nearest, least))
    return tl.where(better, least, nearest), second, tl.where(better, code, index)


@triton.jit
def compare_listed(
    x_ptr, codebook_ptr, bias_ptr, slots_ptr, row, K, D, padded_K, share, bound,
    W: tl.constexpr, SLOTS: tl.constexpr, BLOCK_D: tl.constexpr, EXACTLY: tl.constexpr,
):  # fmt: skip
    """Nearest and second distance of one row over its listed slots, and the nearest's index.

    In float32; with EXACTLY in float64, of chunks that float32 does not rule out by ``bound``. A
    run is eight codes; a whole slot has one in each tile of its split, taken four at a time.
    """
    wide: tl.constexpr = tl.float64 if EXACTLY else tl.float32
    nearest = tl.full([], float("inf"), wide)
    second = nearest
    index = tl.full([], FAR, tl.int32)
    lanes = tl.arange(0, LANES)
    places = tl.arange(0, W)
    listed = tl.load(slots_ptr + places)
    for _ in range(tl.sum((listed != NOTHING).to(tl.int32), axis=0)):
        slot = tl.min(tl.where(listed != NOTHING, places, W), axis=0)
        run = tl.sum(tl.where(places == slot, listed, 0), axis=0)
        listed = tl.where(places == slot, NOTHING, listed)
        split = slot // SLOTS * share
        whole = run == WHOLE_SLOT
        first = tl.where(whole, split + slot % SLOTS * GROUP, run)
        last = tl.where(whole, tl.minimum(split + share, padded_K), run + 1)
        for start in range(first, last, LANES // GROUP * SLOTS * GROUP):
            origin = start + lanes // GROUP * (SLOTS * GROUP)
            codes = origin + lanes % GROUP
            usable = (origin < last) & (codes < K)
            usable &= tl.load(bias_ptr + physical_row(codes), usable, other=0.0) > -float("inf")
            found = row_distances(x_ptr, codebook_ptr, row, codes, usable, D, BLOCK_D, tl.float32)
            if EXACTLY:
                # A sum that overflowed rules nothing out, and nor does an overflowed bound.
                rough = tl.min(found, axis=0)
                if (rough <= bound) | (
                    tl.max(tl.where(usable, found, 0.0), axis=0) == float("inf")
                ):
                    sure = row_distances(x_ptr, codebook_ptr, row, codes, usable, D, BLOCK_D, wide)
                    nearest, second, index = take_nearest(sure, codes, nearest, second, index)
            else:
                nearest, second, index = take_nearest(found, codes, nearest, second, index)
    return nearest, second, index


@triton.jit
def refine_kernel(
    x_ptr, codebook_ptr, bias_ptr, indices_ptr, counts_ptr, queue_ptr, length_ptr, slots_ptr,
    K, D, padded_K, share,
    W: tl.constexpr, SLOTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Settle queued rows, programs striding over the queue: in float32, or float64 if it is close.

    W: slots of a row over all splits; SLOTS: of one split.
    """
    length = tl.load(length_ptr)
    tolerance = tolerance_of(D)
    for item in range(tl.program_id(0).to(tl.int64), length, tl.num_programs(0)):
        row = tl.load(queue_ptr + item)
        slots = slots_ptr + item * W
        nearest, second, index = compare_listed(
            x_ptr, codebook_ptr, bias_ptr, slots, row, K, D, padded_K, share, 0.0,
            W, SLOTS, BLOCK_D, False,
        )  # fmt: skip
        trusted = (nearest > SMALLEST_SQUARE) & (second > nearest * tolerance)
        if not trusted:
            bound = tl.maximum(nearest, SMALLEST_SQUARE) * tolerance
            _, _, index = compare_listed(
                x_ptr, codebook_ptr, bias_ptr, slots, row, K, D, padded_K, share, bound,
                W, SLOTS, BLOCK_D, True,
            )  # fmt: skip
        tl.store(indices_ptr + row, index.to(tl.int64))
        tl.atomic_add(counts_ptr + index, tl.full([], 1, tl.int64), mask=index < K)
