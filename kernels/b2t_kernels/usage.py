"""Soft assignment summed over rows, forward and backward, in streaming passes.

Letters: N rows, K codes, D width; p_nk = softmax_k z_nk with z_nk = (2x_n·c_k − |c_k|²)/τ, which is
softmax_k(−|x_n − c_k|²/τ). Nothing of size N × K is stored and every sum has a fixed order.

- ``normalizer_kernel``: rows on chip, codes stream; online softmax, log-sum-exp of each row.
- ``column_kernel``: codes on chip, rows stream; Σ_n p_nk.
- ``row_gradient_kernel``: rows on chip, codes stream twice; first ḡ_n = Σ_k p_nk g_k, then
  ∂x_n = (2/τ) Σ_k w_nk c_k with w_nk = p_nk (g_k − ḡ_n), whose rows sum to zero.
- ``code_gradient_kernel``: codes on chip, rows stream; ∂c_k = (2/τ) Σ_n w_nk (x_n − c_k).

Products run on fp16 tensor cores with the scales of ``prepare``. An assignment may be far below
fp16's smallest normal number, so w is multiplied by 2⁸ and g divided by its largest element; rows
more than 2¹³ times farther out than the codes saturate in the codebook's gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from b2t_kernels import tuning
from b2t_kernels.prepare import code_scale, padded_codes, padded_width, physical_row, prepare
from b2t_kernels.rows import examine_rows, load_rows, moved_rows

LOG2_E = tl.constexpr(1.4426950408889634)
WEIGHT_SCALE = tl.constexpr(256.0)
FP16_MAX = tl.constexpr(65504.0)


@triton.jit
def logit_factor(temperature_ptr, scale, shrink):
    """What turns a score of the scaled vectors into z · log2(e)."""
    return 2.0 / (tl.load(temperature_ptr) * scale * scale * shrink) * LOG2_E


@triton.jit
def code_tile(codes_ptr, bias_ptr, places, BLOCK_D: tl.constexpr):
    """ĉ [d, k] and its bias [k]."""
    columns = tl.arange(0, BLOCK_D)
    address = places[None, :].to(tl.int64) * BLOCK_D + columns[:, None]
    return tl.load(codes_ptr + address), tl.load(bias_ptr + places)


@triton.jit(do_not_specialize=["N", "bucket"])
def normalizer_kernel(
    x_ptr,
    mask_ptr,
    codes_ptr,
    bias_ptr,
    mean_ptr,
    statistics_ptr,
    temperature_ptr,
    lse_ptr,
    shrink_ptr,
    frames_ptr,
    N,
    K,
    D,
    padded_K,
    bucket,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Log2-sum-exp2 of z · log2(e) per row (+inf where invalid), and the number of valid rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = code_scale(statistics_ptr)
    finite, shrink = examine_rows(x_ptr, mean_ptr, scale, rows, N, D, BLOCK_D, STEP)
    factor = logit_factor(temperature_ptr, scale, shrink)
    resident = moved_rows(x_ptr, mean_ptr, scale, shrink, rows, 0, N, D, BLOCK_D).to(tl.float16)
    top = tl.full([BLOCK_N], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, padded_K, BLOCK_K):
        codes, bias = code_tile(codes_ptr, bias_ptr, start + tl.arange(0, BLOCK_K), BLOCK_D)
        scores = tl.dot(resident, codes) + shrink[:, None] * bias[None, :]
        logits = scores * factor[:, None]
        new_top = tl.maximum(tl.maximum(top, tl.max(logits, axis=1)), -3e38)
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(logits - new_top[:, None]), axis=1)
        top = new_top
    valid = (rows < N) & finite & (total > 0)
    if MASKED:
        valid = valid & (tl.load(mask_ptr + rows, rows < N, other=0) != 0)
    lse = tl.where(valid, top + tl.log2(tl.where(valid, total, 1.0)), float("inf"))
    tl.store(lse_ptr + rows, lse, rows < N)
    tl.store(shrink_ptr + rows, shrink, rows < N)
    tl.atomic_add(frames_ptr, tl.sum(valid.to(tl.int64), axis=0))


@triton.jit
def streamed_rows(
    x_ptr,
    mean_ptr,
    shrink_ptr,
    lse_ptr,
    temperature_ptr,
    scale,
    rows,
    N,
    D,
    BLOCK_D: tl.constexpr,
):
    """A tile of rows as it passes by: x̂ fp16, r, the logit factor and the log2-sum-exp2."""
    columns = tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + rows, rows < N, other=float("inf"))
    shrink = tl.load(shrink_ptr + rows, rows < N, other=1.0)
    values = load_rows(x_ptr, rows, columns, N, D)
    moved = (values - tl.load(mean_ptr + columns)[None, :]) * (scale * shrink)[:, None]
    moved = tl.where((lse < float("inf"))[:, None], moved, 0.0)
    return moved.to(tl.float16), shrink, logit_factor(temperature_ptr, scale, shrink), lse


@triton.jit(do_not_specialize=["N", "bucket"])
def column_kernel(
    x_ptr,
    codes_ptr,
    bias_ptr,
    mean_ptr,
    statistics_ptr,
    temperature_ptr,
    lse_ptr,
    shrink_ptr,
    partial_ptr,
    N,
    K,
    D,
    padded_K,
    rows_per_split,
    bucket,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Σ_n p_nk over the rows of one split, into partial [splits, K]."""
    codes_here = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(1).to(tl.int64)
    scale = code_scale(statistics_ptr)
    codes, bias = code_tile(codes_ptr, bias_ptr, physical_row(codes_here), BLOCK_D)
    total = tl.zeros([BLOCK_K], tl.float32)
    first = split * rows_per_split
    for start in range(first, tl.minimum(first + rows_per_split, N), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        rounded, shrink, factor, lse = streamed_rows(
            x_ptr, mean_ptr, shrink_ptr, lse_ptr, temperature_ptr, scale, rows, N, D, BLOCK_D
        )
        scores = tl.dot(rounded, codes) + shrink[:, None] * bias[None, :]
        total += tl.sum(tl.exp2(scores * factor[:, None] - lse[:, None]), axis=0)
    tl.store(partial_ptr + split * K + codes_here, total, codes_here < K)


@triton.jit(do_not_specialize=["N", "bucket"])
def row_gradient_kernel(
    x_ptr,
    codes_ptr,
    bias_ptr,
    mean_ptr,
    statistics_ptr,
    temperature_ptr,
    lse_ptr,
    shrink_ptr,
    grad_ptr,
    shift_ptr,
    grad_x_ptr,
    N,
    K,
    D,
    padded_K,
    bucket,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
):
    """ḡ [N] and ∂x [N, D] for g [K′] in physical order, its largest element 1."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = code_scale(statistics_ptr)
    _, shrink = examine_rows(x_ptr, mean_ptr, scale, rows, N, D, BLOCK_D, STEP)
    factor = logit_factor(temperature_ptr, scale, shrink)
    resident = moved_rows(x_ptr, mean_ptr, scale, shrink, rows, 0, N, D, BLOCK_D).to(tl.float16)
    lse = tl.load(lse_ptr + rows, rows < N, other=float("inf"))
    shift = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, padded_K, BLOCK_K):
        places = start + tl.arange(0, BLOCK_K)
        codes, bias = code_tile(codes_ptr, bias_ptr, places, BLOCK_D)
        scores = tl.dot(resident, codes) + shrink[:, None] * bias[None, :]
        p = tl.exp2(scores * factor[:, None] - lse[:, None])
        shift += tl.sum(p * tl.load(grad_ptr + places)[None, :], axis=1)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, padded_K, BLOCK_K):
        places = start + tl.arange(0, BLOCK_K)
        codes, bias = code_tile(codes_ptr, bias_ptr, places, BLOCK_D)
        scores = tl.dot(resident, codes) + shrink[:, None] * bias[None, :]
        p = tl.exp2(scores * factor[:, None] - lse[:, None])
        w = p * (tl.load(grad_ptr + places)[None, :] - shift[:, None]) * WEIGHT_SCALE
        total = tl.dot(w.to(tl.float16), tl.trans(codes), total)
    columns = tl.arange(0, BLOCK_D)
    total *= 2.0 / scale / tl.load(temperature_ptr)
    total = total / WEIGHT_SCALE
    inside = (rows < N)[:, None] & (columns < D)[None, :]
    tl.store(grad_x_ptr + rows[:, None] * D + columns[None, :], total, inside)
    tl.store(shift_ptr + rows, shift, rows < N)
    tl.store(shrink_ptr + rows, shrink, rows < N)


@triton.jit(do_not_specialize=["N", "bucket"])
def code_gradient_kernel(
    x_ptr,
    codes_ptr,
    bias_ptr,
    mean_ptr,
    statistics_ptr,
    temperature_ptr,
    lse_ptr,
    shrink_ptr,
    grad_ptr,
    shift_ptr,
    partial_ptr,
    weight_ptr,
    N,
    K,
    D,
    padded_K,
    rows_per_split,
    bucket,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Σ_n w_nk x̂_n/r_n and Σ_n w_nk of one split: partial [splits, K, D], weight [splits, K]."""
    codes_here = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(1).to(tl.int64)
    scale = code_scale(statistics_ptr)
    places = physical_row(codes_here)
    columns = tl.arange(0, BLOCK_D)
    codes = tl.load(codes_ptr + places[:, None].to(tl.int64) * BLOCK_D + columns[None, :])
    bias = tl.load(bias_ptr + places)
    grad = tl.load(grad_ptr + places)
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    weight = tl.zeros([BLOCK_K], tl.float32)
    first = split * rows_per_split
    for start in range(first, tl.minimum(first + rows_per_split, N), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        rounded, shrink, factor, lse = streamed_rows(
            x_ptr, mean_ptr, shrink_ptr, lse_ptr, temperature_ptr, scale, rows, N, D, BLOCK_D
        )
        shift = tl.load(shift_ptr + rows, rows < N, other=0.0)
        scores = tl.dot(codes, tl.trans(rounded)) + bias[:, None] * shrink[None, :]
        p = tl.exp2(scores * factor[None, :] - lse[None, :])
        w = p * (grad[:, None] - shift[None, :])
        weight += tl.sum(w, axis=1)
        inverse = 1.0 / shrink
        scaled = w * inverse[None, :] * WEIGHT_SCALE
        scaled = tl.minimum(tl.maximum(scaled, -FP16_MAX), FP16_MAX)
        total = tl.dot(scaled.to(tl.float16), rounded, total)
    place = split * K + codes_here
    inside = (codes_here < K)[:, None] & (columns < D)[None, :]
    total = total / WEIGHT_SCALE
    tl.store(partial_ptr + place[:, None] * D + columns[None, :], total, inside)
    tl.store(weight_ptr + place, weight, codes_here < K)


MOST_SPLITS = 16
PROGRAMS_WANTED = 264


def row_splits(N: int, K: int) -> tuple[int, int]:
    """How many parts the rows are cut into so that few codes still fill a GPU, and their size."""
    splits = min(MOST_SPLITS, max(1, PROGRAMS_WANTED * 64 // padded_codes(K)), triton.cdiv(N, 256))
    size = triton.cdiv(triton.cdiv(N, splits), 64) * 64
    return triton.cdiv(N, size), size


def physical_place(K: int, device: torch.device) -> Tensor:
    """Where each code lies among the prepared ones, [K]: ``prepare.physical_row`` in torch."""
    code = torch.arange(K, device=device)
    run, within = (code % 64) // 8, code % 8
    return code - code % 64 + (run % 4) * 2 + (run // 4) * 8 + within % 2 + (within // 2) * 16


def _physical_order(grad: Tensor, K: int) -> Tensor:
    placed = grad.new_zeros(padded_codes(K))
    placed[physical_place(K, grad.device)] = grad
    return placed


def usage_forward(
    x: Tensor, codebook: Tensor, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``ops``: summed soft assignments [K], log2-sum-exp2 [N], valid rows."""
    x, (N, D), K = x.contiguous(), x.shape, codebook.shape[0]
    lse = torch.empty(N, dtype=torch.float32, device=x.device)
    shrink = torch.empty(N, dtype=torch.float32, device=x.device)
    frames = torch.zeros(1, dtype=torch.int64, device=x.device)
    if N == 0:
        return torch.zeros(K, dtype=torch.float32, device=x.device), lse, frames[0].clone()
    prepared = prepare(codebook)
    width = padded_width(D)
    chip = tuning.architecture(x.device)
    tuning.launch(
        normalizer_kernel,
        tuning.normalizer_space(chip, width),
        lambda meta: (triton.cdiv(N, meta["BLOCK_N"]),),
        (
            x,
            x if mask is None else mask.contiguous().view(torch.uint8),
            *prepared,
            temperature,
            lse,
            shrink,
            frames,
            N,
            K,
            D,
            padded_codes(K),
            tuning.bucket(N),
        ),
        {"STEP": tuning.step(width), "MASKED": mask is not None},
        accumulated=("frames_ptr",),
    )
    splits, size = row_splits(N, K)
    partial = torch.empty(splits, K, dtype=torch.float32, device=x.device)
    tuning.launch(
        column_kernel,
        tuning.column_space(chip, width),
        lambda meta: (triton.cdiv(K, meta["BLOCK_K"]), splits),
        (
            x,
            *prepared,
            temperature,
            lse,
            shrink,
            partial,
            N,
            K,
            D,
            padded_codes(K),
            size,
            tuning.bucket(N),
        ),
        {},
    )
    return partial.sum(dim=0), lse, frames[0].clone()


def usage_backward(
    grad: Tensor, x: Tensor, codebook: Tensor, temperature: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """See ``ops``: gradients of Σ_k grad_k · usage_k for x and the codebook."""
    rows, (N, D), K = x.contiguous(), x.shape, codebook.shape[0]
    if N == 0:
        return torch.zeros_like(rows), torch.zeros_like(codebook)
    prepared = prepare(codebook)
    width = padded_width(D)
    chip = tuning.architecture(x.device)
    largest = grad.abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny)
    placed = _physical_order(grad.float() / largest, K)
    shift = torch.empty(N, dtype=torch.float32, device=x.device)
    shrink = torch.empty(N, dtype=torch.float32, device=x.device)
    grad_x = torch.empty(N, D, dtype=torch.float32, device=x.device)
    tuning.launch(
        row_gradient_kernel,
        tuning.row_gradient_space(chip, width),
        lambda meta: (triton.cdiv(N, meta["BLOCK_N"]),),
        (
            rows,
            *prepared,
            temperature,
            lse,
            shrink,
            placed,
            shift,
            grad_x,
            N,
            K,
            D,
            padded_codes(K),
            tuning.bucket(N),
        ),
        {"STEP": tuning.step(width)},
    )
    splits, size = row_splits(N, K)
    partial = torch.empty(splits, K, D, dtype=torch.float32, device=x.device)
    weight = torch.empty(splits, K, dtype=torch.float32, device=x.device)
    tuning.launch(
        code_gradient_kernel,
        tuning.code_gradient_space(chip, width),
        lambda meta: (triton.cdiv(K, meta["BLOCK_K"]), splits),
        (
            rows,
            *prepared,
            temperature,
            lse,
            shrink,
            placed,
            shift,
            partial,
            weight,
            N,
            K,
            D,
            padded_codes(K),
            size,
            tuning.bucket(N),
        ),
        {},
    )
    scale = prepared_scale(prepared.statistics)
    centred = codebook.float() - prepared.mean[0, :D]
    pulled = partial.sum(dim=0) / scale - weight.sum(dim=0)[:, None] * centred
    grad_codebook = torch.where(codebook.isfinite().all(dim=1, keepdim=True), pulled, 0)
    factor = 2 * largest / temperature
    return (grad_x * largest).to(x.dtype), (grad_codebook * factor).to(codebook.dtype)


def prepared_scale(statistics: Tensor) -> Tensor:
    """S as ``prepare.code_scale`` computes it, 0-d."""
    _, exponent = torch.frexp(statistics[0, 0])
    power = (8 - exponent).clamp(-100, 100)
    return torch.where(statistics[0, 0] > 0, torch.exp2(power.float()), 1.0)
