"""Time the kernels against torch, faiss, vector-quantize-pytorch and flash-kmeans.

    python scripts/bench_kernels.py                  # GPU where there is one, else CPU
    python scripts/bench_kernels.py --quick          # the flagship case alone
    python scripts/bench_kernels.py --small          # the case of one micro-batch alone
    python scripts/bench_kernels.py --device cpu --threads 2 --out results/

Each case first checks the answers (float64 brute force on up to 1024 rows; the exit status is 1 if
one is wrong), then times all methods in turn, round after round, and reports medians: of wall time,
of processor time on a CPU, and on a GPU also of the host's time to enqueue, and of a CUDA graph of
the same work where it can be captured; beside the longest single run stands what held it up, such
as a wait for the device, memory taken from it or a compilation. --budget ends it after so many
seconds, between cases. Libraries that are not installed are left out and named. Written to --out:
bench_kernels.md, .json and .png. The cases and methods stand in scripts/kernel_cases.py.

"Unfused torch" is two baselines: cdist + argmin in float32, which goals of 5 × mean, and addmm +
argmax in the rows' own precision, where the whole gain possible is the N × K scores' traffic.
"""

import argparse
import contextlib
import ctypes
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kernel_cases import (
    FLAGSHIP,
    SMALL,
    UNFUSED_ELEMENTS,
    Case,
    Method,
    beam_methods,
    cases,
    check_search,
    draw_methods,
    make_data,
    optional,
    quantizer_methods,
    search_methods,
    sums_methods,
    usage_methods,
)
from stalls import watched

MEDIAN_ROUNDS = {"cpu": 5, "cuda": 30}


@dataclass
class Result:
    """Medians of one method on one case in milliseconds, and its peak extra memory in MB.

    On a GPU milliseconds are the mean of runs back to back, and stalls what happened in them.
    """

    case: str
    method: str
    milliseconds: float
    ratio: float = 0.0
    of_matrix_product: float | None = None
    host: float | None = None
    graph: float | None = None
    processor: float | None = None
    peak_mb: float | None = None
    longest: float | None = None
    stalls: str = ""


@dataclass
class Report:
    """Everything a run found out."""

    device: str
    threads: int
    versions: dict[str, str]
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)


@dataclass
class Times:
    """Seconds of each run: wall, host to enqueue, processor."""

    wall: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def take(self, method: Method, cuda: bool) -> None:
        """One run, the device idle before and after."""
        if cuda:
            torch.cuda.synchronize()
        start, used = time.perf_counter(), time.process_time()
        method()
        self.host.append(time.perf_counter() - start)
        if cuda:
            torch.cuda.synchronize()
        self.wall.append(time.perf_counter() - start)
        self.processor.append(time.process_time() - used)


def graphed(method: Method) -> Method | None:
    """The replay of a CUDA graph of the method; None if it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            method()
    except RuntimeError:
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()
        return None
    return graph.replay


def back_to_back(method: Method, runs: int = 10) -> list[float]:
    """Seconds of each of several runs that the device does without a pause."""
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    torch.cuda.synchronize()
    ends[0].record()
    for end in ends[1:]:
        method()
        end.record()
    ends[-1].synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(ends)]


def peak_memory(method: Method, cuda: bool) -> float | None:
    """Peak of the memory a run takes beyond what was held before, in MB; None if unknown."""
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        method()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        # Freed blocks that malloc keeps would hide what the run takes.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    method()
    return (_status("VmHWM") - before) / 1e3


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[1])


def measure(case: str, methods: dict[str, Method], rounds: int, cuda: bool, report: Report) -> None:
    """Warm up, then time every method once a round; a slow one (over 2 s) three times at most."""
    times = {name: Times() for name in methods}
    for method in methods.values():
        for _ in range(3 if cuda else 1):
            method()
    for turn in range(rounds):
        for name, method in methods.items():
            if turn < 3 or sum(times[name].wall) < 2.0:
                times[name].take(method, cuda)
    medians, stalls = {name: statistics.median(each.wall) for name, each in times.items()}, {}
    for name, method in methods.items() if cuda else ():
        with watched(cuda) as stalls[name]:
            runs = back_to_back(method)
        medians[name] = statistics.fmean(runs)
        times[name].wall += runs
    first = next(iter(methods))
    product = medians.get("matrix product")
    for name, method in methods.items():
        replay = graphed(method) if cuda else None
        each = times[name]
        result = Result(
            case,
            name,
            1e3 * medians[name],
            medians[name] / medians[first],
            product / medians[name] if product else None,
            1e3 * statistics.median(each.host) if cuda else None,
            1e3 * statistics.fmean(back_to_back(replay)) if replay else None,
            None if cuda else 1e3 * statistics.median(each.processor),
            peak_memory(method, cuda),
            1e3 * max(each.wall),
            str(stalls.get(name, "")),
        )
        report.results.append(result)
        print(table([result]).splitlines()[-1], flush=True)


def table(results: list[Result]) -> str:
    """Results as a Markdown table."""
    rows = [
        "| case | method | ms | × the first | fraction of the matrix product | host ms | "
        "graph ms | processor ms | peak MB | longest ms | held up by |",
        "|---" * 11 + "|",
    ]

    def number(value: float | None, form: str = ".3f") -> str:
        return "" if value is None else format(value, form)

    for each in results:
        rows.append(
            f"| {each.case} | {each.method} | {each.milliseconds:.3f} | {each.ratio:.2f} | "
            f"{number(each.of_matrix_product, '.0%')} | {number(each.host)} | "
            f"{number(each.graph)} | {number(each.processor)} | {number(each.peak_mb, '.1f')} | "
            f"{number(each.longest)} | {each.stalls} |"
        )
    return "\n".join(rows)


@dataclass(frozen=True)
class Goal:
    """A ratio of two methods' times: ``above`` over ``below``, at least or at most ``bound``.

    of_graph: below is the time of its CUDA graph.
    """

    text: str
    case: str
    above: str
    below: str
    bound: float
    at_least: bool = True
    of_graph: bool = False

    def judge(self, report: Report) -> str:
        """One line; processor time where there is one, as it bears a busy machine better."""
        found = {r.method: r for r in report.results if r.case == self.case}
        for name in (self.above, self.below):
            if name not in found:
                return f"- {self.text}: not measured ({name} is missing)"
        times = [
            found[name].processor or found[name].milliseconds for name in (self.above, self.below)
        ]
        if self.of_graph:
            replay = found[self.below].graph
            if replay is None:
                return f"- {self.text}: could not be captured"
            return f"- {self.text}: {found[self.above].milliseconds / replay:.3f}"
        ratio = times[0] / times[1]
        met = ratio >= self.bound if self.at_least else ratio <= self.bound
        return f"- {self.text}: {ratio:.3f} ({'met' if met else 'missed'})"


def goals(device: str) -> list[Goal]:
    """Those of kernels/RESULTS.md."""
    flagship = f"search {FLAGSHIP[device].name}"
    step = f"quantizer {SMALL.name}"
    ours, peer = "ours fast", "vector-quantize-pytorch (eval)"
    same, wide = (
        "unfused torch, same type (addmm + argmax)",
        "unfused torch, float32 (cdist + argmin)",
    )
    theirs = Goal(
        "a step's time, vector-quantize-pytorch over ours", step, "vector-quantize-pytorch",
        "b2t, commitment", 1,
    )  # fmt: skip
    beside = [
        Goal(f"a step's time, {losses}, over one CUDA graph of it", step,
             f"b2t, {losses}, nothing read", f"b2t, {losses}, nothing read", 1, of_graph=True)
        for losses in ("commitment", "all losses")
    ]  # fmt: skip
    beams = Goal(
        "time of a beam of 8 over one code, at most 3", f"beam {SMALL.name}", "beam of 8",
        "one code", 3, False,
    )  # fmt: skip
    if device == "cpu":
        return [
            Goal("time over faiss, at most 1.1", flagship, ours, "faiss IndexFlatL2", 1.1, False),
            Goal("vector-quantize-pytorch over ours, at least 5", flagship, peer, ours, 5),
            theirs,
            beams,
        ]
    share = 0.6 if torch.cuda.get_device_capability()[0] >= 9 else 0.7
    return [
        Goal("cdist in float32 over ours, at least 5", flagship, wide, ours, 5),
        Goal("addmm in half precision over ours, at least 1.8", flagship, same, ours, 1.8),
        Goal(f"product over ours, at least {share}", flagship, "matrix product", ours, share),
        Goal("exact over fast, at most 1.15", flagship, "ours exact", ours, 1.15, False),
        Goal("flash-kmeans over ours, at least 1", flagship, "flash-kmeans", ours, 1),
        theirs,
        *beside,
        beams,
    ]  # fmt: skip


def figure(report: Report, path: Path) -> None:
    """Bars of time relative to the first method, one group for each case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(result.case for result in report.results))
    drawn, axes = plt.subplots(
        len(names), 1, figsize=(8, 0.6 + 0.34 * len(report.results)), squeeze=False
    )
    for axis, name in zip(axes[:, 0], names, strict=True):
        chosen = [result for result in report.results if result.case == name][::-1]
        ours = [result.method.startswith(("ours", "b2t")) for result in chosen]
        bars = axis.barh(
            [result.method for result in chosen],
            [result.ratio for result in chosen],
            color=["C0" if own else "0.7" for own in ours],
        )
        axis.bar_label(bars, [f"{r.milliseconds:.3g} ms" for r in chosen], padding=3, fontsize=7)
        axis.set_title(name, fontsize=8, loc="left")
        axis.tick_params(labelsize=7)
        axis.margins(x=0.2)
    axes[-1, 0].set_xlabel("time relative to the first")
    drawn.suptitle(report.device, fontsize=9)
    drawn.tight_layout()
    drawn.savefig(path, dpi=120)


def write(report: Report, device: str, folder: Path) -> None:
    """The table, the JSON and the figure."""
    folder.mkdir(parents=True, exist_ok=True)
    head = f"{report.device}, {report.threads} threads, " + ", ".join(
        f"{name} {version}" for name, version in report.versions.items()
    )
    lines = [head, "", table(report.results), "", *(goal.judge(report) for goal in goals(device))]
    lines += [f"- left out, not installed: {', '.join(report.missing)}"] if report.missing else []
    lines += [f"- WRONG: {entry}" for entry in report.wrong]
    (folder / "bench_kernels.md").write_text("\n".join(lines) + "\n")
    (folder / "bench_kernels.json").write_text(json.dumps(asdict(report), indent=1))
    figure(report, folder / "bench_kernels.png")


def run(options: argparse.Namespace, device: str, report: Report) -> None:
    """All cases, the most important first, until the time is over."""
    cuda, rounds = device == "cuda", options.rounds or MEDIAN_ROUNDS[device]
    deadline = time.monotonic() + options.budget
    small = Case("clustered", 256, 64, 16) if options.tiny else SMALL
    for case in cases(device, options.quick, options.tiny, options.small):
        if time.monotonic() > deadline:
            report.missing.append(f"{case.name} (out of time)")
            continue
        data = make_data(case, device)
        report.wrong += check_search(data, case)
        measure(f"search {case.name}", search_methods(data, report.missing), rounds, cuda, report)
        if options.quick or (UNFUSED_ELEMENTS if cuda else 1 << 24) < case.N * case.K:
            continue
        if case == small:
            methods = quantizer_methods(case, device, report.missing)
            measure(f"quantizer {case.name}", methods, rounds, cuda, report)
        for codes in (False, True):
            name = f"usage, {'both gradients' if codes else 'rows alone'}, {case.name}"
            measure(name, usage_methods(data, codes), rounds, cuda, report)
        measure(f"sums {case.name}", sums_methods(data), rounds, cuda, report)
        if case == small:
            measure(f"beam {case.name}", beam_methods(data), rounds, cuda, report)
            measure(f"draw {case.name}", draw_methods(data), rounds, cuda, report)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own)")
    parser.add_argument("--rounds", type=int, help="timed rounds")
    parser.add_argument("--quick", action="store_true", help="the flagship case alone")
    parser.add_argument("--small", action="store_true", help="the case of 1,500 rows alone")
    parser.add_argument("--tiny", action="store_true", help="two cases of no size, to try it")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--tune", action="store_true", help="time every tile shape, keep the best")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder to write to")
    options = parser.parse_args()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    versions = {"torch": torch.__version__}
    report = Report(name, torch.get_num_threads(), versions)
    faiss = optional("faiss", report.missing)
    if faiss is not None:
        faiss.omp_set_num_threads(torch.get_num_threads())
        versions["faiss"] = faiss.__version__
    print(table([]))
    from b2t_kernels import tuning

    with tuning.measuring() if options.tune else contextlib.nullcontext():
        run(options, device, report)
    write(report, device, options.out)
    print("\n".join(goal.judge(report) for goal in goals(device)))
    for entry in report.wrong:
        print(f"WRONG: {entry}", file=sys.stderr)
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
