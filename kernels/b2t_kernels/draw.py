"""Codes drawn from the soft assignment in Triton, by the Gumbel-max trick inside the scan.

argmax_k z_nk + g_nk, with z the logits of ``usage`` and g Gumbel noise of the row's and the code's
keys (``gumbel``), is a draw with probability softmax(z_n) (Maddison, Tarlow and Minka 2014). Three
launches as in ``nearest``: rows, scan, and ``drawn_kernel``, which merges the splits and computes
the eight noisy logits of the winning run once more to find the code.

Letters: N rows, K codes, D width, W partial results per row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from b2t_kernels import tuning
from b2t_kernels.launching import ceildiv, launched, power_of_two_above
from b2t_kernels.nearest import Scanned, Wanted, run_scores, scan
from b2t_kernels.noise import noise
from b2t_kernels.prepare import GROUP, PreparedCodes, code_scale, padded_codes
from b2t_kernels.rows import PreparedRows, parts, prepare_rows
from b2t_kernels.scan import kept_parts, logit_factor, winner


@triton.jit(do_not_specialize=["N"])
def drawn_kernel(
    rows_ptr, shrink_ptr, valid_ptr, codes_ptr, bias_ptr, statistics_ptr, temperature_ptr,
    row_keys_ptr, code_keys_ptr, best_ptr, runs_ptr, indices_ptr, counts_ptr,
    N, padded_D, parts_of_row,
    BLOCK_N: tl.constexpr, W: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Indices and counts from ``parts_of_row`` ≤ W noisy winners a row."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    _, _, best, runs = kept_parts(best_ptr, runs_ptr, rows, inside, parts_of_row, W)
    shrink = tl.load(shrink_ptr + rows, inside, other=1.0)
    valid, _, run = winner(best, runs, tl.load(valid_ptr + rows, inside, other=0) != 0)
    scores = run_scores(rows_ptr, shrink, rows, codes_ptr, bias_ptr, run, N, padded_D, STEP)
    factor = logit_factor(temperature_ptr, code_scale(statistics_ptr), shrink)
    offsets = tl.arange(0, GROUP)[None, :]
    row_keys = tl.load(row_keys_ptr + rows, inside, other=0).to(tl.uint64)
    code_keys = tl.load(code_keys_ptr + run[:, None] + offsets).to(tl.uint64)
    noisy = scores * factor[:, None] + noise(row_keys[:, None], code_keys)
    most = tl.max(noisy, axis=1)
    index = run + tl.min(tl.where(noisy == most[:, None], offsets, GROUP), axis=1)
    tl.store(indices_ptr + rows, tl.where(valid, index, -1).to(tl.int64), inside)
    tl.atomic_add(counts_ptr + index, tl.full([BLOCK_N], 1, tl.int64), mask=valid)


def _merge(
    codes: PreparedCodes, rows: PreparedRows, kept: Scanned, wanted: Wanted,
    indices: Tensor, counts: Tensor,
) -> None:  # fmt: skip
    assert wanted.keys is not None
    N, W = rows.N, power_of_two_above(kept.parts)
    config = tuning.settle_config(W)
    launched(drawn_kernel)[(ceildiv(N, config.kwargs["BLOCK_N"]),)](
        rows.rows, rows.shrink, rows.valid, codes.codes, codes.bias, codes.statistics,
        wanted.temperature, *wanted.keys, kept.best, kept.runs, indices, counts,
        N, rows.width, kept.parts, W=W, **tuning.options(config),
    )  # fmt: skip


def sample_code(
    x: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    row_keys: Tensor,
    code_keys: Tensor,
    codes: PreparedCodes,
) -> tuple[Tensor, Tensor]:
    """See :func:`b2t_kernels.sample_code`."""
    (N, D), K, device = x.shape, codebook.shape[0], x.device
    x, row_keys = x.contiguous(), row_keys.contiguous()
    padded = torch.nn.functional.pad(code_keys, (0, padded_codes(K) - K))
    indices = torch.empty(N, dtype=torch.int64, device=device)
    counts = torch.empty(K, dtype=torch.int64, device=device)
    if not N:
        counts.zero_()
    for piece in parts(N, D):
        rows = prepare_rows(x[piece], codes, None, None if piece.start else counts)
        wanted = Wanted(True, False, temperature, (row_keys[piece], padded))
        kept = scan(rows, codes, K, wanted)
        _merge(codes, rows, kept, wanted, indices[piece], counts)
    return indices, counts
