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
from b2t_kernels.launching import ceildiv, launched
from b2t_kernels.nearest import Found, assign
from b2t_kernels.prepare import (
    PreparedCodes,
    code_scale,
    padded_codes,
    physical_row,
    scale_of,
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
    largest_ptr, shift_ptr, partial_ptr, N, D, padded_K, share,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(2/τ) Σ_k w_nk c_k over the codes of one split, into partial [splits, N, D].

    With g as it was before it was divided by its largest element.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1).to(tl.int64)
    scale = code_scale(statistics_ptr)
    columns = tl.arange(0, BLOCK_D)
    tile, shrink, factor, lse = row_state(
        rows_ptr, shrink_ptr, lse_ptr, temperature_ptr, scale, rows, N, BLOCK_D
    )
    shift = tl.load(shift_ptr + rows, rows < N, other=0.0)
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


def placed_gradient(grad: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """What the kernels read of g [K]: see :func:`place_kernel`."""
    padded_K = padded_codes(K)
    placed = torch.empty(padded_K, dtype=torch.float32, device=grad.device)
    largest = torch.empty(1, dtype=torch.float32, device=grad.device)
    launched(place_kernel)[(ceildiv(padded_K, PLACED),)](
        grad.contiguous(), placed, largest, K, padded_K, BLOCK_K=PLACED
    )
    return placed, largest


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
        self.N, self.K, self.D = rows.rows.shape[0], K, D
        self.width, self.device = rows.rows.shape[1], rows.rows.device
        self.padded_K = padded_codes(K)
        self.chip = tuning.family(self.device)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=self.device)

    def _launch(self, kernel, space, run):
        return tuning.launch(kernel, space, (self.N, self.K, self.D), run, self.device)

    def columns(self) -> Tensor:
        """Σ_n p_nk, [K]."""

        def run(config: triton.Config) -> Tensor:
            block = config.kwargs["BLOCK_K"]
            splits, share = _row_splits(self.N, self.K, config, self.device)
            partial = self.empty(splits, self.K)
            launched(column_kernel)[(ceildiv(self.K, block), splits)](
                *self.operands, partial, self.N, self.K, share, **tuning.options(config)
            )
            return partial

        space = tuning.column_space(self.chip, self.width)
        return self._launch(column_kernel, space, run).sum(dim=0)

    def _code_splits(self, config: triton.Config, most: int) -> tuple[int, int]:
        block_N, block_K = config.kwargs["BLOCK_N"], config.kwargs["BLOCK_K"]
        return tuning.code_splits(self.N, self.padded_K, block_N, block_K, most, self.device)

    def shift(self, grad: Tensor) -> Tensor:
        """Σ_k p_nk g_k, [N]."""

        def run(config: triton.Config) -> Tensor:
            splits, share = self._code_splits(config, MOST_SPLITS)
            partial = self.empty(splits, self.N)
            launched(shift_kernel)[(ceildiv(self.N, config.kwargs["BLOCK_N"]), splits)](
                *self.operands, grad, partial, self.N, self.padded_K, share,
                **tuning.options(config),
            )  # fmt: skip
            return partial

        space = tuning.shift_space(self.chip, self.width)
        partial = self._launch(shift_kernel, space, run)
        return partial[0] if partial.shape[0] == 1 else partial.sum(dim=0)

    def row_gradient(self, grad: Tensor, largest: Tensor, shift: Tensor) -> Tensor:
        """(2/τ) Σ_k w_nk c_k times ``largest`` [1], [N, D]."""

        def run(config: triton.Config) -> Tensor:
            splits, share = self._code_splits(config, MOST_SPLITS // 2)
            partial = self.empty(splits, self.N, self.D)
            launched(row_gradient_kernel)[(ceildiv(self.N, config.kwargs["BLOCK_N"]), splits)](
                *self.operands, grad, largest, shift, partial,
                self.N, self.D, self.padded_K, share,
                **tuning.options(config),
            )  # fmt: skip
            return partial

        space = tuning.row_gradient_space(self.chip, self.width)
        partial = self._launch(row_gradient_kernel, space, run)
        return partial[0] if partial.shape[0] == 1 else partial.sum(dim=0)

    def code_gradient(self, grad: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Σ_n w_nk x̂_n/r_n [K, D] and Σ_n w_nk [K]."""

        def run(config: triton.Config) -> tuple[Tensor, Tensor]:
            block = config.kwargs["BLOCK_K"]
            splits, share = _row_splits(self.N, self.K, config, self.device)
            partial, weight = self.empty(splits, self.K, self.D), self.empty(splits, self.K)
            launched(code_gradient_kernel)[(ceildiv(self.K, block), splits)](
                *self.operands, grad, shift, partial, weight, self.N, self.K, self.D, share,
                **tuning.options(config),
            )  # fmt: skip
            return partial, weight

        space = tuning.code_gradient_space(self.chip, self.width)
        partial, weight = self._launch(code_gradient_kernel, space, run)
        return partial.sum(dim=0), weight.sum(dim=0)


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
    placed, largest = placed_gradient(grad, K)
    pieces = list(parts(N, D)) if N else []
    whole = len(pieces) == 1
    grad_x = x.new_empty(x.shape if wanted[0] and not whole else (0,))
    pulled = torch.zeros((K, D) if wanted[1] else (0,), dtype=torch.float32, device=x.device)
    weight = torch.zeros(K if wanted[1] else 0, dtype=torch.float32, device=x.device)
    for piece in pieces:
        rows = prepare_rows(x[piece], codes, None)
        passes = _Pass(rows, codes, temperature, lse[piece], K, D)
        shift = passes.shift(placed)
        if wanted[0] and whole:
            grad_x = passes.row_gradient(placed, largest, shift).to(x.dtype)
        elif wanted[0]:
            grad_x[piece] = passes.row_gradient(placed, largest, shift)
        if wanted[1]:
            more, heavier = passes.code_gradient(placed, shift)
            pulled += more
            weight += heavier
    if not wanted[1]:
        return grad_x, pulled.to(codebook.dtype)
    centred = codebook.float() - codes.mean[0, :D]
    pulled = pulled / scale_of(codes) - weight[:, None] * centred
    pulled = torch.where(codebook.isfinite().all(dim=1, keepdim=True), pulled, 0)
    return grad_x, (pulled * (2 * largest / temperature)).to(codebook.dtype)
