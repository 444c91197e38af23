"""The Gumbel noise of ``gumbel`` inside a kernel, less a constant and in units of log2."""

import triton
import triton.language as tl

from b2t_kernels.gumbel import UNIFORM_BITS

UNUSED_BITS = tl.constexpr(64 - UNIFORM_BITS)
LARGEST = tl.constexpr((1 << UNIFORM_BITS) - 1)
UNIT = tl.constexpr(2.0**-UNIFORM_BITS)
LOG2_E = tl.constexpr(1.4426950408889634)
SMALL = tl.constexpr(0.03125)


@triton.jit
def mixed(x):
    """Finalizer of SplitMix64 on uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


INTERPRETED = tl.constexpr(not isinstance(mixed, triton.JITFunction))


@triton.jit
def log2(x):
    """The hardware's logarithm, to 2⁻²² absolutely: the library's takes twenty instructions."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def noise(row_keys, code_keys):
    """Gumbel noise · log2(e) + log2(ln 2) of uint64 keys: −log2(−log2(u)), u uniform.

    v = 1 − u is what the bits give, so that a u close to 1, the noise of most winners, keeps its
    precision: −ln(1 − v) is summed as a series where v is small.
    """
    bits = LARGEST - (mixed(row_keys ^ code_keys) >> UNUSED_BITS).to(tl.int32)
    v = (bits.to(tl.float32) + 0.5) * UNIT
    series = v * (LOG2_E + v * (LOG2_E / 2 + v * (LOG2_E / 3 + v * (LOG2_E / 4))))
    waited = tl.where(v < SMALL, series, -log2(1.0 - v))
    return -log2(waited)
