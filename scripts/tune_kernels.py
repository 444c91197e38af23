"""Time many tile shapes of every kernel on a GPU, check what each answers, and compare.

    python scripts/tune_kernels.py --budget 90 --out results/tuning.json
    python scripts/tune_kernels.py --only scan settle --size 1500x1024x64 --budget 60
    python scripts/tune_kernels.py --dry                       # compiles a few, without a GPU
    TRITON_INTERPRET=1 python scripts/tune_kernels.py --dry    # runs a few, small, without a GPU

More shapes than `b2t_kernels.tuning` offers, of every kernel, on the sizes that users have, the
most valuable first, until --budget seconds are over. Other processes compile meanwhile. Times are
of a CUDA graph, without the host: of the kernel alone, and of the operator around it ("op"), by
which the scan is judged because its tile also decides what is left to merge. "Product" is x·cᵀ in
fp16 by torch in the same run: its time, once for each product of the kernel, over the kernel's. A
shape that raises or answers wrong is noted and never best. --out has every shape.
"""

import argparse
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tile_launches import INTERPRETED, Bench, Compiler, Launch, install, milliseconds, stand_in
from tile_work import Size, Work

from b2t_kernels import tuning
from b2t_kernels.prepare import padded_width

Options = dict[str, Any]
LARGE, MIDDLE = Size(65_536, 8192, 256), Size(65_536, 1024, 64)
SMALL, MANY = Size(1500, 1024, 64), Size(1500, 8192, 256)
MEDIUM, WIDE, WIDER = Size(65_536, 1024, 128), Size(65_536, 1024, 512), Size(65_536, 1024, 1024)
TINY = Size(70, 130, 20)
ACCUMULATORS = 160  # float32 a thread may hold before it is sure to spill


@dataclass(frozen=True)
class Subject:
    """A kernel inside an operator on a size; ``products`` of N × K × D that it multiplies."""

    kernel: str
    operator: str
    size: Size
    products: int = 0

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.kernel.removesuffix('_kernel')} ({self.operator})"


def subjects() -> Iterator[Subject]:
    """What is tuned, the most valuable first."""
    plan = [
        ("scan_kernel", "exact", 1, (LARGE, SMALL)),
        ("scan_kernel", "soft", 1, (SMALL,)),
        ("settle_kernel", "soft", 0, (SMALL,)),
        ("refine_kernel", "exact", 0, (SMALL,)),
        ("row_gradient_kernel", "gradients", 2, (SMALL, LARGE)),
        ("shift_kernel", "gradients", 1, (SMALL, LARGE)),
        ("column_kernel", "soft", 1, (SMALL, LARGE)),
        ("scan_kernel", "soft", 1, (LARGE, MIDDLE)),
        ("scan_kernel", "exact", 1, (MIDDLE, MANY)),
        ("settle_kernel", "exact", 0, (LARGE, MIDDLE)),
        ("rows_kernel", "fast", 0, (SMALL, LARGE)),
        ("candidates_kernel", "beam", 0, (SMALL,)),
        ("winners_kernel", "beam", 0, (SMALL,)),
        ("gathered_kernel", "sums", 0, (SMALL, MANY)),
        ("segment_kernel", "sums", 0, (LARGE,)),
        ("scan_kernel", "fast", 1, (LARGE, SMALL)),
        ("code_gradient_kernel", "gradients", 2, (LARGE, SMALL)),
        ("row_gradient_kernel", "gradients", 2, (MIDDLE,)),
        ("shift_kernel", "gradients", 1, (MIDDLE,)),
        ("column_kernel", "soft", 1, (MIDDLE,)),
        ("scan_kernel", "draw", 1, (SMALL, LARGE)),
        ("drawn_kernel", "draw", 0, (SMALL,)),
        ("scan_kernel", "exact", 1, (MEDIUM, WIDE, WIDER)),
        ("scan_kernel", "soft", 1, (MEDIUM, MANY)),
        ("leave_kernel", "leave", 0, (SMALL, LARGE)),
        ("place_kernel", "gradients", 0, (SMALL, MANY)),
        ("round_kernel", "prepare", 0, (LARGE, SMALL)),
        ("extent_kernel", "prepare", 0, (LARGE, SMALL)),
        ("mean_kernel", "prepare", 0, (LARGE, SMALL)),
        ("total_kernel", "total", 0, (SMALL, LARGE)),
        ("scatter_kernel", "atomic", 0, (LARGE, SMALL)),
        ("row_gradient_kernel", "gradients", 2, (MEDIUM, MANY)),
        ("code_gradient_kernel", "gradients", 2, (MIDDLE, MEDIUM)),
        ("refine_kernel", "exact", 0, (LARGE,)),
        ("scan_kernel", "draw", 1, (MIDDLE,)),
    ]
    for kernel, operator, products, sizes in plan:
        for size in sizes:
            yield Subject(kernel, operator, size, products)


def grid_of(warps: tuple[int, ...], stages: tuple[int, ...], **blocks: tuple) -> Iterator[Options]:
    """Every combination."""
    for values in itertools.product(stages, warps, *blocks.values()):
        yield {
            **dict(zip(blocks, values[2:], strict=True)),
            "num_warps": values[1],
            "num_stages": values[0],
        }


def tensor_tiles(kernel: str, width: int, limit: int) -> Iterator[Options]:
    """Shapes of a tensor-core kernel whose operands fit shared memory and sums the registers."""
    whole = width <= tuning.WIDEST_WHOLE
    sides = {"BLOCK_N": (64, 128, 256), "BLOCK_K": (64, 128, 256)}
    if kernel != "scan_kernel":
        sides = {"BLOCK_N": (32, 64, 128), "BLOCK_K": (32, 64, 128)}
    pieces = (width,) if whole else (64, 128)
    for each in grid_of((8, 4), (3, 2, 4, 5), **sides, BLOCK_D=pieces):
        rows, codes, depth = each["BLOCK_N"], each["BLOCK_K"], each["BLOCK_D"]
        threads, stages = 32 * each["num_warps"], each["num_stages"]
        held, streamed, sums = rows, codes, 0
        if kernel in ("column_kernel", "code_gradient_kernel"):
            held, streamed = codes, rows
        if kernel in ("row_gradient_kernel", "code_gradient_kernel"):
            sums = held * depth
        shared = 2 * depth * (held + stages * streamed)
        if not whole:
            shared = 2 * depth * stages * (rows + codes)
        numbers = (rows * codes + sums) / threads
        # Few numbers a thread: most of its time would go into the loop itself.
        if shared <= limit and 8 <= numbers <= ACCUMULATORS:
            yield each


def plain_tiles(kernel: str, given: Options) -> Iterator[Options]:
    """Shapes of a kernel without products, about those with which it is launched now."""
    few, all_ = (1, 2, 4, 8), (2, 4, 8)
    rows = {"BLOCK_N": (1, 2, 4, 8, 16, 32, 64)}
    choices: dict[str, Iterator[Options]] = {
        "settle_kernel": grid_of(all_, (1,), BLOCK_N=(4, 8, 16, 32), STEP=(16, 32, 64)),
        "drawn_kernel": grid_of(all_, (1,), BLOCK_N=(4, 8, 16, 32), STEP=(16, 32, 64)),
        "refine_kernel": grid_of(few, (2, 3), BLOCK_D=(32, 64, 128, 256)),
        "candidates_kernel": grid_of(few, (1, 2), BLOCK_D=(16, 32, 64, 128)),
        "winners_kernel": grid_of(few, (1, 2), BLOCK_D=(16, 32, 64, 128)),
        "rows_kernel": grid_of(few, (3,), **rows),
        "gathered_kernel": grid_of(
            few, (2, 3), BLOCK_N=(64, 128, 256), STEP=(8, 16, 32), BLOCK_K=(4, 8, 16), BLOCK_D=(64,)
        ),
        "place_kernel": grid_of(few, (3,), BLOCK_K=(256, 512, 1024, 2048)),
        "segment_kernel": grid_of(few, (2, 3), BLOCK_N=(8, 16, 32, 64), BLOCK_D=(32, 64, 128)),
        "round_kernel": grid_of(few, (3,), BLOCK_K=(4, 8, 16, 32), BLOCK_D=(64, 128, 256)),
        "extent_kernel": grid_of(few, (3,), BLOCK_K=(4, 8, 16, 32), BLOCK_D=(64, 128, 256)),
        "mean_kernel": grid_of((4, 8), (3,), BLOCK_K=(64, 128, 256), BLOCK_D=(8, 16, 32)),
        "leave_kernel": grid_of(few, (3,), BLOCK_D=(32, 64, 128, 256)),
        "scatter_kernel": grid_of(few, (3,), BLOCK_N=(4, 8, 16, 32), BLOCK_D=(32, 64, 128)),
        "total_kernel": grid_of(few, (3,), BLOCK_N=(4, 8, 16, 32), BLOCK_D=(32, 64, 128)),
    }
    for each in choices[kernel]:
        spans = given.get("BLOCK_N", 1) * given.get("BLOCK_D", 1)
        if kernel != "rows_kernel" or spans // 8 <= each["BLOCK_N"] * given["BLOCK_D"] <= 4 * spans:
            yield each


@dataclass
class Trial:
    """One shape: milliseconds of the kernel and of the operator, or why there are none."""

    options: Options
    kernel: float | None = None
    whole: float | None = None
    fault: str = ""
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None


@dataclass
class Found:
    """What a subject came to; the first trial is the present choice."""

    name: str
    size: str
    judged_by: str
    product: float | None = None
    trials: list[Trial] = field(default_factory=list)

    def time(self, trial: Trial) -> float:
        """What decides."""
        value = trial.whole if self.judged_by == "op" else trial.kernel
        return float("inf") if value is None or trial.fault else value

    def row(self) -> str:
        """One line of the table."""
        now, best = self.trials[0], min(self.trials, key=self.time)
        bad = sum(bool(trial.fault) for trial in self.trials)
        if self.time(best) == float("inf"):
            tried = f"{len(self.trials)}, {bad}"
            return f"| {self.name} | {self.size} | {tried} | not timed {now.fault} | | | |"
        ratio = self.time(now) / self.time(best)

        def times(trial: Trial) -> str:
            return f"{1e3 * (trial.kernel or 0):.1f} / {1e3 * (trial.whole or 0):.1f}"

        share = f"{self.product / best.kernel:.0%}" if self.product and best.kernel else ""
        return (
            f"| {self.name} | {self.size} | {len(self.trials)}, {bad} | {shape(now.options)} "
            f"{times(now)} {now.fault} | {shape(best.options)} {times(best)} | {ratio:.2f} | "
            f"{share} |"
        )


HEAD = (
    "| kernel (operator) | N × K × D | shapes, of them bad | now: shape, µs of kernel / op | "
    "best | now over best | product |\n" + "|---" * 7 + "|"
)


def shape(options: Options) -> str:
    """Blocks, then warps and stages."""
    blocks = "×".join(str(value) for key, value in options.items() if key.isupper())
    return f"{blocks} w{options['num_warps']} s{options['num_stages']}"


class Tuning:
    """All of it: what is noted, compiled, timed and found."""

    def __init__(self, options: argparse.Namespace, device: str) -> None:
        self.options, self.device = options, device
        self.bench = Bench()
        install(self.bench)
        major, minor = (9, 0) if device == "cpu" else torch.cuda.get_device_capability()
        workers = options.workers or max(1, len(os.sched_getaffinity(0)) - 2)
        self.compiler = None if INTERPRETED else Compiler(workers, 10 * major + minor)
        self.works: dict[Size, Work] = {}
        self.products: dict[Size, float] = {}
        self.needed: dict[Size, list[Future]] = {}
        self.solved: set[Size] = set()

    def work(self, size: Size) -> Work:
        """The work on a size, not yet solved; what solving it needs is being compiled."""
        if size not in self.works:
            self.works[size] = work = Work(size, self.device)
            with self.bench.force():
                work.prepare()
                work.soft()
                self.needed[size] = self._submit(self.bench.launches)
        return self.works[size]

    def note(self, subject: Subject) -> list[tuple[Options, list[Future]]]:
        """The shapes to try, the present one first, each with what is being compiled for it."""
        self.bench.notes = True
        work = self.work(subject.size)
        present = self._launches(subject, work, None)
        own = [each for each in present if each.kernel.__name__ == subject.kernel]
        now = {
            key: value
            for key, value in own[0].options.items()
            if key.startswith(("BLOCK", "STEP")) or key in ("num_warps", "num_stages")
        }
        now = {"num_warps": 4, "num_stages": 3, **now}
        if subject.products:
            limit = tuning.SHARED_MEMORY_LIMIT[90 if self.device == "cpu" else self.family()]
            shapes = list(tensor_tiles(subject.kernel, padded_width(subject.size.D), limit))
        else:
            shapes = list(plain_tiles(subject.kernel, now))
        others = [each for each in shapes if each != now]
        if not subject.products:
            # Neighbours hardly differ where no product is at stake: any few will do.
            random.Random(0).shuffle(others)
        noted = [
            (each, self._submit(self._launches(subject, work, each)))
            for each in [now, *others][: self.options.most]
        ]
        self.bench.notes = False
        return noted

    def family(self) -> int:
        """The chip's tables."""
        return tuning.family(torch.device(self.device, 0))

    def _launches(self, subject: Subject, work: Work, forced: Options | None) -> list[Launch]:
        with self.bench.force(subject.kernel, forced):
            getattr(work, subject.operator)()
            return self.bench.launches

    def _submit(self, launches: list[Launch]) -> list[Future]:
        if self.compiler is None:
            return []
        futures = [self.compiler.submit(launch) for launch in launches]
        return [future for future in futures if future is not None]

    def solve(self, size: Size) -> None:
        """Find the truth and time the plain product, once."""
        if size in self.solved:
            return
        self.solved.add(size)
        work = self.works[size]
        wait(self.needed[size])
        work.solve()
        if self.device == "cuda":
            rows, codes = work.x.half(), work.codebook.half()
            out = torch.empty(size.N, size.K, dtype=torch.float16, device="cuda")
            self.products[size] = milliseconds(lambda: torch.mm(rows, codes.T, out=out))

    def tune(self, subject: Subject, noted: list[tuple[Options, list[Future]]]) -> Found:
        """Try every shape of a subject."""
        judge = "op" if subject.kernel == "scan_kernel" else "kernel"
        found = Found(subject.name, str(subject.size), judge)
        if self.compiler is None or self.device == "cuda":
            self.solve(subject.size)
        if subject.products and subject.size in self.products:
            found.product = subject.products * self.products[subject.size]
        for options, futures in noted:
            trial = Trial(options)
            found.trials.append(trial)
            try:
                self._try(subject, trial, futures)
            except Exception as error:
                trial.fault = trial.fault or f"{type(error).__name__}: {str(error)[:120]}"
        return found

    def _try(self, subject: Subject, trial: Trial, futures: list[Future]) -> None:
        work = self.works[subject.size]
        compiled = [future.result() for future in futures]
        if self.compiler is not None and self.device == "cpu":
            trial.shared = max(compiled, default=None)
            return
        with self.bench.force(subject.kernel, trial.options):
            answer = getattr(work, subject.operator)()
            if self.device == "cuda":
                torch.cuda.synchronize()
            launches = [e for e in self.bench.launches if e.kernel.__name__ == subject.kernel]
            code = self.bench.compiled.get(subject.kernel)
            trial.registers = getattr(code, "n_regs", None)
            trial.spills = getattr(code, "n_spills", None)
            trial.shared = getattr(getattr(code, "metadata", None), "shared", None)
            trial.fault = work.fault(subject.operator, answer)
            if self.device == "cuda":
                trial.kernel = milliseconds(lambda: [launch() for launch in launches])
                trial.whole = milliseconds(lambda: self._again(work, subject.operator))

    def _again(self, work: Work, operator: str) -> None:
        self.bench.launches.clear()
        getattr(work, operator)()


def chosen(options: argparse.Namespace) -> list[Subject]:
    """The subjects asked for, in order."""
    picked = [
        each
        for each in subjects()
        if (not options.only or any(each.name.startswith(name) for name in options.only))
        and (not options.size or str(each.size).replace(" × ", "x") in options.size)
    ]
    if not (options.dry and INTERPRETED):
        return picked
    names = dict.fromkeys((each.kernel, each.operator, each.products) for each in picked)
    return [Subject(kernel, operator, TINY, products) for kernel, operator, products in names]


def run(options: argparse.Namespace, device: str) -> list[Found]:
    """Everything, until the time is over."""
    deadline = time.monotonic() + options.budget
    tuning_run, found = Tuning(options, device), []
    waiting: dict[Subject, list[tuple[Options, list[Future]]]] = {}
    todo = chosen(options)
    try:
        for place, subject in enumerate(todo):
            # Noted two ahead, so that the compilers never wait.
            for ahead in todo[place : place + options.ahead]:
                if ahead not in waiting:
                    waiting[ahead] = tuning_run.note(ahead)
            found.append(tuning_run.tune(subject, waiting.pop(subject)))
            waiting[subject] = []
            print(found[-1].row(), flush=True)
            write(found, options)
            if time.monotonic() > deadline:
                print(f"out of time: {len(todo) - place - 1} of {len(todo)} were not tried")
                break
    finally:
        if tuning_run.compiler is not None:
            tuning_run.compiler.close()
    for size, product in tuning_run.products.items():
        rate = 2e-9 * size.N * size.K * size.D / product
        print(f"plain product {size}: {1e3 * product:.1f} µs, {rate:.0f} TFLOP/s")
    return found


def write(found: list[Found], options: argparse.Namespace) -> None:
    """Every shape, so far."""
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps([asdict(each) for each in found], indent=1), "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=90.0, help="seconds")
    parser.add_argument("--only", nargs="+", help="kernels whose name begins so: scan, settle, …")
    parser.add_argument("--size", nargs="+", help="N × K × D as 1500x1024x64")
    parser.add_argument("--most", type=int, help="shapes of each kernel and size (24)")
    parser.add_argument("--workers", type=int, help="compiling processes (default: cores − 2)")
    parser.add_argument("--ahead", type=int, default=8, help="kernels compiled ahead")
    parser.add_argument("--dry", action="store_true", help="without a GPU")
    parser.add_argument("--out", type=Path, help="a JSON file with every shape")
    options = parser.parse_args()
    device = "cpu" if options.dry else "cuda"
    options.most = options.most or (3 if options.dry else 24)
    if options.dry:
        torch.cuda.get_device_capability = lambda *_: (9, 0)  # type: ignore[assignment]
        tuning.family = lambda _: 90  # type: ignore[assignment]
        if not INTERPRETED:
            stand_in(90)
    print(HEAD, flush=True)
    found = run(options, device)
    faults = {each.name: each.trials[0].fault for each in found if each.trials[0].fault}
    for name, fault in faults.items():
        print(f"WRONG now: {name}: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
