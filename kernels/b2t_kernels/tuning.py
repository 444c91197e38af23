"""Which tile shapes run on which chip, and how a kernel is launched with the one chosen.

A table gives each chip and width an order of preference; its first entry that fits the device runs,
without timing anything, so that the first call is like any other and a CUDA graph can be captured.
``measuring`` times all entries instead and keeps the fastest for the rest of the process.

Shared memory bounds the tiles: 101,376 bytes a block on sm_86, 166,912 on sm_80, 232,448 on sm_90.
``scripts/kernel_resources.py`` compiles every configuration here and reports what it takes.
"""

import contextlib
import functools
import importlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources

from b2t_kernels.launching import ceildiv, power_of_two_above

SHARED_MEMORY_LIMIT = {80: 166_912, 86: 101_376, 90: 232_448}
WIDEST_WHOLE = 256
WIDEST_USAGE = 256
MOST_PARTS = 128

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
# Triton 3.4 (torch 2.8) keeps more alive at D = 256 than its registers hold: it gets smaller tiles.
SHORT_OF_REGISTERS = TRITON < (3, 5)
# No other pair spills nowhere: the compilers give one program different shares of the registers.
REFINE_WIDTH, REFINE_WARPS = (128, 8) if TRITON < (3, 8) else (64, 2)
BEAM_WIDTH, BEAM_WARPS = (64 if SHORT_OF_REGISTERS else 32), 8
# What 3.8 makes of a beam's kernels spills with the registers that the assembler takes by itself.
BEAM_REGISTERS = 168 if TRITON == (3, 8) else None

# Few rows split the codes anyway: small tiles leave more blocks.
FEW_ROWS = 4096
# A sum over lanes is the same in all of them only if no lane fuses its own last product into an
# addition: kernels that compare sums from different lanes are compiled so.
UNFUSED = {"enable_fp_fusion": False}
UNFUSED_KERNELS = ("candidates_kernel", "winners_kernel", "settle_kernel", "refine_kernel")

Space = tuple[triton.Config, ...]


class DoesNotFitError(RuntimeError):
    """No configuration of a kernel fits the device."""


def config(warps: int, stages: int, **blocks: int) -> triton.Config:
    """One configuration: tile shapes in upper case, warps, pipeline stages."""
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


def options(chosen: triton.Config) -> dict[str, Any]:
    """A configuration as the arguments of a launch."""
    limit = {} if chosen.maxnreg is None else {"maxnreg": chosen.maxnreg}
    launch = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    return {**chosen.kwargs, **launch, **limit}


def _tiles(padded_D: int, *shapes: tuple[int, int, int, int]) -> Space:
    return tuple(
        config(warps, stages, BLOCK_N=n, BLOCK_K=k, BLOCK_D=padded_D)
        for n, k, warps, stages in shapes
    )


@functools.cache
def scan_space(family: int, padded_D: int, draw: bool = False, few: bool = False) -> Space:
    """Configurations of the scan: (BLOCK_N, BLOCK_K, warps, stages), the preferred one first.

    To ``draw`` takes more registers, of which the largest tile of wide rows leaves too few. ``few``
    rows on sm_90 have shapes of their own, as measured on an H100.
    """
    if family == 90 and not draw and padded_D in (64, 256):
        return _tiles(padded_D, *{
            (64, False): ((128, 64, 4, 3), (64, 128, 4, 3)),
            (64, True): ((64, 64, 4, 2),),
            (256, False): ((256, 64, 8, 3), (128, 64, 8, 3)),
            (256, True): ((128, 64, 4, 3),),
        }[padded_D, few])  # fmt: skip
    if padded_D > WIDEST_WHOLE and family == 90 and draw:
        return _tiles(64, (64, 64 if SHORT_OF_REGISTERS else 128, 4, 3))
    if padded_D > WIDEST_WHOLE:
        return _tiles(64, *{
            80: ((64, 64, 4, 4),),
            86: ((64, 128, 8, 3), (64, 64, 4, 3)),
            90: ((128, 128, 8, 4), (64, 128, 4, 3)),
        }[family])  # fmt: skip
    if padded_D > 128:
        return _tiles(padded_D, *{
            80: ((128, 64, 8, 3), (64, 64, 4, 3)),
            86: ((64, 64, 4, 3), (128, 64, 8, 2)),
            90: ((128, 128, 8, 2), (128, 64, 8, 4), (128, 64, 8, 3)),
        }[family])  # fmt: skip
    return _tiles(padded_D, *{
        80: ((128, 64, 8, 4), (64, 64, 4, 4)),
        86: ((128, 64, 8, 3), (64, 64, 4, 3)),
        90: ((128, 128, 8, 3), (64, 128, 4, 3)),
    }[family])  # fmt: skip


@functools.cache
def settle_config(W: int) -> triton.Config:
    """Configuration of the merge of ``W`` partial results a row."""
    return config(4, 1, BLOCK_N=32 if W <= 32 else 16, STEP=16)


@functools.cache
def beam_config() -> triton.Config:
    """Configuration of the kernels that continue a beam, one frame each."""
    return triton.Config(
        {"BLOCK_D": BEAM_WIDTH}, num_warps=BEAM_WARPS, num_stages=1, maxnreg=BEAM_REGISTERS
    )


@functools.cache
def column_space(family: int, padded_D: int) -> Space:
    """Configurations of the pass that sums assignments over rows, codes on chip."""
    if padded_D > 128:
        return _tiles(padded_D, (64, 64, 8, 2))
    if family == 90 and padded_D == 64:
        return _tiles(padded_D, (128, 32, 4, 3))
    return _tiles(padded_D, (64, 128, 8, 2))


@functools.cache
def shift_space(family: int, padded_D: int) -> Space:
    """Configurations of the pass that averages the codes' gradient over each row's assignment."""
    if family == 90 and padded_D in (64, 256):
        return _tiles(padded_D, (64, 64, 8, 3) if padded_D == 64 else (128, 32, 8, 3))
    # Triton 3.5 spills with four warps here, and here alone.
    warps = 8 if TRITON == (3, 5) and family == 86 and padded_D > 128 else 4
    return _tiles(padded_D, (64, 64, warps, 2))


@functools.cache
def row_gradient_space(family: int, padded_D: int) -> Space:
    """Configurations of the rows' gradient, whose sums [BLOCK_N, D] live in registers."""
    if family == 90 and padded_D > 128 and not SHORT_OF_REGISTERS:
        return _tiles(padded_D, (128, 64, 8, 3))
    if padded_D > 128:
        return _tiles(padded_D, (32 if SHORT_OF_REGISTERS else 64, 32, 8, 2))
    return _tiles(padded_D, (64, 64, 8, 2) if padded_D > 64 else (64, 64, 4, 2))


@functools.cache
def code_gradient_space(family: int, padded_D: int) -> Space:
    """Configurations of the codebook's gradient, whose sums [BLOCK_K, D] live in registers."""
    if padded_D > 128:
        return _tiles(padded_D, (32, 16 if SHORT_OF_REGISTERS else 32, 8, 2))
    return _tiles(padded_D, (32 if SHORT_OF_REGISTERS and padded_D > 64 else 64, 64, 8, 2))


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block may have."""
    if device.type != "cuda":
        return SHARED_MEMORY_LIMIT[86]
    properties = torch.cuda.get_device_properties(device)
    return int(
        getattr(properties, "shared_memory_per_block_optin", 0)
        or getattr(properties, "shared_memory_per_block", 48 << 10)
    )


def family(device: torch.device) -> int:
    """80, 86 or 90: the chip of the tables whose shared memory the device has at least."""
    return _family_of(shared_memory(device))


@functools.cache
def _family_of(limit: int) -> int:
    fitting = [chip for chip, bytes_ in SHARED_MEMORY_LIMIT.items() if bytes_ <= limit]
    return max(fitting, key=SHARED_MEMORY_LIMIT.__getitem__, default=86)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many blocks run at a time at least; a few where there is no GPU."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def code_splits(
    N: int,
    padded_K: int,
    block_N: int,
    block_K: int,
    most: int,
    device: torch.device,
    least: int = 1,
) -> tuple[int, int]:
    """How many parts the codes are cut into, and their size.

    Few rows are cut so that the device is full, all into ``least`` parts where the codes suffice,
    none into more than ``most``.
    """
    tiles = padded_K // block_K
    wanted = multiprocessors(device) // ceildiv(N, block_N)
    splits = max(1, min(max(min(wanted, tiles // 4), min(least, tiles)), max(1, most)))
    share = ceildiv(tiles, splits) * block_K
    return ceildiv(padded_K, share), share


def bucket(N: int) -> int:
    """Power of two at or above N, at least 1024: batches of like length share a measurement."""
    return max(1024, power_of_two_above(N))


_chosen: dict[tuple, triton.Config] = {}
_unfit: dict[tuple, str] = {}
_measures = False


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """Time every configuration of what is launched in this block, and keep the fastest."""
    global _measures
    before, _measures = _measures, True
    try:
        yield
    finally:
        _measures = before


def _milliseconds(run: Callable[[triton.Config], Any], candidate: triton.Config) -> float:
    run(candidate)
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(candidate)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def launch(
    kernel: Any,
    space: Space,
    sizes: tuple,
    run: Callable[[triton.Config], Any],
    device: torch.device,
) -> Any:
    """What ``run`` returns for the configuration chosen for a kernel.

    Args:
        kernel: names the entry.
        space: its configurations, the preferred one first.
        sizes: N, then everything else that tells one case from another: compile-time flags too.
        run: launches with a configuration; while measuring it runs more than once, so that it
            must not add to what it finds.
        device: where.

    Raises:
        DoesNotFitError: every configuration takes more of the device than there is.
    """
    name = kernel.__name__
    if not (_measures or _chosen or _unfit):
        # Nearly every launch: nothing was measured, and everything fits.
        try:
            return run(space[0])
        except OutOfResources as error:
            _unfit[name, str(device), str(space[0])] = str(error)
    key = (name, str(device), bucket(sizes[0]), *sizes[1:])
    fitting = [each for each in space if (name, str(device), str(each)) not in _unfit]
    if _measures and device.type == "cuda" and key not in _chosen and len(fitting) > 1:
        times = {}
        for each in fitting:
            with contextlib.suppress(OutOfResources):
                times[each] = _milliseconds(run, each)
        if times:
            _chosen[key] = min(times, key=times.__getitem__)
    chosen = _chosen.get(key)
    for each in ([chosen] if chosen else []) + fitting:
        try:
            return run(each)
        except OutOfResources as error:
            _unfit[name, str(device), str(each)] = str(error)
    raise DoesNotFitError(
        f"no tile of {name} fits the device, which has {shared_memory(device):,} bytes of shared "
        f"memory a block ({_unfit[name, str(device), str(space[-1])]})"
    )


KERNELS = {
    "scan_kernel": "scan",
    "column_kernel": "usage",
    "shift_kernel": "usage",
    "row_gradient_kernel": "usage",
    "code_gradient_kernel": "usage",
}
# Blocks, compile-time flags and warps of kernels that have one configuration.
PLAIN_KERNELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "mean_kernel": ("prepare", {"BLOCK_K": 128, "BLOCK_D": 32}, 4),
    "extent_kernel": ("prepare", {"BLOCK_K": 32, "BLOCK_D": 128}, 4),
    "round_kernel": ("prepare", {"BLOCK_K": 32, "BLOCK_D": 128}, 4),
    "rows_kernel": (
        "rows",
        {"BLOCK_N": 4, "BLOCK_D": 1024, "MASKED": True, "CLEARS": True},
        4,
    ),
    "settle_kernel": (
        "nearest",
        {"BLOCK_N": 16, "STEP": 16, "W": MOST_PARTS, "SEARCH": True, "EXACT": True, "SOFT": True},
        4,
    ),
    "refine_kernel": (
        "exact",
        {"W": MOST_PARTS, "SLOTS": 16, "BLOCK_D": REFINE_WIDTH},
        REFINE_WARPS,
    ),
    "drawn_kernel": ("draw", {"BLOCK_N": 16, "STEP": 16, "W": MOST_PARTS}, 4),
    "candidates_kernel": (
        "beam",
        {"B": 16, "W": 16, "SLOTS": 16, "KEPT": 32, "BLOCK_D": BEAM_WIDTH},
        BEAM_WARPS,
    ),
    "winners_kernel": ("beam", {"KEPT": 32, "BLOCK_D": BEAM_WIDTH}, BEAM_WARPS),
    "segment_kernel": ("sums", {"BLOCK_N": 32, "BLOCK_D": 128, "CHUNK": 512}, 4),
    "gather_kernel": ("sums", {"BLOCK_N": 32, "BLOCK_D": 128}, 4),
    "scatter_kernel": ("sums", {"BLOCK_N": 16, "BLOCK_D": 128}, 4),
    "gathered_kernel": ("sums", {"BLOCK_N": 128, "STEP": 16, "BLOCK_K": 8, "BLOCK_D": 64}, 4),
    "place_kernel": ("usage", {"BLOCK_K": 1024}, 4),
    "parts_kernel": ("usage", {"PARTS": 16, "BLOCK": 256}, 4),
    "pulled_kernel": ("usage", {"BLOCK_K": 16, "BLOCK_D": 64}, 4),
    "leave_kernel": (
        "residual",
        {"BLOCK_N": 16, "BLOCK_D": 128, "ERRORS": True, "GAIN": True},
        4,
    ),
    "total_kernel": ("residual", {"BLOCK_N": 16, "BLOCK_D": 128, "GAIN": True}, 4),
}


def plain_variants(name: str) -> Iterator[dict[str, Any]]:
    """Blocks and flags of a kernel of `PLAIN_KERNELS`, for each way in which it is launched."""
    blocks = PLAIN_KERNELS[name][1]
    yield blocks
    if name == "candidates_kernel":
        yield {**blocks, "B": 1, "W": MOST_PARTS, "SLOTS": 8}
        yield {**blocks, "B": 8, "W": 32, "SLOTS": 8, "KEPT": 16}


def limits(name: str) -> dict[str, Any]:
    """Options beside warps and stages with which a kernel is launched."""
    beams = name in ("candidates_kernel", "winners_kernel")
    registers = {"maxnreg": BEAM_REGISTERS} if beams and BEAM_REGISTERS else {}
    return {**registers, **(UNFUSED if name in UNFUSED_KERNELS else {})}


def kernel(name: str) -> Any:
    """The jit function called ``name``."""
    module = KERNELS[name] if name in KERNELS else PLAIN_KERNELS[name][0]
    return getattr(importlib.import_module(f"b2t_kernels.{module}"), name)


def spaces(family: int, padded_D: int) -> Iterator[tuple[str, Space, dict[str, dict[str, Any]]]]:
    """Every tensor-core kernel with its configurations and its variants' compile-time flags."""
    variants = {
        "fast": {"EXACT": False, "SOFT": False, "DRAW": False},
        "exact": {"EXACT": True, "SOFT": False, "DRAW": False},
        "exact, soft": {"EXACT": True, "SOFT": True, "DRAW": False},
        "draw": {"EXACT": False, "SOFT": False, "DRAW": True},
    }
    if padded_D > WIDEST_USAGE:
        del variants["exact, soft"]
    whole = {"WHOLE": padded_D <= WIDEST_WHOLE}
    flags = {name: {**whole, **chosen} for name, chosen in variants.items()}
    draw = {"draw": flags.pop("draw")}
    yield "scan_kernel", scan_space(family, padded_D), flags
    if scan_space(family, padded_D, few=True) != scan_space(family, padded_D):
        yield "scan_kernel", scan_space(family, padded_D, few=True), flags
    yield "scan_kernel", scan_space(family, padded_D, draw=True), draw
    if padded_D <= WIDEST_USAGE:
        yield "column_kernel", column_space(family, padded_D), {"": {}}
        yield "shift_kernel", shift_space(family, padded_D), {"": {}}
        yield "row_gradient_kernel", row_gradient_space(family, padded_D), {"": {}}
        yield "code_gradient_kernel", code_gradient_space(family, padded_D), {"": {}}
