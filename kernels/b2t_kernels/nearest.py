"""Nearest-code search in Triton: argmax of x·c − ½|c|² as the codebook streams past a tile of rows.

Letters: N rows, K codes, D width. A program keeps a tile of rows, walks over the codes, and keeps
for each row and each of its slots the best score and the tile it came from. A slot is a run of
eight codes inside one thread (see ``prepare.physical_row``), so that the loop spends about one
maximum, one multiply-add and three eighths of a compare-and-select on a score, and exchanges
nothing between threads. The index is recovered afterwards in the winning run of eight alone.

What proves the answers of ``exact`` stands in that module.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from b2t_kernels import tuning
from b2t_kernels.exact import (
    REFINE_PROGRAMS,
    measure_rounding,
    queue_doubtful,
    refine_kernel,
    run_distances,
    score_threshold,
)
from b2t_kernels.prepare import (
    PreparedCodes,
    code_scale,
    padded_codes,
    padded_width,
    prepare,
)
from b2t_kernels.rows import examine_rows
from b2t_kernels.search import recover, search_codes, winning_run


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
