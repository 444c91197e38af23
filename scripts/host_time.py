"""What the host does before a GPU has its work: launches, allocations and Python's own time.

    python scripts/host_time.py                       # N = 1,500, K = 1024, D = 64
    python scripts/host_time.py --sizes 65536 8192 256 --only nearest

No GPU is needed: the kernels are compiled for sm_90, and a driver that starts nothing takes its
place. Every operator runs as it would for CUDA tensors, but on those of the CPU, whose contents it
never reads. Counted for one call, after those that compile: launches of the kernels, the pointers
they hand over as tensors (Triton asks each for its address, and the driver what it is), other
operators of torch that compute something (on a GPU one launch or more each), and allocations.
"python" is processor time of a call, the least mean of several rounds, without what the driver and
torch's own kernels take: compare rows of one run alone.
"""

import argparse
import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

VIEWS = {
    "alias", "as_strided", "detach", "expand", "lift_fresh", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view",
    "permute", "reshape",
}  # fmt: skip
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty"}


class Driver:
    """A driver of an H100 that starts nothing and notes what it was asked to start."""

    def __init__(self) -> None:
        self.utils = self
        self.launches: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = []
        self.noted = True

    def get_device_properties(self, device: int) -> dict[str, int]:
        """What Triton asks of a device."""
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132}

    def load_binary(self, *binary: Any) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, threads."""
        return 0, 0, 0, 0, 1024

    def get_current_target(self) -> Any:
        """The chip that is compiled for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Its stream."""
        return 7

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What stands for the launcher in C."""
        name = metadata.name

        def start(x: int, y: int, z: int, stream: int, function: int, *arguments: Any) -> None:
            if self.noted:
                # Four of them are the metadata and Triton's hooks.
                self.launches.append((name, (x, y, z), arguments[4:]))

        return start


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[Driver]:
    """Let tensors of the CPU go the way of CUDA tensors, to a driver that starts nothing."""
    import triton

    import b2t_kernels
    from b2t_kernels import cuda, ops, tuning, usage_ops

    driver = Driver()
    triton.runtime.driver.set_active(driver)
    places = {
        (cuda, "obstacle"): lambda *_, **__: "",
        (ops, "undispatched"): lambda _: True,
        (ops, "blocked_residual"): cuda,
        (b2t_kernels, "prepare_codes"): lambda books: cuda.prepare_codes(books.detach()),
        (usage_ops, "undispatched"): lambda _: True,
        (tuning, "family"): lambda _: 90,
        (tuning, "multiprocessors"): lambda _: 132,
    }
    before = {place: getattr(*place) for place in places}
    for place, stand_in in places.items():
        setattr(*place, stand_in)
    try:
        yield driver
    finally:
        for place, own in before.items():
            setattr(*place, own)


class Operators(TorchDispatchMode):
    """Counts torch's operators by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.counts[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))

    def computing(self) -> int:
        """How many compute something."""
        skipped = VIEWS | ALLOCATIONS
        return sum(number for name, number in self.counts.items() if name not in skipped)

    def allocating(self) -> int:
        """How many take memory, or make a tensor of which they fill."""
        made = ("zeros", "ones", "full", "arange", "new_zeros", "zeros_like", "clone", "_to_copy")
        return sum(self.counts[name] for name in (*ALLOCATIONS, *made))


def operators(N: int, K: int, D: int, layers: int = 4) -> dict[str, Callable[[], Any]]:
    """Calls by name, as the quantizer and the benchmark make them."""
    import b2t_kernels
    from b2t_kernels import cuda

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator)
    books = torch.randn(layers, K, D, generator=generator)
    book, tau = books[0], torch.tensor(float(D))
    entries = cuda.prepare_codes(books)
    entry, indices = entries[0], torch.randint(K, (N,), generator=generator)
    left, errors, codes = x.clone(), torch.zeros_like(x), torch.zeros(N, layers, dtype=torch.int64)
    wanted = torch.linspace(-1, 1, K)
    _, lse, *_ = cuda.usage_forward(x, book, tau, None, None, entry)
    nearest, keys = b2t_kernels.nearest_code, (torch.arange(N), torch.arange(K))
    return {
        "nearest fast": lambda: nearest(x, book),
        "nearest exact": lambda: nearest(x, book, None, "exact"),
        "nearest fast, prepared": lambda: nearest(x, book, None, "fast", entry),
        "nearest exact, prepared": lambda: nearest(x, book, None, "exact", entry),
        "prepare one": lambda: cuda.prepare_codes(books[:1]),
        "prepare four": lambda: cuda.prepare_codes(books),
        "search and usage": lambda: b2t_kernels.search_usage(x, book, tau, None, "exact", entry),
        "usage forward": lambda: cuda.usage_forward(x, book, tau, None, None, entry),
        "usage backward, rows": lambda: cuda.usage_backward(
            wanted, x, book, tau, lse, (True, False), entry
        ),
        "usage backward, both": lambda: cuda.usage_backward(
            wanted, x, book, tau, lse, (True, True), entry
        ),
        "code_sums": lambda: b2t_kernels.code_sums(x, indices, K),
        "leave": lambda: cuda.leave(left, book, indices, None, errors),
        "sum_codes": lambda: cuda.sum_codes(books, codes, None),
        "draw": lambda: cuda.sample_code(x, book, tau, *keys, entry),
        f"beam of 8, {layers} layers": lambda: cuda.beam_codes(x, list(books), 8, entries),
    }  # fmt: skip


def step_of(N: int, K: int, D: int, layers: int = 4) -> Callable[[], Any]:
    """A quantizer's forward with all losses, backward and update, which revives nothing."""
    from b2t.quantize import ResidualVQ

    sizes: dict[str, Any] = {"dim": D, "codebook_size": K, "num_quantizers": layers}
    quantizer = ResidualVQ(**sizes, kmeans_init=False, revival=None).train()
    x = torch.randn(1, N, D, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def step() -> None:
        with torch.enable_grad():
            out = quantizer(x, finite=True)
            total = torch.stack(list(out.losses.values())).sum() + out.quantized.sum()
            torch.autograd.grad(total, x)
        quantizer.update(out.stats)

    return step


def measured(call: Callable[[], Any], driver: Driver, calls: int, rounds: int = 7) -> list[float]:
    """Launches, pointers as tensors, other operators, allocations, microseconds of Python."""
    for _ in range(3):
        call()
    driver.launches.clear()
    with Operators() as seen:
        call()
    launches = list(driver.launches)
    pointers = sum(isinstance(each, torch.Tensor) for _, _, given in launches for each in given)
    driver.noted, spent = False, []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(calls):
            call()
        spent.append((time.process_time() - start) / calls * 1e6)
    driver.noted = True
    return [len(launches), pointers, seen.computing(), seen.allocating(), min(spent)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs=3, default=(1500, 1024, 64), metavar="N")
    parser.add_argument("--only", default="", help="operators whose names hold this")
    parser.add_argument("--calls", type=int, default=200, help="calls of a round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| operator | launches | tensors | other operators | allocations | python µs |")
    print("|---" * 6 + "|")
    with as_on_a_gpu() as driver, torch.no_grad():
        calls = operators(*options.sizes)
        calls["quantizer's step, 4 layers"] = step_of(*options.sizes)
        for name, call in calls.items():
            if options.only in name:
                *counts, spent = measured(call, driver, options.calls)
                print(f"| {name} | {' | '.join(map(str, counts))} | {spent:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
