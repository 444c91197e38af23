"""All layers of a residual quantizer in one launch, for codebooks that fit the second-level cache.

Letters: N rows, Q quantizers, K codes, D width. A program keeps its rows through all layers: the
residual is read and written by the same block, so that it stays in the chip's caches, and the rows'
search is the one of ``nearest``, tile by tile, so that both ways give the same codes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from b2t_kernels import tuning
from b2t_kernels.nearest import search
from b2t_kernels.prepare import PreparedCodes, code_scale, padded_codes, padded_width, prepare
from b2t_kernels.rows import examine_rows, load_rows
from b2t_kernels.search import recover, search_codes, winning_run

# One launch wins while a layer's fp16 codes are small beside the second-level cache.
FUSED_BYTES = 1 << 20


@triton.jit(do_not_specialize=["N", "bucket"])
def rvq_kernel(
    x_ptr,
    mask_ptr,
    codebooks_ptr,
    codes_ptr,
    bias_ptr,
    mean_ptr,
    statistics_ptr,
    residual_ptr,
    indices_ptr,
    counts_ptr,
    N,
    K,
    D,
    padded_K,
    bucket,
    Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Indices [N, Q], counts [Q, K] and what is left of the rows, [N, D]."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    for first in range(0, BLOCK_D, STEP):
        columns = first + tl.arange(0, STEP)
        place = rows[:, None] * D + columns[None, :]
        here = inside[:, None] & (columns < D)[None, :]
        tl.store(residual_ptr + place, load_rows(x_ptr, rows, columns, N, D), here)
    tl.debug_barrier()
    for layer in range(Q):
        offset = layer + tl.zeros([], tl.int64)
        codes = codes_ptr + offset * padded_K * BLOCK_D
        bias = bias_ptr + offset * padded_K
        mean = mean_ptr + offset * BLOCK_D
        statistics = statistics_ptr + offset * 4
        scale = code_scale(statistics)
        finite, shrink = examine_rows(residual_ptr, mean, scale, rows, N, D, BLOCK_D, STEP)
        best, tile, _ = search_codes(
            residual_ptr,
            mean,
            scale,
            shrink,
            rows,
            codes,
            bias,
            N,
            D,
            padded_K,
            BLOCK_D,
            BLOCK_D,
            BLOCK_K,
            True,
            False,
        )
        valid = inside & finite
        if MASKED:
            valid = valid & (tl.load(mask_ptr + rows, inside, other=0) != 0)
        top, run = winning_run(best, tile + 8 * tl.arange(0, BLOCK_K // 8)[None, :])
        valid = valid & (top > -float("inf"))
        index = recover(
            residual_ptr,
            mean,
            scale,
            shrink,
            rows,
            codes,
            bias,
            tl.where(valid, run, 0),
            N,
            D,
            BLOCK_D,
            STEP,
        )
        tl.store(indices_ptr + rows * Q + offset, tl.where(valid, index, -1).to(tl.int64), inside)
        tl.atomic_add(counts_ptr + offset * K + index, tl.full([BLOCK_N], 1, tl.int64), mask=valid)
        tl.debug_barrier()
        for first in range(0, BLOCK_D, STEP):
            columns = first + tl.arange(0, STEP)
            place = rows[:, None] * D + columns[None, :]
            here = valid[:, None] & (columns < D)[None, :]
            code = (offset * K + index).to(tl.int64)[:, None] * D + columns[None, :]
            chosen = tl.load(codebooks_ptr + code, here, other=0.0).to(tl.float32)
            left = load_rows(residual_ptr, rows, columns, N, D) - chosen
            tl.store(residual_ptr + place, left, here)
        tl.debug_barrier()


def encode_fused(
    x: Tensor, codebooks: Tensor, prepared: PreparedCodes, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """All layers in one launch. Returns indices [N, Q], counts [Q, K] and the residual [N, D]."""
    (N, D), (Q, K, _) = x.shape, codebooks.shape
    indices = torch.empty(N, Q, dtype=torch.int64, device=x.device)
    counts = torch.zeros(Q, K, dtype=torch.int64, device=x.device)
    residual = torch.empty(N, D, dtype=torch.float32, device=x.device)
    width = padded_width(D)
    tuning.launch(
        rvq_kernel,
        tuning.fused_space(tuning.architecture(x.device), width),
        lambda meta: (triton.cdiv(N, meta["BLOCK_N"]),),
        (
            x,
            x if mask is None else mask.view(torch.uint8),
            codebooks,
            *prepared,
            residual,
            indices,
            counts,
            N,
            K,
            D,
            padded_codes(K),
            tuning.bucket(N),
        ),
        {"Q": Q, "STEP": tuning.step(width), "MASKED": mask is not None},
        accumulated=("counts_ptr",),
    )
    return indices, counts, residual


def encode_layers(
    x: Tensor, codebooks: Tensor, prepared: PreparedCodes, mask: Tensor | None, exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One search per layer. Returns indices [N, Q], counts [Q, K] and the residual [N, D]."""
    residual = x.float().clone()
    indices, counts = [], []
    padded_K = padded_codes(codebooks.shape[1])
    for layer, codebook in enumerate(codebooks):
        part = slice(layer * padded_K, (layer + 1) * padded_K)
        one = PreparedCodes(
            prepared.codes[part],
            prepared.bias[part],
            prepared.mean[layer : layer + 1],
            prepared.statistics[layer : layer + 1],
        )
        index, count = search(residual, codebook, one, mask, exact)
        chosen = codebook.float()[index.clamp(min=0)]
        residual -= chosen.masked_fill_((index < 0)[:, None], 0)
        indices.append(index)
        counts.append(count)
    return torch.stack(indices, dim=1), torch.stack(counts), residual


def fused_wins(K: int, D: int) -> bool:
    """Whether the codes of a layer are small enough for one launch."""
    width = padded_width(D)
    return width <= tuning.WIDEST_FUSED and padded_codes(K) * width * 2 <= FUSED_BYTES


def rvq_encode(
    x: Tensor, codebooks: Tensor, mask: Tensor | None, exact: bool, fused: bool | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`b2t_kernels.rvq_encode`; ``fused`` overrides the choice between the two ways."""
    x, codebooks = x.contiguous(), codebooks.contiguous()
    mask = None if mask is None else mask.contiguous()
    prepared = prepare(codebooks)
    if fused is None:
        fused = not exact and fused_wins(*codebooks.shape[1:])
    if fused and x.shape[0]:
        indices, counts, residual = encode_fused(x, codebooks, prepared, mask)
    else:
        indices, counts, residual = encode_layers(x, codebooks, prepared, mask, exact)
    quantized = torch.where((indices[:, :1] >= 0), x.float() - residual, 0)
    return indices, counts, quantized
