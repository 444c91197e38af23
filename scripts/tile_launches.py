"""Launches of the kernels noted, changed, compiled by other processes, and timed in CUDA graphs.

For scripts/tune_kernels.py. A `Spy` takes a kernel's place in the modules that launch it: it can
note what would be launched without launching it, and change the options of a launch.
"""

import contextlib
import importlib
import json
import math
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

from b2t_kernels import launching, tuning

INTERPRETED = not isinstance(tuning.kernel("scan_kernel"), triton.JITFunction)
MODULES = ("nearest", "draw", "beam", "usage", "sums", "residual", "rows", "prepare")
# Axis of the grid along which a block lies, for kernels whose launch does not ask for the block.
AXES = {
    "mean_kernel": {"BLOCK_D": 0},
    "extent_kernel": {"BLOCK_K": 0},
    "round_kernel": {"BLOCK_K": 0},
    "rows_kernel": {"BLOCK_N": 0},
    "settle_kernel": {"BLOCK_N": 0},
    "drawn_kernel": {"BLOCK_N": 0},
    "segment_kernel": {"BLOCK_D": 1},
    "gathered_kernel": {"BLOCK_K": 0, "BLOCK_D": 1},
    "place_kernel": {"BLOCK_K": 0},
    "parts_kernel": {"BLOCK": 0},
    "pulled_kernel": {"BLOCK_K": 0, "BLOCK_D": 1},
    "gather_kernel": {"BLOCK_D": 1},
    "scatter_kernel": {"BLOCK_N": 0, "BLOCK_D": 1},
    "total_kernel": {"BLOCK_N": 0, "BLOCK_D": 1},
}
# Counters that a launch adds to, and that must not grow from one timed launch to the next.
COUNTERS = ("length_ptr", "frames_ptr")


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple
    options: dict[str, Any]

    def __call__(self) -> Any:
        """Launch it again, its counters at zero."""
        for name in COUNTERS:
            if name in self.kernel.arg_names:
                self.arguments[self.kernel.arg_names.index(name)].zero_()
        return self.kernel[self.grid](*self.arguments, **self.options)


@dataclass
class Bench:
    """What is forced on which kernel, and what was launched."""

    forced: dict[str, dict[str, Any]] = field(default_factory=dict)
    launches: list[Launch] = field(default_factory=list)
    compiled: dict[str, Any] = field(default_factory=dict)
    notes: bool = False

    @contextlib.contextmanager
    def force(self, kernel: str = "", options: dict[str, Any] | None = None) -> Iterator[None]:
        """Launch ``kernel`` with these blocks, warps and stages inside the block."""
        self.forced = {kernel: options} if options else {}
        self.launches, self.compiled = [], {}
        try:
            yield
        finally:
            self.forced = {}


class Spy:
    """Stands for a kernel."""

    def __init__(self, kernel: Any, bench: Bench) -> None:
        self.kernel, self.bench, self.__name__ = kernel, bench, kernel.__name__

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            forced = self.bench.forced.get(self.__name__, {})
            sizes = list(grid)
            for block, axis in AXES.get(self.__name__, {}).items():
                if block in forced:
                    sizes[axis] = math.ceil(sizes[axis] * options[block] / forced[block])
            changed = Launch(self.kernel, tuple(sizes), arguments, {**options, **forced})
            self.bench.launches.append(changed)
            if not self.bench.notes:
                self.bench.compiled[self.__name__] = self.kernel[changed.grid](
                    *arguments, **changed.options
                )

        return launch


def install(bench: Bench) -> None:
    """Put spies in the kernels' place, and force what ``tuning.launch`` would choose."""
    launching.ADDRESSES = False
    if not INTERPRETED:
        hash_sources()
    for name in MODULES:
        module = importlib.import_module(f"b2t_kernels.{name}")
        for attribute in [each for each in vars(module) if each.endswith("_kernel")]:
            setattr(module, attribute, Spy(getattr(module, attribute), bench))

    def launch(kernel: Any, space: Any, sizes: Any, run: Callable, device: Any) -> Any:
        forced = bench.forced.get(kernel.__name__)
        if forced is None:
            return run(space[0])
        blocks = {key: value for key, value in forced.items() if key.isupper()}
        return run(tuning.config(forced["num_warps"], forced["num_stages"], **blocks))

    tuning.launch = launch


class Compiler:
    """Compiles launches in other processes, into the cache on disk that this one reads."""

    def __init__(self, workers: int, architecture: int) -> None:
        spawned = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(workers, spawned, _begin, (architecture,))
        self.futures: dict[str, Future] = {}

    def submit(self, launch: Launch) -> Future | None:
        """The future compiling a launch; None if this process has it."""
        found: list[str] = []

        def seize(**given: Any) -> bool:
            found.append(given["compile"]["specialization_data"])
            return True

        hooks = triton.knobs.runtime
        before, hooks.jit_cache_hook = hooks.jit_cache_hook, seize
        try:
            launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)
        finally:
            hooks.jit_cache_hook = before
        if not found:
            return None
        name = launch.kernel.__name__
        key = f"{name} {json.loads(found[0])['key']}"
        if key not in self.futures:
            self.futures[key] = self.pool.submit(_compile, name, found[0])
        return self.futures[key]

    def close(self) -> None:
        """Stop without waiting for what was not begun."""
        self.pool.shutdown(wait=False, cancel_futures=True)


class _Target:
    """What the compiler asks of a driver, where there is none or it is not to be woken."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def stand_in(architecture: int) -> None:
    """Compile for a chip, whether or not this machine has it."""
    triton.runtime.driver.set_active(_Target(architecture))


def hash_sources() -> None:
    """Hash what all kernels consist of, in one order.

    Triton's hash of a kernel depends on which others were hashed before it, and what one process
    compiled is found by another only under the same hash.
    """
    for name in sorted({**tuning.KERNELS, **tuning.PLAIN_KERNELS}):
        assert tuning.kernel(name).cache_key


def _begin(architecture: int) -> None:
    stand_in(architecture)
    hash_sources()


def _compile(name: str, data: str) -> int:
    """Bytes of shared memory that a kernel takes; the launcher of its signature is built too."""
    made = tuning.kernel(name).preload(data)
    with contextlib.suppress(Exception):
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(made.src, made.metadata)
    return int(made.metadata.shared)


def milliseconds(run: Callable[[], Any], least: float = 0.5) -> float:
    """Time of one run of as many in a CUDA graph as take ``least`` ms; the median of seven.

    Without a graph, thus with the host's time, where none can be captured.
    """
    run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    repeats = max(1, min(40, math.ceil(least / max(begin.elapsed_time(end), 1e-3))))

    def several() -> None:
        for _ in range(repeats):
            run()

    graph, replay = torch.cuda.CUDAGraph(), several
    with contextlib.suppress(RuntimeError):
        with torch.cuda.graph(graph):
            several()
        replay = graph.replay
    replay()
    times = []
    for _ in range(7):
        begin.record()
        replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / repeats)
    return statistics.median(times)
