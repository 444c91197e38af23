"""Which tile shapes are tried on which chip, and how a kernel is launched with the best of them.

Shared memory bounds the tiles: 101,376 bytes a block on sm_86, 166,912 on sm_80, 232,448 on sm_90.
``scripts/kernel_resources.py`` compiles every configuration here and reports what it takes.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton

SHARED_MEMORY_LIMIT = {80: 166_912, 86: 101_376, 90: 232_448}
WIDEST_WHOLE = 256
WIDEST_USAGE = 256
WIDEST_FUSED = 128
MOST_SLOTS = 32
REFINE_WARPS = 8

# Triton 3.4 (torch 2.8) keeps more alive at D = 256 than its registers hold: it gets smaller tiles.
SHORT_OF_REGISTERS = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 5)


def config(warps: int, stages: int, **blocks: int) -> triton.Config:
    """One configuration: tile shapes in upper case, warps, pipeline stages."""
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


def _tiles(padded_D: int, *shapes: tuple[int, int, int, int]) -> tuple[triton.Config, ...]:
    return tuple(
        config(warps, stages, BLOCK_N=n, BLOCK_K=k, BLOCK_D=padded_D)
        for n, k, warps, stages in shapes
    )


def nearest_space(architecture: int, padded_D: int) -> tuple[triton.Config, ...]:
    """Configurations of the search: (BLOCK_N, BLOCK_K, warps, stages) by chip and width."""
    if padded_D > WIDEST_WHOLE:
        return _tiles(64, (64, 128, 8, 3), (64, 64, 4, 3))
    if padded_D > 128:
        if architecture >= 90:
            return _tiles(padded_D, (128, 128, 8, 2), (64, 128, 4, 2))
        return _tiles(padded_D, (128, 64, 8, 2), (64, 64, 4, 2))
    if architecture >= 90:
        return _tiles(padded_D, (128, 128, 8, 3), (64, 128, 4, 3))
    return _tiles(padded_D, (128, 64, 8, 3), (64, 64, 4, 3))


def step(padded_D: int) -> int:
    """Columns at a time outside the main loop: few, so that nothing spills."""
    return min(32, padded_D)


def fused_space(architecture: int, padded_D: int) -> tuple[triton.Config, ...]:
    """Configurations of the fused residual encoder."""
    return _tiles(padded_D, (64, 64, 4 if padded_D > 64 else 8, 2))


def normalizer_space(architecture: int, padded_D: int) -> tuple[triton.Config, ...]:
    """Configurations of the pass that normalizes the soft assignment of rows kept on chip."""
    if padded_D > 128:
        return _tiles(padded_D, (64, 32, 8, 1))
    if padded_D > 64:
        return _tiles(padded_D, (128, 64, 8, 2))
    return _tiles(padded_D, (64, 64, 4, 2))


def row_gradient_space(architecture: int, padded_D: int) -> tuple[triton.Config, ...]:
    """Configurations of the rows' gradient, whose sums [BLOCK_N, D] live in registers."""
    if padded_D > 128:
        return _tiles(padded_D, (32 if SHORT_OF_REGISTERS else 64, 32, 8, 1))
    if architecture >= 90:
        return _tiles(padded_D, (64, 64, 4, 2))
    return _tiles(padded_D, (64, 64, 8, 2) if padded_D > 64 else (64, 32, 4, 2))


def column_space(architecture: int, padded_D: int) -> tuple[triton.Config, ...]:
    """Configurations of the pass that sums over rows: many codes share a row's rounding."""
    if padded_D > 128:
        return _tiles(padded_D, (32, 128, 8, 1))
    return _tiles(padded_D, (64, 128, 8, 1))


def code_gradient_space(architecture: int, padded_D: int) -> tuple[triton.Config, ...]:
    """Configurations of the codebook's gradient, whose sums [BLOCK_K, D] live in registers."""
    if padded_D > 128:
        return _tiles(padded_D, (32, 16 if SHORT_OF_REGISTERS else 32, 8, 1))
    return _tiles(padded_D, (32 if SHORT_OF_REGISTERS and padded_D > 64 else 64, 64, 8, 1))


def bucket(N: int) -> int:
    """Power of two at or above N, at least 1024: batches of like length share a tuning result."""
    return max(1024, triton.next_power_of_2(N))


def interpreted(kernel: Any) -> bool:
    """Whether TRITON_INTERPRET=1 was set when the kernel was defined."""
    return not isinstance(kernel, triton.JITFunction)


def architecture(device: torch.device) -> int:
    """80, 86 or 90: the newest chip in the table that is no newer than the device."""
    if device.type != "cuda":
        return 86
    major, minor = torch.cuda.get_device_capability(device)
    return max(known for known in SHARED_MEMORY_LIMIT if known <= major * 10 + minor)


@functools.cache
def _tuned(kernel: Any, space: tuple[triton.Config, ...], outputs: tuple[str, ...]) -> Any:
    key = [name for name in ("K", "D", "bucket") if name in kernel.arg_names]
    return triton.autotune(list(space), key=key, reset_to_zero=list(outputs))(kernel)


def launch(
    kernel: Any,
    space: tuple[triton.Config, ...],
    grid: Callable[[dict], tuple[int, ...]],
    arguments: tuple,
    constants: dict[str, Any],
    accumulated: tuple[str, ...] = (),
) -> None:
    """Run ``kernel`` with the fastest configuration of ``space`` for these sizes.

    The first call for a (K, D, dtype, bucket) times the space; ``accumulated`` names the arguments
    that a run adds to, which are set to zero between timings. Interpreted, the first one is taken.
    """
    if interpreted(kernel):
        kernel[grid](*arguments, **constants, **space[0].kwargs)
    else:
        tuned = _tuned(kernel, space, accumulated)
        tuned[grid](*arguments, **constants, enable_fp_fusion=True)


KERNELS = {
    "nearest_kernel": "nearest",
    "rvq_kernel": "rvq",
    "normalizer_kernel": "usage",
    "column_kernel": "usage",
    "row_gradient_kernel": "usage",
    "code_gradient_kernel": "usage",
}
PLAIN_KERNELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "mean_kernel": ("prepare", {"BLOCK_K": 128, "BLOCK_D": 32}, 4),
    "extent_kernel": ("prepare", {"BLOCK_K": 32, "BLOCK_D": 128}, 4),
    "round_kernel": ("prepare", {"BLOCK_K": 32, "BLOCK_D": 128}, 4),
    "refine_kernel": (
        "exact",
        {"SLOTS": MOST_SLOTS, "BLOCK_K": 32, "BLOCK_D": 128},
        REFINE_WARPS,
    ),
    "segment_kernel": ("sums", {"BLOCK_N": 32, "BLOCK_D": 128}, 4),
    "scatter_kernel": ("sums", {"BLOCK_N": 16, "BLOCK_D": 128}, 4),
}


def kernel(name: str) -> Any:
    """The jit function called ``name``."""
    module = KERNELS[name] if name in KERNELS else PLAIN_KERNELS[name][0]
    return getattr(importlib.import_module(f"b2t_kernels.{module}"), name)


def spaces(
    architecture: int, padded_D: int
) -> Iterator[tuple[str, tuple[triton.Config, ...], dict[str, dict[str, Any]]]]:
    """Every tensor-core kernel with its configurations and its variants' compile-time flags."""
    whole = padded_D <= WIDEST_WHOLE
    search = {
        "WHOLE": whole,
        "MASKED": True,
        "SLOTS": MOST_SLOTS,
        "COUNT": True,
        "STEP": step(padded_D),
    }
    yield (
        "nearest_kernel",
        nearest_space(architecture, padded_D),
        {"fast": {**search, "EXACT": False}, "exact": {**search, "EXACT": True}},
    )
    if padded_D <= WIDEST_FUSED:
        fused = {"STEP": step(padded_D), "MASKED": True, "Q": 8}
        yield "rvq_kernel", fused_space(architecture, padded_D), {"": fused}
    if padded_D <= WIDEST_USAGE:
        flags = {"STEP": step(padded_D)}
        normalizer = normalizer_space(architecture, padded_D)
        yield "normalizer_kernel", normalizer, {"": {**flags, "MASKED": True}}
        yield "column_kernel", column_space(architecture, padded_D), {"": {}}
        yield "row_gradient_kernel", row_gradient_space(architecture, padded_D), {"": flags}
        yield "code_gradient_kernel", code_gradient_space(architecture, padded_D), {"": {}}
