"""Nearest-code search in Triton: argmax of x·c − ½|c|² as the codebook streams past the rows.

Letters: N rows, K codes, D width, W partial results per row. Three launches: ``rows`` rounds a part
of the rows once, ``scan`` keeps the best of each slot, ``settle_kernel`` merges the slots, finds
the code inside the winning run of eight, and proves it (``exact``) or queues the row for
``refine_kernel``. The soft assignment's normalizer comes out of the same scan (``usage``).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from b2t_kernels import tuning
from b2t_kernels.exact import (
    REFINE_PROGRAMS,
    SMALLEST_SQUARE,
    queue_doubtful,
    refine_kernel,
    run_distances,
    score_threshold,
    tolerance_of,
    two_least,
)
from b2t_kernels.launching import (
    Buffer,
    beyond,
    ceildiv,
    launched,
    power_of_two_above,
    scratch,
)
from b2t_kernels.prepare import (
    GROUP,
    PreparedCodes,
    code_scale,
    padded_codes,
    physical_row,
)
from b2t_kernels.rows import PreparedRows, parts, prepare_rows
from b2t_kernels.scan import LOWEST, kept_parts, logit_factor, scan_kernel, winner


@triton.jit
def run_scores(rows_ptr, shrink, rows, codes_ptr, bias_ptr, run, N, padded_D, STEP: tl.constexpr):
    """Scores of each row's run of eight codes from the rounded vectors: [n, 8]."""
    n: tl.constexpr = rows.shape[0]
    places = physical_row(run[:, None] + tl.arange(0, GROUP)[None, :])
    scores = shrink[:, None] * tl.load(bias_ptr + places)
    for first in range(0, padded_D, STEP):
        columns = first + tl.arange(0, STEP)
        address = rows[:, None] * padded_D + columns[None, :]
        values = tl.load(rows_ptr + address, (rows < N)[:, None], other=0.0).to(tl.float32)
        address = places.to(tl.int64)[:, :, None] * padded_D + columns[None, None, :]
        codes = tl.load(codes_ptr + address).to(tl.float32)
        scores += tl.sum(tl.reshape(values, [n, 1, STEP]) * codes, axis=2)
    return scores


@triton.jit
def recover(rows_ptr, shrink, rows, codes_ptr, bias_ptr, run, N, padded_D, STEP: tl.constexpr):
    """Index inside the winning run of eight, from the rounded vectors; ties to the lowest."""
    scores = run_scores(rows_ptr, shrink, rows, codes_ptr, bias_ptr, run, N, padded_D, STEP)
    offsets = tl.arange(0, GROUP)[None, :]
    top = tl.max(scores, axis=1)
    return run + tl.min(tl.where(scores == top[:, None], offsets, GROUP), axis=1)


@triton.jit
def merge_mass(mass_ptr, place, held, best, top, factor, valid):
    """Log2-sum-exp2 of the logits · log2(e) from the masses beside each slot's best."""
    anchor = tl.maximum(top, LOWEST)
    mass = tl.load(mass_ptr + place, held, other=0.0)
    lower = (tl.maximum(best, LOWEST) - anchor[:, None]) * factor[:, None]
    total = tl.sum(mass * tl.exp2(lower), axis=1)
    valid = valid & (total > 0)
    return tl.where(valid, anchor * factor + tl.log2(tl.where(valid, total, 1.0)), float("inf"))


@triton.jit
def prove(
    x_ptr, codebook_ptr, bias_ptr, statistics_ptr, squares_ptr, error_ptr, second_ptr,
    rows, run, top, best, place, held, shrink, N, K, D, padded_D, STEP: tl.constexpr,
):  # fmt: skip
    """Index of the nearest code of each row's winning run, whether that is sure, near and hidden.

    ``near`` and ``hidden`` [n, W] are the slots whose best, and whose second-best, may be nearer.
    """
    distances = run_distances(x_ptr, codebook_ptr, bias_ptr, rows, run, N, K, D, padded_D, STEP)
    nearest, runner_up, index = two_least(distances, run)
    squares = tl.load(squares_ptr + rows, rows < N, other=0.0)
    error = tl.load(error_ptr + rows, rows < N, other=0.0)
    least = score_threshold(
        top, nearest, squares, error, code_scale(statistics_ptr), shrink, statistics_ptr, D
    )
    near = held & (best >= least[:, None])
    second = tl.load(second_ptr + place, held, other=-float("inf"))
    hidden = near & (second >= least[:, None])
    distinct = (nearest > SMALLEST_SQUARE) & (runner_up > nearest * tolerance_of(D))
    crowded = tl.sum((near | hidden).to(tl.int32), axis=1) > 1
    hides = tl.max(hidden.to(tl.int32), axis=1) > 0
    return index, distinct & ~crowded & ~hides, near, hidden


@triton.jit(do_not_specialize=["N"])
def settle_kernel(
    x_ptr, codebook_ptr, rows_ptr, shrink_ptr, squares_ptr, error_ptr, valid_ptr, codes_ptr,
    bias_ptr, statistics_ptr, temperature_ptr, best_ptr, runs_ptr, second_ptr, mass_ptr,
    indices_ptr, counts_ptr, queue_ptr, length_ptr, slots_ptr, lse_ptr, frames_ptr,
    N, K, D, padded_D, parts_of_row,
    BLOCK_N: tl.constexpr, W: tl.constexpr, STEP: tl.constexpr,
    SEARCH: tl.constexpr, EXACT: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """Merge what the scan kept, ``parts_of_row`` ≤ W results a row, into indices, counts and lse.

    SEARCH: indices and counts, proven or queued with EXACT. SOFT: lse, +inf where a row does not
    count, and the number of rows that do.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    place, held, best, runs = kept_parts(best_ptr, runs_ptr, rows, inside, parts_of_row, W)
    shrink = tl.load(shrink_ptr + rows, inside, other=1.0)
    valid, top, run = winner(best, runs, tl.load(valid_ptr + rows, inside, other=0) != 0)
    if SOFT:
        factor = logit_factor(temperature_ptr, code_scale(statistics_ptr), shrink)
        lse = merge_mass(mass_ptr, place, held, best, top, factor, valid)
        tl.store(lse_ptr + rows, lse, inside)
        tl.atomic_add(frames_ptr, tl.sum((lse < float("inf")).to(tl.int64), axis=0))
    if SEARCH:
        counted = valid
        if EXACT:
            index, sure, near, hidden = prove(
                x_ptr, codebook_ptr, bias_ptr, statistics_ptr, squares_ptr, error_ptr, second_ptr,
                rows, run, top, best, place, held, shrink, N, K, D, padded_D, STEP,
            )  # fmt: skip
            counted = valid & sure
            queue_doubtful(
                rows, valid & ~sure, near, hidden, runs, queue_ptr, length_ptr, slots_ptr, W
            )
        else:
            index = recover(rows_ptr, shrink, rows, codes_ptr, bias_ptr, run, N, padded_D, STEP)
        tl.store(indices_ptr + rows, tl.where(valid, index, -1).to(tl.int64), inside)
        tl.atomic_add(counts_ptr + index, tl.full([BLOCK_N], 1, tl.int64), mask=counted)


class Found(NamedTuple):
    """What a scan gives: indices [N], counts [K], lse [N] and valid rows []; what was asked for."""

    indices: Tensor
    counts: Tensor
    lse: Tensor
    frames: Any


class Wanted(NamedTuple):
    """What a scan is for: nearest codes, the soft assignment with its temperature, or a draw.

    keys: those of the rows [N] and of the codes [K′] int64, where codes are drawn.
    parts: partial results wanted for each row, where the codes suffice; 0: as few as fill a GPU.
    """

    search: bool
    exact: bool
    temperature: Tensor | None = None
    keys: tuple[Tensor, Tensor] | None = None
    parts: int = 0

    @property
    def soft(self) -> bool:
        """Whether each slot's mass is wanted beside its best."""
        return self.temperature is not None and self.keys is None


class Scanned(NamedTuple):
    """What a scan keeps of N rows, [N, parts] each, unwanted ones stand for another.

    parts: splits · slots; slots: of one split; share: codes of a split.
    """

    best: Buffer
    runs: Buffer
    second: Buffer
    mass: Buffer
    parts: int
    slots: int
    share: int


def scan(rows: PreparedRows, codes: PreparedCodes, K: int, wanted: Wanted) -> Scanned:
    """Scan all K codes for prepared rows, with the configuration chosen for the device."""
    draws = wanted.keys is not None
    return tuning.launch(
        scan_kernel,
        tuning.scan_space(tuning.family(rows.device), rows.width, draws, rows.N <= tuning.FEW_ROWS),
        (rows.N, K, rows.width, wanted.exact, wanted.soft, draws),
        partial(_scan, rows, codes, padded_codes(K), wanted),
        rows.device,
    )


def _scan(
    rows: PreparedRows, codes: PreparedCodes, padded_K: int, wanted: Wanted, config: triton.Config
) -> Scanned:
    N, width, device = rows.N, rows.width, rows.device
    block_N, block_K = config.kwargs["BLOCK_N"], config.kwargs["BLOCK_K"]
    slots = block_K // 8 if wanted.exact else 1
    most = min(tuning.MOST_PARTS, wanted.parts or tuning.MOST_PARTS) // slots
    least = most if wanted.parts else 1
    splits, share = tuning.code_splits(N, padded_K, block_N, block_K, most, device, least)
    kept = N * splits * slots
    numbers = [(kept, torch.float32)] * (1 + wanted.exact + wanted.soft)
    runs, best, *others = scratch(device, (kept, torch.int32), *numbers)
    second = others[0] if wanted.exact else best
    mass = others[-1] if wanted.soft else best
    row_keys, code_keys = wanted.keys or (runs, runs)
    launched(scan_kernel)[(ceildiv(N, block_N), splits)](
        rows.rows, rows.shrink, codes.codes, codes.bias, codes.statistics,
        best if wanted.temperature is None else wanted.temperature, row_keys, code_keys,
        best, runs, second, mass, N, width, padded_K, share,
        WHOLE=width <= tuning.WIDEST_WHOLE, EXACT=wanted.exact, SOFT=wanted.soft,
        DRAW=wanted.keys is not None, **tuning.options(config),
    )  # fmt: skip
    return Scanned(best, runs, second, mass, splits * slots, slots, share)


def _settle(
    x: Tensor, codebook: Tensor, codes: PreparedCodes, rows: PreparedRows, kept: Scanned,
    found: Found, length: Buffer, wanted: Wanted,
) -> None:  # fmt: skip
    """Merge what was scanned into ``found``; ``length`` [≥ 1] int64 starts at zero."""
    (N, D), K = x.shape, codebook.shape[0]
    W = power_of_two_above(kept.parts)
    queue, listed = length, kept.runs
    if wanted.exact:
        queue, listed = scratch(x.device, (N, torch.int64), (N * W, torch.int32))
    config = tuning.settle_config(W)
    launched(settle_kernel)[(ceildiv(N, config.kwargs["BLOCK_N"]),)](
        x, codebook, *rows[:5], codes.codes, codes.bias, codes.statistics,
        wanted.temperature if wanted.soft else kept.best,
        kept.best, kept.runs, kept.second, kept.mass,
        found.indices if wanted.search else length, found.counts, queue, length, listed,
        found.lse if wanted.soft else kept.best, found.frames,
        N, K, D, rows.width, kept.parts,
        W=W, SEARCH=wanted.search, EXACT=wanted.exact, SOFT=wanted.soft,
        **tuning.options(config), **tuning.UNFUSED,
    )  # fmt: skip
    if wanted.exact:
        launched(refine_kernel)[(min(N, REFINE_PROGRAMS),)](
            x, codebook, codes.bias, found.indices, found.counts, queue, length, listed,
            K, D, padded_codes(K), kept.share,
            W=W, SLOTS=kept.slots, BLOCK_D=tuning.REFINE_WIDTH, num_warps=tuning.REFINE_WARPS,
            **tuning.UNFUSED,
        )  # fmt: skip


def assign(
    x: Tensor,
    codebook: Tensor,
    codes: PreparedCodes,
    mask: Tensor | None,
    *,
    exact: bool = False,
    search: bool = True,
    temperature: Tensor | None = None,
    each: Callable[[PreparedRows, Tensor], None] | None = None,
) -> Found:
    """Search contiguous x [N, D] in codebook [K, D], normalize its soft assignment, or both.

    Args:
        x: [N, D].
        codebook: [K, D] contiguous.
        codes: the same prepared.
        mask: [N] bool contiguous, or None.
        exact: see :func:`b2t_kernels.nearest_code`.
        search: whether indices and counts are wanted.
        temperature: [] float32 if lse and frames are wanted.
        each: called with the prepared rows and the lse of each part of the rows.
    """
    (N, D), K, device = x.shape, codebook.shape[0], x.device
    pieces = list(parts(N, D))
    # One buffer that starts at zero: counts, rows that count, and a queue's length for each part.
    state = torch.empty(K + 1 + len(pieces), dtype=torch.int64, device=device)
    indices = torch.empty(N if search else 0, dtype=torch.int64, device=device)
    # Nobody looks at what was not asked for.
    lse = state if temperature is None else torch.empty(N, dtype=torch.float32, device=device)
    wanted = Wanted(search, exact, temperature)
    if not pieces:
        state.zero_()
    for number, piece in enumerate(pieces):
        part, real, left = x, mask, (indices, lse)
        if len(pieces) > 1:
            part, real = x[piece], None if mask is None else mask[piece]
            left = indices[piece], lse[piece]
        rows = prepare_rows(part, codes, real, None if number else state)
        kept = scan(rows, codes, K, wanted)
        found = Found(left[0], state, left[1], beyond(state, K))
        _settle(part, codebook, codes, rows, kept, found, beyond(state, K + 1 + number), wanted)
        if each is not None:
            each(rows, left[1])
    return Found(indices, state.narrow(0, 0, K), lse, None if temperature is None else state[K])


def nearest_code(
    x: Tensor, codebook: Tensor, mask: Tensor | None, exact: bool, codes: PreparedCodes
) -> tuple[Tensor, Tensor]:
    """See :func:`b2t_kernels.nearest_code`."""
    mask = None if mask is None else mask.contiguous()
    found = assign(x.contiguous(), codebook.contiguous(), codes, mask, exact=exact)
    return found.indices, found.counts
