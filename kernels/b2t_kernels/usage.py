"""Soft assignment summed over rows, forward and backward, in streaming passes.

Letters: N rows, K codes, D width; p_nk = softmax_k z_nk with z_nk = (2x_n·c_k − |c_k|²)/τ, which is
softmax_k(−|x_n − c_k|²/τ). Nothing of size N × K is stored and every sum has a fixed order.

- ``scan``: rows on chip, codes stream; the log-sum-exp of each row, with the search if wanted.
- ``column_kernel``: codes on chip, rows stream; Σ_n p_nk.
- ``shift_kernel``: rows on chip, codes stream; ḡ_n = Σ_k p_nk g_k.
- ``row_gradient_kernel``: the same; ∂x_n = (2/τ) Σ_k w_nk c_k with w_nk = p_nk (g_k − ḡ_n), whose
  rows sum to zero.
- ``code_gradient_kernel``: codes on chip, rows stream; ∂c_k = (2/τ) Σ_n w_nk (x_n − c_k).

Products run on fp16 tensor cores with the scales of ``prepare``. An assignment may be far below
fp16's smallest normal number, so w is multiplied by 2⁸ and g divided by its largest element; rows
more than 2¹³ times farther out than the codes saturate in the codebook's gradient.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from b2t_kernels import tuning
from b2t_kernels.launching import Buffer, ceildiv, launched, scratch
from b2t_kernels.nearest import Found, assign
from b2t_kernels.prepare import (
    PreparedCodes,
    code_scale,
    padded_codes,
    physical_row,
)
from b2t_kernels.rows import PreparedRows, parts, prepare_rows
from b2t_kernels.scan import code_tile, logit_factor, row_tile

WEIGHT_SCALE = tl.constexpr(256.0)
FP16_MAX = tl.constexpr(65504.0)
SMALLEST = tl.constexpr(1.1754943508222875e-38)
MOST_SPLITS = 16
PLACED = 1024


@triton.jit
def row_state(
    rows_ptr, shrink_ptr, lse_ptr, temperature_ptr, scale, rows, N, BLOCK_D: tl.constexpr
):
    """A tile of rows: x̂ [n, d], r, the logit factor and the log2-sum-exp2 (+∞ outside)."""
    shrink = tl.load(shrink_ptr + rows, rows < N, other=1.0)
    lse = tl.load(lse_ptr + rows, rows < N, other=float("inf"))
    tile = row_tile(rows_ptr, rows, N, BLOCK_D, tl.arange(0, BLOCK_D))
    return tile, shrink, logit_factor(temperature_ptr, scale, shrink), lse


@triton.jit
def assignments(tile, codes, shrink, bias, factor, lse):
    """P of a tile of rows [n, d] and codes [d, k]: [n, k]."""
    scores = tl.dot(tile, codes) + shrink[:, None] * bias[None, :]
    return tl.exp2(scores * factor[:, None] - lse[:, None])


@triton.jit(do_not_specialize=["N"])
def column_kernel(
    rows_ptr, shrink_ptr, lse_ptr, codes_ptr, bias_ptr, statistics_ptr, temperature_ptr,
    partial_ptr, N, K, share,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Σ_n p_nk over the rows of one split, into partial [splits, K]."""
    codes_here = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(1).to(tl.int64)
    scale = code_scale(statistics_ptr)
    places = physical_row(codes_here)
    codes = code_tile(codes_ptr, places, BLOCK_D, tl.arange(0, BLOCK_D))
    bias = tl.load(bias_ptr + places)
    total = tl.zeros([BLOCK_K], tl.float32)
    first = split * share
    for start in range(first, tl.minimum(first + share, N), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        tile, shrink, factor, lse = row_state(
            rows_ptr, shrink_ptr, lse_ptr, temperature_ptr, scale, rows, N, BLOCK_D
        )
        total += tl.sum(assignments(tile, codes, shrink, bias, factor, lse), axis=0)
    tl.store(partial_ptr + split * K + codes_here, total, codes_here < K)


@triton.jit(do_not_specialize=["N"])
def shift_kernel(
    rows_ptr, shrink_ptr, lse_ptr, codes_ptr, bias_ptr, statistics_ptr, temperature_ptr, grad_ptr,
    shift_ptr, N, padded_K, share,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Σ_k p_nk g_k over the codes of one split, into shift [splits, N]; g [K′] physical."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1).to(tl.int64)
    tile, shrink, factor, lse = row_state(
        rows_ptr, shrink_ptr, lse_ptr, temperature_ptr, code_scale(statistics_ptr), rows, N, BLOCK_D
    )
    total = tl.zeros([BLOCK_N], tl.float32)
    first = tl.program_id(1) * share
    for start in range(first, tl.minimum(first + share, padded_K), BLOCK_K):
        places = start + tl.arange(0, BLOCK_K)
        codes = code_tile(codes_ptr, places, BLOCK_D, tl.arange(0, BLOCK_D))
        p = assignments(tile, codes, shrink, tl.load(bias_ptr + places), factor, lse)
        total += tl.sum(p * tl.load(grad_ptr + places)[None, :], axis=1)
    tl.store(shift_ptr + split * N + rows, total, rows < N)


@triton.jit(do_not_specialize=["N"])
def row_gradient_kernel(
    rows_ptr, shrink_ptr, lse_ptr, codes_ptr, bias_ptr, statistics_ptr, temperature_ptr, grad_ptr,
    largest_ptr, shift_ptr, partial_ptr, N, D, padded_K, share, shifts,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(2/τ) Σ_k w_nk c_k over the codes of one split, into partial [splits, N, D].

    With g as it was before it was divided by its largest element; ḡ is the sum of ``shifts`` parts
    [shifts, N].
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1).to(tl.int64)
    scale = code_scale(statistics_ptr)
    columns = tl.arange(0, BLOCK_D)
    tile, shrink, factor, lse = row_state(
        rows_ptr, shrink_ptr, lse_ptr, temperature_ptr, scale, rows, N, BLOCK_D
    )
    shift = tl.zeros([BLOCK_N], tl.float32)
    for part in range(shifts):
        shift += tl.load(shift_ptr + part * N.to(tl.int64) + rows, rows < N, other=0.0)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first = tl.program_id(1) * share
    for start in range(first, tl.minimum(first + share, padded_K), BLOCK_K):
        places = start + tl.arange(0, BLOCK_K)
        codes = code_tile(codes_ptr, places, BLOCK_D, columns)
        p = assignments(tile, codes, shrink, tl.load(bias_ptr + places), factor, lse)
        w = p * (tl.load(grad_ptr + places)[None, :] - shift[:, None]) * WEIGHT_SCALE
        total = tl.dot(w.to(tl.float16), tl.trans(codes), total)
    total *= 2.0 / scale / tl.load(temperature_ptr)
    total = total / WEIGHT_SCALE * tl.load(largest_ptr)
    inside = (rows < N)[:, None] & (columns < D)[None, :]
    place = (split * N + rows)[:, None] * D + columns[None, :]
    tl.store(partial_ptr + place, total, inside)


@triton.jit(do_not_specialize=["N"])
def code_gradient_kernel(
    rows_ptr, shrink_ptr, lse_ptr, codes_ptr, bias_ptr, statistics_ptr, temperature_ptr, grad_ptr,
    shift_ptr, partial_ptr, weight_ptr, N, K, D, share,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Σ_n w_nk x̂_n/r_n and Σ_n w_nk of one split: partial [splits, K, D], weight [splits, K]."""
    codes_here = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(1).to(tl.int64)
    scale = code_scale(statistics_ptr)
    places = physical_row(codes_here)
    columns = tl.arange(0, BLOCK_D)
    codes = row_tile(codes_ptr, places.to(tl.int64), 2147483647, BLOCK_D, columns)
    bias = tl.load(bias_ptr + places)
    grad = tl.load(grad_ptr + places)
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    weight = tl.zeros([BLOCK_K], tl.float32)
    first = split * share
    for start in range(first, tl.minimum(first + share, N), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        tile, shrink, factor, lse = row_state(
            rows_ptr, shrink_ptr, lse_ptr, temperature_ptr, scale, rows, N, BLOCK_D
        )
        shift = tl.load(shift_ptr + rows, rows < N, other=0.0)
        scores = tl.dot(codes, tl.trans(tile)) + bias[:, None] * shrink[None, :]
        w = tl.exp2(scores * factor[None, :] - lse[None, :]) * (grad[:, None] - shift[None, :])
        weight += tl.sum(w, axis=1)
        scaled = w * (1.0 / shrink)[None, :] * WEIGHT_SCALE
        scaled = tl.minimum(tl.maximum(scaled, -FP16_MAX), FP16_MAX)
        total = tl.dot(scaled.to(tl.float16), tile, total)
    place = split * K + codes_here
    inside = (codes_here < K)[:, None] & (columns < D)[None, :]
    tl.store(partial_ptr + place[:, None] * D + columns[None, :], total / WEIGHT_SCALE, inside)
    tl.store(weight_ptr + place, weight, codes_here < K)


@triton.jit
def place_kernel(grad_ptr, placed_ptr, largest_ptr, K, padded_K, BLOCK_K: tl.constexpr):
    """Write g over its largest element, in the prepared codes' order [K′], and that element."""
    largest = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        codes = start + tl.arange(0, BLOCK_K)
        values = tl.load(grad_ptr + codes, codes < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(values))
    most = tl.maximum(tl.max(largest, axis=0), SMALLEST)
    codes = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    values = tl.load(grad_ptr + codes, codes < K, other=0.0).to(tl.float32)
    tl.store(placed_ptr + physical_row(codes), values / most, codes < padded_K)
    if tl.program_id(0) == 0:
        tl.store(largest_ptr, most)


@triton.jit(do_not_specialize=["size"])
def parts_kernel(partial_ptr, total_ptr, size, parts, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of ``parts`` ≤ PARTS of partial [parts, size], in the type of total [size]."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    each = tl.arange(0, PARTS)
    inside = (each < parts)[:, None] & (places < size)[None, :]
    address = each.to(tl.int64)[:, None] * size + places[None, :]
    total = tl.sum(tl.load(partial_ptr + address, inside, other=0.0), axis=0)
    tl.store(total_ptr + places, total, places < size)


def _add_parts(partial: Buffer, total: Buffer, parts: int, size: int) -> None:
    """Sum partial [parts, size] into ``total`` [size], in the order of a fixed tree."""
    launched(parts_kernel)[(ceildiv(size, 256),)](
        partial, total, size, parts, PARTS=MOST_SPLITS, BLOCK=256
    )


@triton.jit
def pulled_kernel(
    partial_ptr, weight_ptr, codebook_ptr, mean_ptr, bias_ptr, statistics_ptr, largest_ptr,
    temperature_ptr, pulled_ptr, K, D, parts, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The codebook's gradient from Σ_n w_nk x̂_n/r_n and Σ_n w_nk in parts; 0 if not finite."""
    codes = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    place = codes.to(tl.int64)[:, None] * D + columns[None, :]
    inside = (codes < K)[:, None] & (columns < D)[None, :]
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    weight = tl.zeros([BLOCK_K], tl.float32)
    for part in range(parts):
        above = tl.full([], part, tl.int64) * K
        total += tl.load(partial_ptr + above * D + place, inside, other=0.0)
        weight += tl.load(weight_ptr + above + codes, codes < K, other=0.0)
    mean = tl.load(mean_ptr + columns, columns < D, other=0.0)
    values = tl.load(codebook_ptr + place, inside, other=0.0).to(tl.float32)
    total = total / code_scale(statistics_ptr) - weight[:, None] * (values - mean[None, :])
    finite = tl.load(bias_ptr + physical_row(codes), codes < K, other=0.0) > -float("inf")
    total = tl.where(finite[:, None], total, 0.0)
    total *= 2 * tl.load(largest_ptr) / tl.load(temperature_ptr)
    tl.store(pulled_ptr + place, total, inside)


def placed_gradient(grad: Tensor, K: int) -> list[Buffer]:
    """What the kernels read of g [K]: see :func:`place_kernel`."""
    padded_K = padded_codes(K)
    made = scratch(grad.device, (padded_K, torch.float32), (1, torch.float32))
    launched(place_kernel)[(ceildiv(padded_K, PLACED),)](
        grad.contiguous(), *made, K, padded_K, BLOCK_K=PLACED
    )
    return made


def _row_splits(N: int, K: int, config: triton.Config, device: torch.device) -> tuple[int, int]:
    """How many parts the rows are cut into so that few codes still fill a GPU, and their size."""
    block_N, block_K = config.kwargs["BLOCK_N"], config.kwargs["BLOCK_K"]
    wanted = 2 * tuning.multiprocessors(device) // ceildiv(K, block_K)
    splits = max(1, min(MOST_SPLITS, wanted, ceildiv(N, 256)))
    # Whole tiles: a tile that overran its part would count the next one's rows again.
    share = ceildiv(ceildiv(N, splits), block_N) * block_N
    return ceildiv(N, share), share


class _Pass:
    """The operands that all passes over one part of the rows share, and how they are launched."""

    def __init__(
        self, rows: PreparedRows, codes: PreparedCodes, temperature: Tensor, lse: Tensor,
        K: int, D: int,
    ) -> None:  # fmt: skip
        self.operands = (
            rows.rows, rows.shrink, lse, codes.codes, codes.bias, codes.statistics, temperature,
        )  # fmt: skip
        self.N, self.K, self.D = rows.N, K, D
        self.width, self.device = rows.width, rows.device
        self.padded_K = padded_codes(K)
        self.chip = tuning.family(self.device)

    def _scratch(self, *counts: int) -> list[Buffer]:
        return scratch(self.device, *[(count, torch.float32) for count in counts])

    def _launch(self, kernel, space, run):
        return tuning.launch(kernel, space, (self.N, self.K, self.D), run, self.device)

    def columns(self) -> Tensor:
        """Σ_n p_nk, [K]."""
        total = torch.empty(self.K, dtype=torch.float32, device=self.device)

        def run(config: triton.Config) -> tuple[Buffer, int]:
            block = config.kwargs["BLOCK_K"]
            splits, share = _row_splits(self.N, self.K, config, self.device)
            partial = self._scratch(splits * self.K)[0] if splits > 1 else total
            launched(column_kernel)[(ceildiv(self.K, block), splits)](
                *self.operands, partial, self.N, self.K, share, **tuning.options(config)
            )
            return partial, splits

        space = tuning.column_space(self.chip, self.width)
        partial, splits = self._launch(column_kernel, space, run)
        if splits > 1:
            _add_parts(partial, total, splits, self.K)
        return total

    def _code_splits(self, config: triton.Config, most: int) -> tuple[int, int]:
        block_N, block_K = config.kwargs["BLOCK_N"], config.kwargs["BLOCK_K"]
        return tuning.code_splits(self.N, self.padded_K, block_N, block_K, most, self.device)

    def shift(self, grad: Buffer) -> tuple[Buffer, int]:
        """Σ_k p_nk g_k in parts [parts, N], and how many there are."""

        def run(config: triton.Config) -> tuple[Buffer, int]:
            splits, share = self._code_splits(config, MOST_SPLITS)
            partial = self._scratch(splits * self.N)[0]
            launched(shift_kernel)[(ceildiv(self.N, config.kwargs["BLOCK_N"]), splits)](
                *self.operands, grad, partial, self.N, self.padded_K, share,
                **tuning.options(config),
            )  # fmt: skip
            return partial, splits

        return self._launch(shift_kernel, tuning.shift_space(self.chip, self.width), run)

    def summed_shift(self, partial: Buffer, splits: int) -> Buffer:
        """Σ_k p_nk g_k, [N], of its parts."""
        if splits == 1:
            return partial
        total = self._scratch(self.N)[0]
        _add_parts(partial, total, splits, self.N)
        return total

    def row_gradient(
        self, grad: Buffer, largest: Buffer, shift: Buffer, shifts: int, found: Tensor
    ) -> None:
        """(2/τ) Σ_k w_nk c_k times ``largest`` [1], into ``found`` [N, D]."""

        def run(config: triton.Config) -> tuple[Buffer, int]:
            splits, share = self._code_splits(config, MOST_SPLITS // 2)
            # The kernel stores in any type what need not be added up.
            partial = self._scratch(splits * found.numel())[0] if splits > 1 else found
            launched(row_gradient_kernel)[(ceildiv(self.N, config.kwargs["BLOCK_N"]), splits)](
                *self.operands, grad, largest, shift, partial,
                self.N, self.D, self.padded_K, share, shifts,
                **tuning.options(config),
            )  # fmt: skip
            return partial, splits

        space = tuning.row_gradient_space(self.chip, self.width)
        partial, splits = self._launch(row_gradient_kernel, space, run)
        if splits > 1:
            _add_parts(partial, found, splits, found.numel())

    def code_gradient(self, grad: Buffer, shift: Buffer) -> tuple[Buffer, Buffer, int]:
        """Σ_n w_nk x̂_n/r_n [parts, K, D] and Σ_n w_nk [parts, K], and how many parts."""

        def run(config: triton.Config) -> tuple[Buffer, Buffer, int]:
            block = config.kwargs["BLOCK_K"]
            splits, share = _row_splits(self.N, self.K, config, self.device)
            partial, weight = self._scratch(splits * self.K * self.D, splits * self.K)
            launched(code_gradient_kernel)[(ceildiv(self.K, block), splits)](
                *self.operands, grad, shift, partial, weight, self.N, self.K, self.D, share,
                **tuning.options(config),
            )  # fmt: skip
            return partial, weight, splits

        return self._launch(
            code_gradient_kernel, tuning.code_gradient_space(self.chip, self.width), run
        )


def usage_forward(
    x: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    codes: PreparedCodes,
    search: bool = False,
    exact: bool = False,
) -> tuple[Tensor, Found]:
    """Summed soft assignments [K], and what the scan found, lse in units of log2."""
    x, D, K = x.contiguous(), x.shape[1], codebook.shape[0]
    mask = None if mask is None else mask.contiguous()
    totals: list[Tensor] = []

    def add(rows: PreparedRows, lse: Tensor) -> None:
        totals.append(_Pass(rows, codes, temperature, lse, K, D).columns())

    found = assign(
        x, codebook.contiguous(), codes, mask,
        exact=exact, search=search, temperature=temperature, each=add,
    )  # fmt: skip
    if not totals:
        totals.append(torch.zeros(K, dtype=torch.float32, device=x.device))
    return functools.reduce(torch.add, totals), found


def usage_backward(
    grad: Tensor,
    x: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    lse: Tensor,
    codes: PreparedCodes,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of Σ_k grad_k · usage_k for x and the codebook; empty where not ``wanted``."""
    x, (N, D), K = x.contiguous(), x.shape, codebook.shape[0]
    grad_x = torch.empty((N if wanted[0] else 0, D), dtype=x.dtype, device=x.device)
    pulled = torch.empty((K if wanted[1] else 0, D), dtype=codebook.dtype, device=x.device)
    pieces = list(parts(N, D))
    if not pieces:
        return grad_x, pulled.zero_()
    placed, largest = placed_gradient(grad, K)
    whole, heaps = len(pieces) == 1, len(pieces) if wanted[1] else 0
    sums = torch.empty(heaps, K, D, dtype=torch.float32, device=x.device) if heaps > 1 else None
    weights = torch.empty(heaps, K, dtype=torch.float32, device=x.device) if heaps > 1 else None
    for number, piece in enumerate(pieces):
        rows = prepare_rows(x if whole else x[piece], codes, None)
        passes = _Pass(rows, codes, temperature, lse if whole else lse[piece], K, D)
        shift, shifts = passes.shift(placed)
        if wanted[0]:
            found = grad_x if whole else grad_x[piece]
            passes.row_gradient(placed, largest, shift, shifts, found)
        if not wanted[1]:
            continue
        total = passes.summed_shift(shift, shifts)
        partial, weight, splits = passes.code_gradient(placed, total)
        if sums is not None and weights is not None:
            _add_parts(partial, sums[number], splits, K * D)
            _add_parts(weight, weights[number], splits, K)
            partial, weight, splits = sums, weights, heaps
    if wanted[1]:
        launched(pulled_kernel)[(ceildiv(K, 16), ceildiv(D, 64))](
            partial, weight, codebook.contiguous(), codes.mean, codes.bias, codes.statistics,
            largest, temperature, pulled, K, D, splits, BLOCK_K=16, BLOCK_D=64,
        )  # fmt: skip
    return grad_x, pulled
