"""Time the kernels against torch, faiss, vector-quantize-pytorch and flash-kmeans.

    python scripts/bench_kernels.py                  # GPU where there is one, else CPU
    python scripts/bench_kernels.py --quick          # the flagship case alone
    python scripts/bench_kernels.py --device cpu --threads 2 --out results/

Each case first checks the answers (float64 brute force on up to 2048 rows; the exit status is 1 if
one is wrong), then times all methods in turn, round after round, and reports medians. Libraries
that are not installed are left out and named. Written to --out: bench_kernels.md, .json and .png.
"""

import argparse
import ctypes
import importlib
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

import b2t_kernels
from b2t_kernels import reference

CHECKED_ROWS = 2048
UNFUSED_ELEMENTS = 1 << 30
FLAGSHIP = {"cpu": (8192, 8192, 256), "cuda": (65_536, 8192, 256)}
SWEEP = {
    "cpu": [(2048, 1024, 64), (8192, 1024, 128), (8192, 256, 256)],
    "cuda": [
        (4096, 8192, 256),
        (65_536, 1024, 128),
        (65_536, 256, 64),
        (16_384, 8192, 128),
        (65_536, 256, 1024),
        (262_144, 1024, 256),
    ],
}
LAYERS = {"cpu": [(2048, 256, 64, 8)], "cuda": [(65_536, 256, 64, 8), (65_536, 8192, 128, 8)]}
MEDIAN_ROUNDS = {"cpu": 5, "cuda": 30}


@dataclass
class Result:
    """Median milliseconds of one method on one case, and its peak extra memory in MB."""

    case: str
    method: str
    milliseconds: float
    ratio: float = 0.0
    of_matrix_product: float | None = None
    peak_mb: float | None = None


@dataclass
class Report:
    """Everything a run found out."""

    device: str
    threads: int
    versions: dict[str, str]
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)


Methods = dict[str, Callable[[], Any]]


def optional(name: str, report: Report) -> Any:
    """The module, or None and a note in the report."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if name not in report.missing:
            report.missing.append(name)
            print(f"left out: {name} ({error})", file=sys.stderr)
        return None


def make_data(N: int, K: int, D: int, device: str) -> tuple[Tensor, Tensor]:
    """Codes, and rows scattered about them: what a trained encoder gives."""
    generator = torch.Generator().manual_seed(N + K + D)
    codebook = torch.randn(K, D, generator=generator)
    near = codebook[torch.randint(K, (N,), generator=generator)]
    x = near + 0.7 * torch.randn(N, D, generator=generator)
    dtype = torch.float16 if device == "cuda" else torch.float32
    return x.to(device, dtype), codebook.to(device)


def check_search(x: Tensor, codebook: Tensor, case: str, report: Report) -> None:
    """Hold fast and exact against float64; fast may take a code barely farther than the nearest."""
    rows = x[:CHECKED_ROWS].double()
    wide = codebook.double()
    distances = torch.cat(
        [
            torch.cdist(part, wide, compute_mode="donot_use_mm_for_euclid_dist")
            for part in rows.split(128)
        ]
    )
    least, truth = distances.min(dim=1)
    for precision in ("fast", "exact"):
        indices, counts = b2t_kernels.nearest_code(x, codebook, precision=precision)
        chosen = distances.gather(1, indices[:CHECKED_ROWS, None])[:, 0]
        excess = float(((chosen - least) / least.clamp(min=1e-9)).max())
        if not torch.equal(counts, torch.bincount(indices, minlength=codebook.shape[0])):
            report.wrong.append(f"{case} {precision}: counts do not fit the indices")
        if excess > (1e-12 if precision == "exact" else 5e-3):
            report.wrong.append(f"{case} {precision}: a distance is {excess:.2e} too large")
        if precision == "exact" and not torch.equal(indices[:CHECKED_ROWS], truth):
            report.wrong.append(f"{case} exact: indices differ from float64")


def _blocked(x: Tensor, codebook: Tensor, bias: Tensor) -> Tensor:
    step = max(512, (1 << 26) // codebook.shape[0]) if x.is_cuda else 512
    parts = [torch.addmm(bias, part, codebook.T).argmax(dim=1) for part in x.split(step)]
    return torch.bincount(torch.cat(parts), minlength=codebook.shape[0])


def search_methods(x: Tensor, codebook: Tensor, report: Report) -> Methods:
    """Everything that finds the nearest codes of x."""
    K, D = codebook.shape
    same = codebook.to(x.dtype)
    bias = (-0.5 * codebook.square().sum(dim=1)).to(x.dtype)
    methods: Methods = {
        "ours fast": lambda: b2t_kernels.nearest_code(x, codebook),
        "ours exact": lambda: b2t_kernels.nearest_code(x, codebook, precision="exact"),
        "matrix product": lambda: [part @ same.T for part in x.split(1 << 16)],
        "addmm + argmin, blocked": lambda: _blocked(x, same, bias),
    }
    if x.is_cuda:
        methods["ours fast, no counts"] = lambda: _without_counts(x, codebook)
    if x.shape[0] * K <= UNFUSED_ELEMENTS:
        # cdist has no half-precision kernel on a GPU: it gets the type it needs.
        wide, codes = x.float(), codebook.float()
        methods["cdist + argmin + bincount"] = lambda: torch.bincount(
            torch.cdist(wide, codes).argmin(dim=1), minlength=K
        )
        methods["unfused torch, same type"] = lambda: torch.bincount(
            torch.addmm(bias, x, same.T).argmax(dim=1), minlength=K
        )
        peer = optional("vector_quantize_pytorch", report)
        if peer is not None:
            quantizer = peer.VectorQuantize(dim=D, codebook_size=K).to(x.device).eval()
            quantizer._codebook.embed.data.copy_(codes[None])
            methods["vector-quantize-pytorch (eval)"] = lambda: quantizer(wide[None])
    faiss = optional("faiss", report)
    if faiss is not None and not x.is_cuda:
        index = faiss.IndexFlatL2(D)
        index.add(codebook.numpy())
        methods["faiss IndexFlatL2"] = lambda: index.search(x.numpy(), 1)
    flash = optional("flash_kmeans.assign_euclid_triton", report) if x.is_cuda else None
    if flash is not None:
        methods["flash-kmeans"] = _flash_method(flash, x, same)
    return methods


def _flash_method(flash: Any, x: Tensor, codebook: Tensor) -> Callable[[], Any]:
    assign = flash.euclid_assign_triton
    extra = {}
    if "x_sq" in inspect.signature(assign).parameters:
        extra["x_sq"] = x.float().square().sum(dim=1)[None]
    return lambda: assign(x[None], codebook[None], **extra)


def _without_counts(x: Tensor, codebook: Tensor) -> Any:
    from b2t_kernels import nearest, prepare

    return nearest.search(x, codebook, prepare.prepare(codebook), None, False, count=False)


def usage_methods(x: Tensor, codebook: Tensor) -> Methods:
    """Soft assignment forward and backward."""
    rows = x.clone().requires_grad_()
    codes = codebook.to(x.dtype).clone().requires_grad_()
    master = codebook.clone().requires_grad_()
    scale = float(x.shape[1])

    def ours() -> None:
        usage = b2t_kernels.code_usage(rows, master, scale)
        torch.autograd.grad(usage.square().sum(), (rows, master))

    def naive() -> None:
        logits = 2 * rows @ codes.T - codes.square().sum(dim=1)
        usage = (logits.float() / scale).softmax(dim=1).mean(dim=0)
        torch.autograd.grad(usage.square().sum(), (rows, codes))

    return {"ours": ours, "unfused torch": naive}


def sums_methods(x: Tensor, K: int) -> Methods:
    """Sums of rows by code."""
    indices = torch.randint(K, x.shape[:1], generator=torch.Generator().manual_seed(1))
    indices = indices.to(x.device)
    wide = x.float()
    empty = torch.zeros(K, x.shape[1], device=x.device)
    return {
        "ours sorted": lambda: b2t_kernels.code_sums(x, indices, K),
        "ours atomic": lambda: b2t_kernels.code_sums(x, indices, K, method="atomic"),
        "index_add": lambda: empty.index_add(0, indices, wide),
    }


def layer_methods(x: Tensor, codebooks: Tensor) -> Methods:
    """Residual layers."""
    same = codebooks.to(x.dtype)
    biases = (-0.5 * codebooks.square().sum(dim=2)).to(x.dtype)

    def unfused() -> None:
        residual = x
        for codebook, bias in zip(same, biases, strict=True):
            indices = torch.addmm(bias, residual, codebook.T).argmax(dim=1)
            torch.bincount(indices, minlength=codebook.shape[0])
            residual = residual - codebook[indices]

    methods: Methods = {
        "ours": lambda: b2t_kernels.rvq_encode(x, codebooks),
        "unfused torch": unfused,
    }
    if x.is_cuda:
        from b2t_kernels import rvq

        methods["ours, layer by layer"] = lambda: rvq.rvq_encode(
            x, codebooks, None, False, fused=False
        )
    return methods


def seconds(method: Callable[[], Any], cuda: bool) -> float:
    """One run, the device idle before and after."""
    if cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        method()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    method()
    return time.perf_counter() - start


def peak_memory(method: Callable[[], Any], cuda: bool) -> float | None:
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
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    method()
    return (_status("VmHWM") - before) / 1e3


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[1])


def measure(case: str, methods: Methods, rounds: int, cuda: bool, report: Report) -> None:
    """Warm up, then time every method once a round; a slow one (over 2 s) three times at most."""
    times: dict[str, list[float]] = {}
    for name, method in methods.items():
        method()
        first = seconds(method, cuda)
        times[name] = []
        for _ in range(2 if cuda and first < 0.2 else 0):
            method()
    for turn in range(rounds):
        for name, method in methods.items():
            if turn < 3 or sum(times[name]) < 2.0:
                times[name].append(seconds(method, cuda))
    medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    ours = medians[next(iter(methods))]
    product = medians.get("matrix product")
    for name, method in methods.items():
        report.results.append(
            Result(
                case,
                name,
                round(medians[name], 4),
                round(medians[name] / ours, 3),
                round(product / medians[name], 3) if product else None,
                peak_memory(method, cuda),
            )
        )
        print(table(report.results[-1:]).splitlines()[-1], flush=True)


def table(results: list[Result]) -> str:
    """Results as a Markdown table."""
    rows = [
        "| case | method | median ms | × ours | fraction of the matrix product | peak MB |",
        "|---" * 6 + "|",
    ]
    for result in results:
        fraction = "" if result.of_matrix_product is None else f"{result.of_matrix_product:.0%}"
        peak = "unknown" if result.peak_mb is None else f"{result.peak_mb:.1f}"
        rows.append(
            f"| {result.case} | {result.method} | {result.milliseconds:.3f} | {result.ratio:.2f} | "
            f"{fraction} | {peak} |"
        )
    return "\n".join(rows)


def goals(report: Report, device: str) -> list[str]:
    """The goals of kernels/RESULTS.md beside what this run measured."""
    N, K, D = FLAGSHIP[device]
    case = f"search {N} × {K} × {D}"
    found = {result.method: result for result in report.results if result.case == case}
    if "ours fast" not in found:
        return []
    ours = found["ours fast"].milliseconds

    def line(
        text: str, other: str, bound: float, inverse: bool = False, upper: bool = False
    ) -> str:
        if other not in found:
            return f"- {text}: not measured ({other} is missing)"
        ratio = found[other].milliseconds / ours
        ratio = 1 / ratio if inverse else ratio
        met = ratio <= bound if inverse or upper else ratio >= bound
        return f"- {text}: {ratio:.3f} ({'met' if met else 'missed'})"

    if device == "cpu":
        return [
            line("time over faiss IndexFlatL2, at most 1.2", "faiss IndexFlatL2", 1.2, True),
            line(
                "faster than vector-quantize-pytorch, at least 5 ×",
                "vector-quantize-pytorch (eval)",
                5,
            ),
        ]
    share = 0.6 if torch.cuda.get_device_capability()[0] >= 9 else 0.7
    return [
        line("faster than unfused torch, at least 5 ×", "unfused torch, same type", 5),
        line(f"fraction of the matrix product, at least {share}", "matrix product", share),
        line("time over the same without counts, at most 1.02", "ours fast, no counts", 1.02, True),
        line("faster than flash-kmeans, at least 1 ×", "flash-kmeans", 1),
        line("time of exact over fast, at most 1.15", "ours exact", 1.15, upper=True),
    ]


def figure(report: Report, path: Path) -> None:
    """Bars of time relative to ours, one group for each case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(result.case for result in report.results))
    drawn, axes = plt.subplots(
        len(cases), 1, figsize=(8, 0.6 + 0.34 * len(report.results)), squeeze=False
    )
    for axis, case in zip(axes[:, 0], cases, strict=True):
        chosen = [result for result in report.results if result.case == case][::-1]
        colours = ["C0" if result.method.startswith("ours") else "0.7" for result in chosen]
        bars = axis.barh(
            [result.method for result in chosen], [r.ratio for r in chosen], color=colours
        )
        axis.bar_label(bars, [f"{r.milliseconds:.3g} ms" for r in chosen], padding=3, fontsize=7)
        axis.set_title(case, fontsize=8, loc="left")
        axis.tick_params(labelsize=7)
        axis.margins(x=0.2)
    axes[-1, 0].set_xlabel("time relative to ours")
    drawn.suptitle(report.device, fontsize=9)
    drawn.tight_layout()
    drawn.savefig(path, dpi=120)


def write(report: Report, device: str, folder: Path) -> None:
    """The table, the JSON and the figure."""
    folder.mkdir(parents=True, exist_ok=True)
    head = f"{report.device}, {report.threads} threads, " + ", ".join(
        f"{name} {version}" for name, version in report.versions.items()
    )
    lines = [head, "", table(report.results), "", *goals(report, device)]
    lines += [f"- left out, not installed: {', '.join(report.missing)}"] if report.missing else []
    lines += [f"- WRONG: {entry}" for entry in report.wrong]
    (folder / "bench_kernels.md").write_text("\n".join(lines) + "\n")
    (folder / "bench_kernels.json").write_text(json.dumps(asdict(report), indent=1))
    figure(report, folder / "bench_kernels.png")


def run(device: str, quick: bool, rounds: int, report: Report) -> None:
    """All cases."""
    cuda = device == "cuda"
    for sizes in [FLAGSHIP[device], *([] if quick else SWEEP[device])]:
        x, codebook = make_data(*sizes, device)
        name = "{} × {} × {}".format(*sizes)
        check_search(x, codebook, name, report)
        methods = search_methods(x, codebook, report)
        measure(f"search {name}", methods, rounds, cuda, report)
        if not quick and sizes[0] * sizes[1] <= (UNFUSED_ELEMENTS if cuda else 1 << 24):
            measure(f"usage {name}", usage_methods(x, codebook), rounds, cuda, report)
        if not quick:
            measure(f"sums {name}", sums_methods(x, sizes[1]), rounds, cuda, report)
    for N, K, D, Q in [] if quick else LAYERS[device]:
        x, codebook = make_data(N, K, D, device)
        codebooks = torch.stack([codebook / 2**layer for layer in range(Q)])
        rows = min(N, 512)
        found = b2t_kernels.rvq_encode(x[:rows], codebooks, precision="exact")[0]
        if not torch.equal(found, reference.rvq_encode(x[:rows], codebooks)[0]):
            report.wrong.append(f"rvq {N} × {K} × {D}, {Q} layers: codes differ from float64")
        measure(
            f"rvq {N} × {K} × {D}, {Q} layers", layer_methods(x, codebooks), rounds, cuda, report
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own)")
    parser.add_argument("--rounds", type=int, help="timed rounds")
    parser.add_argument("--quick", action="store_true", help="the flagship case alone")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder to write to")
    options = parser.parse_args()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    versions = {"torch": torch.__version__}
    report = Report(name, torch.get_num_threads(), versions)
    faiss = optional("faiss", report)
    if faiss is not None:
        faiss.omp_set_num_threads(torch.get_num_threads())
        versions["faiss"] = faiss.__version__
    print(table([]))
    run(device, options.quick, options.rounds or MEDIAN_ROUNDS[device], report)
    write(report, device, options.out)
    print("\n".join(goals(report, device)))
    for entry in report.wrong:
        print(f"WRONG: {entry}", file=sys.stderr)
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
