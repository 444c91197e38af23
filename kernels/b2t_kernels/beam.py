"""One step of a beam search over residual layers in Triton: the best continuations of each frame.

Letters: N frames, b sums kept of each, K codes, D width, W partial results (slots) of a row. The
rows of the scan are the N·b residuals; as in ``exact`` it keeps every slot's best and second-best
score. ``candidates_kernel`` (1 and 2) and ``winners_kernel`` (3) then do the rest for one frame:

1. The runs of eight codes of the slots with the best scores, as many as sums are wanted, are
   compared in float32: their ``wanted``-th nearest code is at a distance U, no less than that of
   the true one.
2. By the bound of ``exact`` no continuation within U has a score below t, for each residual its
   own. Other slots whose best score reaches t are compared too, and where the second-best does, all
   runs of the slot.
3. Twice as many as are wanted, the nearest, are compared in float64, ties to the lower sum and
   code, and the winners' residuals and codes are written.

A sum that does not exist (fewer codes than are wanted) is kept as NaN, which nothing continues.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from b2t_kernels import tuning
from b2t_kernels.exact import NOTHING, UNIT, WHOLE_SLOT, threshold_of_reach
from b2t_kernels.gumbel import mix
from b2t_kernels.launching import launched, power_of_two_above
from b2t_kernels.nearest import Scanned, Wanted, scan
from b2t_kernels.prepare import (
    GROUP,
    PreparedCodes,
    code_scale,
    padded_codes,
    padded_width,
    physical_place,
    physical_row,
)
from b2t_kernels.rows import SCRATCH_BYTES, PreparedRows, prepare_rows
from b2t_kernels.scan import FAR

WIDEST_BEAM = 16
# Slots of a frame: few winners then share one, and the kernel's tile of them stays in registers.
FRAME_SLOTS = 256
LANES = tl.constexpr(32)
RUNS = tl.constexpr(4)
# A distance of infinity as packed with a place.
NO_SLOT = tl.constexpr(0x7F800000 << 32)


@triton.jit
def pair_distances(
    x_ptr, codebook_ptr, rows, codes, usable, D, BLOCK_D: tl.constexpr, wide: tl.constexpr
):
    """|x − c|² of pairs of a row and a code, summed in the type ``wide``; infinite elsewhere."""
    total = tl.zeros([rows.shape[0]], wide)
    for first in range(0, D, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        inside = usable[:, None] & (columns < D)[None, :]
        address = rows[:, None] * D + columns[None, :]
        values = tl.load(x_ptr + address, inside, other=0.0).to(wide)
        address = codes.to(tl.int64)[:, None] * D + columns[None, :]
        moved = values - tl.load(codebook_ptr + address, inside, other=0.0).to(wide)
        total += tl.sum(moved * moved, axis=1)
    return tl.where(usable & (total == total), total, float("inf"))


@triton.jit
def goes_before(distances, keys, others, other_keys):
    """Whether a distance and its key come before another's."""
    return (distances < others) | ((distances == others) & (keys < other_keys))


@triton.jit
def places_among(distances, keys):
    """Place of each of [L] in their order."""
    places = tl.arange(0, distances.shape[0])
    d, k, p = distances[:, None], keys[:, None], places[:, None]
    e, m, o = distances[None, :], keys[None, :], places[None, :]
    before = goes_before(d, k, e, m) | ((d == e) & (k == m) & (p < o))
    return tl.sum(before.to(tl.int32), axis=0)


@triton.jit
def merged(least, keys, found, found_keys):
    """The first of ``least`` [P], which are in order, and ``found`` [L], in order: [P]."""
    P: tl.constexpr = least.shape[0]
    places = tl.arange(0, P)
    before = goes_before(found[None, :], found_keys[None, :], least[:, None], keys[:, None])
    before = before.to(tl.int32)
    held_at = places + tl.sum(before, axis=1)
    found_at = places_among(found, found_keys) + P - tl.sum(before, axis=0)
    held = held_at[None, :] == places[:, None]
    taken = found_at[None, :] == places[:, None]
    distances = tl.sum(tl.where(held, least[None, :], 0.0), axis=1)
    distances += tl.sum(tl.where(taken, found[None, :], 0.0), axis=1)
    chosen = tl.sum(tl.where(held, keys[None, :], 0), axis=1)
    chosen += tl.sum(tl.where(taken, found_keys[None, :], 0), axis=1)
    return distances, chosen


@triton.jit
def compare(
    x_ptr, codebook_ptr, bias_ptr, frame, beams, beam, codes, usable, least, keys, K, D,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Fold continuations, one for each lane, into the nearest so far."""
    usable &= codes < K
    usable &= tl.load(bias_ptr + physical_row(codes), usable, other=0.0) > -float("inf")
    rows = frame * beams + beam
    found = pair_distances(x_ptr, codebook_ptr, rows, codes, usable, D, BLOCK_D, tl.float32)
    last = tl.max(least, axis=0)
    if tl.min(found, axis=0) <= last:
        least, keys = merged(least, keys, found, tl.where(usable, beam * K + codes, FAR))
    return least, keys


@triton.jit
def compare_best_slots(
    x_ptr, codebook_ptr, bias_ptr, frame, beams, rough, runs, least, keys, K, D, wanted,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compare the runs of ``wanted`` slots, those of the smallest ``rough`` distances [B, W].

    Returns the nearest so far, and which slots were compared.
    """
    W: tl.constexpr = rough.shape[1]
    places = tl.arange(0, rough.shape[0])[:, None] * W + tl.arange(0, W)[None, :]
    # The bits of non-negative floats sort like integers: distance and place in one number.
    packed = rough.to(tl.int32, bitcast=True).to(tl.int64) * 4294967296 + places
    seen = rough < 0
    lanes = tl.arange(0, LANES)
    for _ in range(0, wanted, RUNS):
        beam = tl.zeros([LANES], tl.int32)
        codes = lanes % GROUP
        usable = lanes < 0
        for turn in tl.static_range(RUNS):
            first = tl.min(tl.min(packed, axis=1), axis=0)
            place = (first % 4294967296).to(tl.int32)
            # Comparisons of blocks: one of scalars, spread, is no mask to the interpreter of 3.9.
            here = (packed == first) & (packed < NO_SLOT)
            run = tl.sum(tl.sum(tl.where(here, runs, 0), axis=1), axis=0)
            turns = lanes // GROUP == turn
            usable |= turns & (tl.where(turns, first, NO_SLOT) < NO_SLOT)
            beam = tl.where(turns, place // W, beam)
            codes = tl.where(turns, codes + run, codes)
            seen |= here
            packed = tl.where(here, NO_SLOT, packed)
        least, keys = compare(
            x_ptr, codebook_ptr, bias_ptr, frame, beams, beam, codes, usable, least, keys, K, D,
            BLOCK_D,
        )  # fmt: skip
    return least, keys, seen


@triton.jit
def compare_others(
    x_ptr, codebook_ptr, bias_ptr, frame, beams, listed, skipped, least, keys, K, D, padded_K,
    share, SLOTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compare what is ``listed`` [B, W]: a run, or a whole slot less the run ``skipped``."""
    W: tl.constexpr = listed.shape[1]
    places = tl.arange(0, listed.shape[0])[:, None] * W + tl.arange(0, W)[None, :]
    lanes = tl.arange(0, LANES)
    for _ in range(tl.sum(tl.sum((listed != NOTHING).to(tl.int32), axis=1), axis=0)):
        far = tl.where(listed != NOTHING, places, FAR)
        place = tl.min(tl.min(far, axis=1), axis=0)
        here = places == place
        run = tl.sum(tl.sum(tl.where(here, listed, 0), axis=1), axis=0)
        known = tl.sum(tl.sum(tl.where(here, skipped, 0), axis=1), axis=0)
        listed = tl.where(here, NOTHING, listed)
        slot = place % W
        split = slot // SLOTS * share
        whole = run == WHOLE_SLOT
        first = tl.where(whole, split + slot % SLOTS * GROUP, run)
        last = tl.where(whole, tl.minimum(split + share, padded_K), run + 1)
        for start in range(first, last, LANES // GROUP * SLOTS * GROUP):
            origin = start + lanes // GROUP * (SLOTS * GROUP)
            usable = (origin < last) & (origin != known)
            beam = tl.full([LANES], 0, tl.int32) + place // W
            least, keys = compare(
                x_ptr, codebook_ptr, bias_ptr, frame, beams, beam, origin + lanes % GROUP, usable,
                least, keys, K, D, BLOCK_D,
            )  # fmt: skip
    return least, keys


@triton.jit
def candidates_kernel(
    x_ptr, codebook_ptr, bias_ptr, statistics_ptr, shrink_ptr, squares_ptr, error_ptr, valid_ptr,
    best_ptr, runs_ptr, second_ptr, keys_ptr, K, D, padded_K, share, beams, parts_of_row, wanted,
    B: tl.constexpr, W: tl.constexpr, SLOTS: tl.constexpr, KEPT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Nearest continuations of the ``beams`` ≤ B sums of one frame, in float32; keys [N, KEPT].

    A key is K times the sum plus the code, −1 where there is no candidate.
    """
    frame = tl.program_id(0).to(tl.int64)
    beam = tl.arange(0, B)
    slots = tl.arange(0, W)
    rows = frame * beams + beam
    inside = beam < beams
    alive = inside & (tl.load(valid_ptr + rows, inside, other=0) != 0)
    place = rows[:, None] * parts_of_row + slots[None, :]
    held = alive[:, None] & (slots < parts_of_row)[None, :]
    best = tl.load(best_ptr + place, held, other=-float("inf"))
    runs = tl.load(runs_ptr + place, held, other=0)
    second = tl.load(second_ptr + place, held, other=-float("inf"))
    shrink = tl.load(shrink_ptr + rows, inside, other=1.0)
    squares = tl.load(squares_ptr + rows, inside, other=0.0)
    error = tl.load(error_ptr + rows, inside, other=0.0)
    held &= best > -float("inf")
    rough = squares[:, None] - 2 * shrink[:, None] * best
    rough = tl.maximum(rough, 0.0) / (shrink * shrink)[:, None]
    rough = tl.where(held, rough, float("inf"))
    least = tl.full([KEPT], float("inf"), tl.float32)
    keys = tl.full([KEPT], FAR, tl.int32)
    least, keys, seen = compare_best_slots(
        x_ptr, codebook_ptr, bias_ptr, frame, beams, rough, runs, least, keys, K, D, wanted,
        BLOCK_D,
    )  # fmt: skip
    bound = tl.sum(tl.where(tl.arange(0, KEPT) == wanted - 1, least, 0.0), axis=0)
    reach = tl.sqrt(bound) * (1 + 4 * UNIT * (D + 8)) * code_scale(statistics_ptr) * shrink
    reach = tl.where(bound < float("inf"), reach, float("inf"))
    lowest = threshold_of_reach(reach, squares, error, shrink, statistics_ptr, D)[:, None]
    hidden = held & (second >= lowest) & (second > -float("inf"))
    near = held & (best >= lowest) & (seen == 0)
    listed = tl.where(hidden, WHOLE_SLOT, tl.where(near, runs, NOTHING))
    skipped = tl.where(seen, runs, NOTHING)
    least, keys = compare_others(
        x_ptr, codebook_ptr, bias_ptr, frame, beams, listed, skipped, least, keys, K, D, padded_K,
        share, SLOTS, BLOCK_D,
    )  # fmt: skip
    keys = tl.where(least < float("inf"), keys, -1)
    tl.store(keys_ptr + frame * KEPT + tl.arange(0, KEPT), keys)


@triton.jit
def winners_kernel(
    x_ptr, codebook_ptr, keys_ptr, paths_ptr, left_ptr, longer_ptr, K, D, beams, wanted, layer,
    last, KEPT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Order one frame's candidates in float64 and continue by the first ``wanted`` of them.

    ``paths`` [N·b, layer] and the residuals x [N·b, D] become ``longer`` [N·wanted, layer + 1] and
    ``left`` [N·wanted, D], which the ``last`` layer does not need.
    """
    frame = tl.program_id(0).to(tl.int64)
    keys = tl.load(keys_ptr + frame * KEPT + tl.arange(0, KEPT))
    exists = keys >= 0
    beam = tl.where(exists, keys // K, 0)
    codes = tl.where(exists, keys % K, 0)
    rows = frame * beams + beam
    sure = pair_distances(x_ptr, codebook_ptr, rows, codes, exists, D, BLOCK_D, tl.float64)
    place = places_among(sure, keys)
    kept = place < wanted
    target = frame * wanted + place
    for earlier in range(layer):
        step = tl.load(paths_ptr + rows * layer + earlier, kept, other=0)
        tl.store(longer_ptr + target * (layer + 1) + earlier, step, kept)
    tl.store(longer_ptr + target * (layer + 1) + layer, codes.to(tl.int64), kept)
    if last == 0:
        for first in range(0, D, BLOCK_D):
            columns = first + tl.arange(0, BLOCK_D)
            inside = kept[:, None] & (columns < D)[None, :]
            address = rows[:, None] * D + columns[None, :]
            values = tl.load(x_ptr + address, inside, other=0.0)
            address = codes.to(tl.int64)[:, None] * D + columns[None, :]
            left = values - tl.load(codebook_ptr + address, inside, other=0.0)
            left = tl.where(exists[:, None], left, float("nan"))
            tl.store(left_ptr + target[:, None] * D + columns[None, :], left, inside)


def repeated(codebook: Tensor) -> Tensor:
    """Codes that an earlier one equals, [K] bool, without a synchronisation."""
    K, D = codebook.shape
    factors = mix(torch.arange(1, D + 1, device=codebook.device)) | 1
    # Zero has two representations, and they are equal.
    bits = (codebook.float() + 0.0).contiguous().view(torch.int32).to(torch.int64)
    order = (bits * factors).sum(dim=1).argsort(stable=True)
    same = (codebook[order[1:]] == codebook[order[:-1]]).all(dim=1)
    return (
        torch.zeros(K, dtype=torch.bool, device=codebook.device)
        .index_fill_(0, order[:1], False)
        .index_copy_(0, order[1:], same)
    )


_distinct = WeakIdKeyDictionary()
"""Biases without repeats by those that they were made of: prepared codes stay as they are."""


def without_repeats(codebook: Tensor, codes: PreparedCodes) -> PreparedCodes:
    """Prepared codes of which those that an earlier one equals are never chosen."""
    bias = _distinct.get(codes.bias)
    if bias is None:
        bias = _bias_of_first(codebook, codes)
        # What is made while a CUDA graph is captured exists in its replays alone.
        if not (bias.is_cuda and torch.cuda.is_current_stream_capturing()):
            _distinct[codes.bias] = bias
    return codes._replace(bias=bias)


def _bias_of_first(codebook: Tensor, codes: PreparedCodes) -> Tensor:
    place = physical_place(codebook.shape[0], codebook.device)
    bias = codes.bias.clone()
    bias[place] = bias[place].masked_fill(repeated(codebook), -torch.inf)
    return bias


def _extend(
    x: Tensor, codebook: Tensor, codes: PreparedCodes, rows: PreparedRows, kept: Scanned,
    paths: Tensor, beams: int, wanted: int, last: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Residuals [n·wanted, D], unwritten after the ``last`` layer, and paths [n·wanted, q + 1]."""
    (n, D), K, layer = (x.shape[0] // beams, x.shape[1]), codebook.shape[0], paths.shape[1]
    left = torch.empty(0 if last else n * wanted, D, dtype=torch.float32, device=x.device)
    longer = torch.empty(n * wanted, layer + 1, dtype=torch.int64, device=x.device)
    # Ties that float32 cannot tell apart must all be there.
    kept_keys = max(16, power_of_two_above(2 * wanted))
    keys = torch.empty(n, kept_keys, dtype=torch.int32, device=x.device)
    options = {"KEPT": kept_keys, **tuning.options(tuning.beam_config()), **tuning.UNFUSED}
    launched(candidates_kernel)[(n,)](
        x, codebook, codes.bias, codes.statistics, rows.shrink, rows.squares, rows.error,
        rows.valid, kept.best, kept.runs, kept.second, keys,
        K, D, padded_codes(K), kept.share, beams, kept.parts, wanted,
        B=power_of_two_above(beams), W=power_of_two_above(kept.parts),
        SLOTS=kept.slots, **options,
    )  # fmt: skip
    launched(winners_kernel)[(n,)](
        x, codebook, keys, paths if layer else longer, left, longer,
        K, D, beams, wanted, layer, int(last), **options,
    )  # fmt: skip
    return left, longer


def beam_codes(
    x: Tensor, codebooks: Sequence[Tensor], prepared: Sequence[PreparedCodes], width: int
) -> Tensor:
    """See :func:`b2t_kernels.beam_codes`; ``prepared`` is not yet :func:`without_repeats`."""
    (N, D), Q = x.shape, len(codebooks)
    x = x.float().contiguous()
    books = [book.float().contiguous() for book in codebooks]
    distinct = [without_repeats(*pair) for pair in zip(books, prepared, strict=True)]
    codes = torch.empty(N, Q, dtype=torch.int64, device=x.device)
    # x̂ of all sums, and three numbers for each slot of a frame, fit the scratch.
    bytes_of_frame = max(2 * padded_width(D) * width, 12 * FRAME_SLOTS)
    size = max(1, SCRATCH_BYTES // bytes_of_frame)
    for start in range(0, N, size):
        left = x[start : start + size]
        paths, beams = left.new_empty(left.shape[0], 0, dtype=torch.int64), 1
        for q, (book, made) in enumerate(zip(books, distinct, strict=True)):
            K, last = book.shape[0], q == Q - 1
            wanted = 1 if last else min(width, beams * K)
            rows = prepare_rows(left, made, None)
            kept = scan(rows, made, K, Wanted(True, True, parts=FRAME_SLOTS // beams))
            left, paths = _extend(left, book, made, rows, kept, paths, beams, wanted, last)
            beams = wanted
        codes[start : start + size] = paths
    return codes
