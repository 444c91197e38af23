"""A model of the kernels' speed: floors by operations and bytes, and the compiled code's own count.

    python scripts/kernel_roofline.py                       # N = 65,536, K = 8192, D = 256
    python scripts/kernel_roofline.py --N 1500 --K 1024 --D 64 --chip A5500
    python scripts/kernel_roofline.py --reports resources.json --write    # and kernels/RESULTS.md

No GPU is needed and nothing is measured: chip figures are the vendor's datasheet rates, so the
times are lower bounds and predictions, to be held against scripts/bench_kernels.py. For the
preferred configuration of each kernel, cycles per tile on one multiprocessor:

    tensor     multiply-adds of the tile / dense fp16 rate with float32 accumulation
    shared     bytes between shared memory and registers / 128 a cycle (sm_90 reads operands of
               its tensor cores from shared memory itself: not counted)
    issue      all other instructions of the loop × warps / 4 a cycle

    share of peak, from    tensor / (the greater of tensor and shared + issue): nothing overlaps
                  to       tensor / the greatest of the three: everything does

Blocks that do not fill the multiprocessors lower both ("filled"). A whole search also reads and
writes 4·N·D + 4·K·D + 6·N·D′ + 16·N bytes; unfused torch writes N × K float32 once, reads it once
more for −2x·c + |c|² and writes it, and reads it again for the argmin.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

BEGIN, END = "<!-- roofline: begin -->", "<!-- roofline: end -->"


@dataclass(frozen=True)
class Chip:
    """Datasheet rates: dense fp16 TFLOP/s (float32 accumulation), GB/s, multiprocessors, GHz."""

    architecture: int
    teraflops: float
    bandwidth: float
    multiprocessors: int
    clock: float

    @property
    def products_per_cycle(self) -> float:
        """Multiply-adds of one multiprocessor."""
        return self.teraflops * 1e3 / 2 / self.multiprocessors / self.clock


CHIPS = {
    "A5500": Chip(86, 136.4, 768.0, 80, 1.665),
    "A100": Chip(80, 312.0, 1555.0, 108, 1.410),
    "H100": Chip(90, 989.4, 3350.0, 132, 1.830),
}
WARP_INSTRUCTIONS_PER_CYCLE = 4
SHARED_BYTES_PER_CYCLE = 128
PRODUCTS = {"row_gradient_kernel": 2, "code_gradient_kernel": 2}


@dataclass(frozen=True)
class Prediction:
    """Cycles of one tile, and what part of the tensor cores' rate they leave."""

    kernel: str
    variant: str
    tile: str
    instructions_per_score: float
    tensor: float
    shared: float
    issue: float
    filled: float

    @property
    def least(self) -> float:
        """Share of peak where nothing hides behind anything."""
        return self.filled * self.tensor / (max(self.tensor, self.shared) + self.issue)

    @property
    def most(self) -> float:
        """Share of peak where everything does."""
        return self.filled * self.tensor / max(self.tensor, self.shared, self.issue)


def predict(report: dict[str, Any], chip: Chip, N: int, K: int) -> Prediction:
    """Model one compiled kernel, of ``kernel_resources``, on one chip."""
    rows, codes, width = (int(part) for part in report["tile"].split(" × "))
    products = PRODUCTS.get(report["kernel"], 1)
    warps = report["warps"]
    shared = 0 if report["architecture"] >= 90 else report["shared_bytes_per_tile"] * products
    other = report["other_instructions_per_tile"] * products
    return Prediction(
        report["kernel"],
        report["variant"],
        report["tile"],
        other * warps * 32 / (rows * codes),
        products * rows * codes * width / chip.products_per_cycle,
        shared / SHARED_BYTES_PER_CYCLE,
        other * warps / WARP_INSTRUCTIONS_PER_CYCLE,
        filled(report, chip, N, K, rows, codes),
    )


def filled(report: dict[str, Any], chip: Chip, N: int, K: int, rows: int, codes: int) -> float:
    """Part of the multiprocessors that work on average over all waves of blocks."""
    if report["kernel"] in ("column_kernel", "code_gradient_kernel"):
        tiles = math.ceil(K / codes)
        splits = min(16, max(1, 2 * chip.multiprocessors // tiles), math.ceil(N / 256))
    else:
        tiles = math.ceil(N / rows)
        splits = min(16, max(1, chip.multiprocessors // tiles), max(1, K // codes // 4))
    blocks = tiles * splits
    return blocks / (math.ceil(blocks / chip.multiprocessors) * chip.multiprocessors)


def preferred(reports: list[dict[str, Any]], architecture: int, D: int) -> list[dict[str, Any]]:
    """The first configuration of every kernel and variant."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for report in reports:
        if report["tensor_core"] and (report["architecture"], report["D"]) == (architecture, D):
            found.setdefault((report["kernel"], report["variant"]), report)
    return list(found.values())


def search_milliseconds(found: Prediction, chip: Chip, N: int, K: int, D: int) -> tuple:
    """Predicted search: least and most time, and unfused torch's, in ms."""
    from b2t_kernels.prepare import padded_codes, padded_width

    width = padded_width(D)
    products = 2 * N * padded_codes(K) * width / (chip.teraflops * 1e9)
    moved = (4 * N * D + 4 * K * D + 6 * N * width + 16 * N) / (chip.bandwidth * 1e6)
    matrix = 4 * N * K / (chip.bandwidth * 1e6)
    unfused = 2 * N * K * D / (chip.teraflops * 1e9) + 4 * matrix
    return products / found.most + moved, products / found.least + moved, unfused


def compiled(chips: list[str], D: int) -> list[dict[str, Any]]:
    """Reports of all tensor-core kernels, compiled now."""
    import kernel_resources

    from b2t_kernels import tuning

    architectures = {CHIPS[name].architecture for name in chips}
    jobs = list(kernel_resources.jobs(set(tuning.KERNELS), architectures, {D}))
    return [asdict(report) for report in kernel_resources.report_all(jobs, 2)]


def table(reports: list[dict[str, Any]], chips: list[str], N: int, K: int, D: int) -> str:
    """Predictions as a Markdown table, and the search against unfused torch below it."""
    rows = [
        f"N = {N:,}, K = {K:,}, D = {D}; predicted, not measured.",
        "",
        "| chip | kernel | tile N × K × D | other instructions per score | "
        "cycles per tile: tensor, shared, issue | filled | share of peak |",
        "|---" * 7 + "|",
    ]
    totals = []
    for name in chips:
        chip = CHIPS[name]
        for report in preferred(reports, chip.architecture, D):
            found = predict(report, chip, N, K)
            rows.append(
                f"| {name} | {found.kernel} {found.variant} | {found.tile} | "
                f"{found.instructions_per_score:.1f} | {found.tensor:.0f}, {found.shared:.0f}, "
                f"{found.issue:.0f} | {found.filled:.0%} | {found.least:.0%} to {found.most:.0%} |"
            )
            if (found.kernel, found.variant) == ("scan_kernel", "exact"):
                least, most, unfused = search_milliseconds(found, chip, N, K, D)
                totals.append(
                    f"- {name}: exact search {least:.3f} to {most:.3f} ms, unfused torch in half "
                    f"precision at least {unfused:.3f} ms ({unfused / most:.1f} to "
                    f"{unfused / least:.1f} ×)"
                )
    return "\n".join([*rows, "", *totals])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--N", type=int, default=65_536, help="rows")
    parser.add_argument("--K", type=int, default=8192, help="codes")
    parser.add_argument("--D", type=int, default=256, help="width")
    parser.add_argument("--chip", nargs="+", default=list(CHIPS), choices=CHIPS)
    parser.add_argument("--reports", type=Path, help="--json of scripts/kernel_resources.py")
    parser.add_argument("--write", action="store_true", help="update kernels/RESULTS.md")
    options = parser.parse_args()
    if options.reports:
        reports = json.loads(options.reports.read_text())
    else:
        reports = compiled(options.chip, options.D)
    text = table(reports, options.chip, options.N, options.K, options.D)
    print(text)
    if options.write:
        from kernel_resources import RESULTS, write_between_markers

        write_between_markers(RESULTS, text, BEGIN, END)


if __name__ == "__main__":
    main()
