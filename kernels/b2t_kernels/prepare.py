"""A codebook made ready for fp16 tensor cores: centred, scaled, rounded, padded, permuted.

Letters: K codes, D width; K′ and D′ are K and D padded. With μ near the middle of the codes and S a
power of two, the kernels multiply ĉ_k = fp16(S·(c_k − μ)) by x̂_n = fp16(r_n·S·(x_n − μ)), r_n ≤ 1 a
power of two that keeps an outlying row inside fp16. fp16 has the ten mantissa bits of TF32 at twice
its rate, and the scales remove its one disadvantage, range; so it serves every input dtype.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from b2t_kernels.launching import ceildiv, launched, power_of_two_above

CODE_PADDING = 256
GROUP = tl.constexpr(8)
MEAN_SAMPLE = 1024
LARGEST = tl.constexpr(0)
RADIUS = tl.constexpr(1)
ERRORS = tl.constexpr(2)

# Rounding errors are kept by length of the code, in quarters of an octave from 2⁻³ to 2¹³.
LENGTH_BINS = tl.constexpr(64)
SHORTEST = tl.constexpr((127 - 3) << 2)
STATISTICS = tl.constexpr(2 + 64)

# log2 of the bound on |ĉ| elements and on |x̂| elements: products stay far from overflow in the
# float32 accumulator, and both keep 20 binary orders above fp16's subnormals.
CODE_EXPONENT = tl.constexpr(8)
ROW_EXPONENT = tl.constexpr(14)


class PreparedCodes(NamedTuple):
    """What the kernels read instead of the codebook.

    codes: [Q·K′, D′] fp16, rows permuted inside each 64 (see :func:`physical_row`).
    bias: [Q·K′] float32, −½|ĉ|² of the rounded codes; −inf for padding and codes not finite.
    mean: [Q, D′] float32, μ.
    statistics: [Q, 66] float32: largest |c − μ| element, largest |ĉ|, and for each length of 64 the
        largest |ĉ − S(c − μ)| among codes whose |ĉ| is no longer (:func:`length_bin`).
    """

    codes: Tensor
    bias: Tensor
    mean: Tensor
    statistics: Tensor


@triton.jit
def physical_row(code):
    """Where code number ``code`` lies: a bijection of each 64 that fits the tensor core's layout.

    In an accumulator tile, bits 1 and 2 of the column choose the lane, bit 3 perhaps the warp;
    bits 0, 4 and 5 stay inside a thread. So eight consecutive codes are spread over those bits:
    the maximum of such a run needs no exchange between threads, and runs keep their order.
    """
    run = (code % 64) // 8
    within = code % 8
    low = (run % 4) * 2 + (run // 4) * 8
    return code - code % 64 + low + within % 2 + (within // 2) * 16


@triton.jit
def logical_row(place):
    """The code that lies at ``place``: the inverse of :func:`physical_row`."""
    run = (place // 2) % 4 + (place // 8) % 2 * 4
    within = place % 2 + (place // 16) % 4 * 2
    return place - place % 64 + run * 8 + within


@triton.jit
def power_of_two(exponent):
    """2^exponent as float32, for exponents −126..127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_of(value):
    """Floor(log2(value)) of a non-negative normal float32; −127 for zero."""
    return (value.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def code_scale(statistics_ptr):
    """The power of two S that brings the largest |c − μ| into [2⁷, 2⁸); 1 if all codes are μ."""
    largest = tl.load(statistics_ptr + LARGEST)
    exponent = -exponent_of(largest) + (CODE_EXPONENT - 1)
    exponent = tl.minimum(tl.maximum(exponent, -126), 100)
    return tl.where(largest > 0, power_of_two(exponent), 1.0)


@triton.jit
def length_bin(length):
    """Place of a non-negative length among the bins; never falls as the length grows."""
    place = (length.to(tl.int32, bitcast=True) >> 21) - SHORTEST
    return tl.minimum(tl.maximum(place, 0), LENGTH_BINS - 1)


@triton.jit
def mean_kernel(
    codebook_ptr, mean_ptr, bits_ptr, K, D, padded_D, step,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mean of every step-th code, over elements that are finite; zero the statistics."""
    layer = tl.program_id(1).to(tl.int64)
    if tl.program_id(0) == 0:
        places = tl.arange(0, 2 * LENGTH_BINS)
        zeros = tl.zeros([2 * LENGTH_BINS], tl.int32)
        tl.store(bits_ptr + layer * STATISTICS + places, zeros, places < STATISTICS)
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    seen = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, K, BLOCK_K * step):
        codes = start + tl.arange(0, BLOCK_K).to(tl.int64) * step
        inside = (codes < K)[:, None] & (columns < D)[None, :]
        address = (layer * K + codes)[:, None] * D + columns[None, :]
        values = tl.load(codebook_ptr + address, inside, other=float("inf")).to(tl.float32)
        finite = tl.abs(values) < 1e37
        total += tl.sum(tl.where(finite, values, 0.0), axis=0)
        seen += tl.sum(finite.to(tl.float32), axis=0)
    mean = total / tl.maximum(seen, 1.0)
    tl.store(mean_ptr + layer * padded_D + columns, mean, columns < padded_D)


@triton.jit
def extent_kernel(
    codebook_ptr,
    mean_ptr,
    statistics_ptr,
    K,
    D,
    padded_D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Largest |c − μ| over finite codes; the bits of non-negative floats sort like integers."""
    layer = tl.program_id(1).to(tl.int64)
    codes = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    largest = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = (codes < K)[:, None] & (columns < D)[None, :]
        mean = tl.load(mean_ptr + layer * padded_D + columns, columns < D, other=0.0)
        address = (layer * K + codes)[:, None] * D + columns[None, :]
        values = tl.load(codebook_ptr + address, inside, other=0.0).to(tl.float32)
        distance = tl.where(inside, tl.abs(values - mean[None, :]), 0.0)
        # NaN would vanish in a maximum: make it infinite first.
        distance = tl.where(distance < float("inf"), distance, float("inf"))
        largest = tl.maximum(largest, tl.max(distance, axis=1))
    largest = tl.where(largest < float("inf"), largest, 0.0)
    bits = tl.max(largest, axis=0).to(tl.int32, bitcast=True)
    tl.atomic_max(statistics_ptr + layer * STATISTICS + LARGEST, bits)


@triton.jit
def round_kernel(
    codebook_ptr,
    mean_ptr,
    statistics_ptr,
    bits_ptr,
    codes_ptr,
    bias_ptr,
    K,
    D,
    padded_K,
    padded_D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write ĉ and −½|ĉ|², the largest |ĉ|, and the largest rounding error by length."""
    layer = tl.program_id(1).to(tl.int64)
    codes = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    scale = code_scale(statistics_ptr + layer * STATISTICS)
    places = layer * padded_K + physical_row(codes)
    finite = codes < K
    norm = tl.zeros([BLOCK_K], tl.float32)
    error = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, padded_D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        inside = (codes < K)[:, None] & (columns < D)[None, :]
        mean = tl.load(mean_ptr + layer * padded_D + columns, columns < D, other=0.0)
        address = (layer * K + codes)[:, None] * D + columns[None, :]
        values = tl.load(codebook_ptr + address, inside, other=0.0).to(tl.float32)
        moved = (values - mean[None, :]) * scale
        usable = tl.abs(moved) <= 256.0
        finite = finite & (tl.min((usable | ~inside).to(tl.int32), axis=1) > 0)
        moved = tl.where(inside & usable, moved, 0.0)
        rounded = moved.to(tl.float16)
        wide = rounded.to(tl.float32)
        norm += tl.sum(wide * wide, axis=1)
        error += tl.sum((wide - moved) * (wide - moved), axis=1)
        tl.store(
            codes_ptr + places[:, None] * padded_D + columns[None, :],
            rounded,
            (codes < padded_K)[:, None] & (columns < padded_D)[None, :],
        )
    bias = tl.where(finite, -0.5 * norm, -float("inf"))
    tl.store(bias_ptr + places, bias, codes < padded_K)
    length = tl.sqrt(tl.where(finite, norm, 0.0))
    error = tl.sqrt(tl.where(finite, error, 0.0))
    bits = bits_ptr + layer * STATISTICS
    tl.atomic_max(bits + RADIUS, tl.max(length, axis=0).to(tl.int32, bitcast=True))
    lengths = tl.arange(0, LENGTH_BINS)
    shorter = length_bin(length)[:, None] <= lengths[None, :]
    errors = tl.max(tl.where(shorter, error[:, None], 0.0), axis=0).to(tl.int32, bitcast=True)
    known = tl.load(bits + ERRORS + lengths)
    tl.atomic_max(bits + ERRORS + lengths, errors, mask=errors > known)


def layers_of(prepared: PreparedCodes) -> list[PreparedCodes]:
    """The part of each layer of a stack, without a copy."""
    Q = prepared.mean.shape[0]
    size = prepared.bias.shape[0] // Q
    parts = (part.split(1 if part.shape[0] == Q else size) for part in prepared)
    return [PreparedCodes(*each) for each in zip(*parts, strict=True)]


def scale_of(prepared: PreparedCodes) -> Tensor:
    """S of a single layer as :func:`code_scale` computes it, 0-d."""
    largest = prepared.statistics[0, 0]
    _, exponent = torch.frexp(largest)
    power = (8 - exponent).clamp(-126, 100)
    return torch.where(largest > 0, torch.exp2(power.float()), 1.0)


def physical_place(K: int, device: torch.device) -> Tensor:
    """Where each code lies among the prepared ones, [K]: :func:`physical_row` in torch."""
    code = torch.arange(K, device=device)
    run, within = (code % 64) // 8, code % 8
    return code - code % 64 + (run % 4) * 2 + (run // 4) * 8 + within % 2 + (within // 2) * 16


def padded_width(D: int) -> int:
    """D′: 64 at least, a power of two up to 512, whole 128s above."""
    if D <= 512:
        return max(64, power_of_two_above(D))
    return ceildiv(D, 128) * 128


def padded_codes(K: int) -> int:
    """K′: whole tiles for every configuration."""
    return ceildiv(K, CODE_PADDING) * CODE_PADDING


def prepare(codebooks: Tensor) -> PreparedCodes:
    """Prepare codebooks [Q, K, D] (or [K, D]) in three launches, without a synchronisation."""
    codebooks = codebooks.reshape(-1, *codebooks.shape[-2:]).contiguous()
    Q, K, D = codebooks.shape
    padded_K, padded_D = padded_codes(K), padded_width(D)
    device = codebooks.device
    codes = torch.empty(Q * padded_K, padded_D, dtype=torch.float16, device=device)
    bias = torch.empty(Q * padded_K, dtype=torch.float32, device=device)
    mean = torch.empty(Q, padded_D, dtype=torch.float32, device=device)
    statistics = torch.empty(Q, STATISTICS.value, dtype=torch.float32, device=device)
    bits = statistics.view(torch.int32)
    block_D = min(128, padded_D)
    step = max(1, K // MEAN_SAMPLE)
    launched(mean_kernel)[(ceildiv(padded_D, 32), Q)](
        codebooks, mean, bits, K, D, padded_D, step, BLOCK_K=128, BLOCK_D=32
    )
    grid = (ceildiv(padded_K, 32), Q)
    launched(extent_kernel)[grid](
        codebooks, mean, bits, K, D, padded_D, BLOCK_K=32, BLOCK_D=block_D
    )
    launched(round_kernel)[grid](
        codebooks,
        mean,
        statistics,
        bits,
        codes,
        bias,
        K,
        D,
        padded_K,
        padded_D,
        BLOCK_K=32,
        BLOCK_D=block_D,
    )
    return PreparedCodes(codes, bias, mean, statistics)
