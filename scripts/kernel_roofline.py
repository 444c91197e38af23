"""A model of the search's time: floors by operations and bytes, and the compiled code's own count.

    python scripts/kernel_roofline.py                       # N = 65,536, K = 8192, D = 256
    python scripts/kernel_roofline.py --N 8000 --K 1024 --D 128 --chip A5500

No GPU is needed and nothing is measured: chip figures are the vendor's datasheet rates, so the
times are lower bounds and predictions, to be held against scripts/bench_kernels.py. The method:

    operations floor   2·N·K·D / dense fp16 rate with float32 accumulation
    bytes floor        (4·N·D + 4·K·D + 8·N + 8·K) / memory bandwidth
    ours               max(floors, issue) with issue = instructions of the compiled inner loop
                       × tiles / (4 warp instructions per cycle and multiprocessor × clock),
                       tensor instructions counted at their own rate and not as issue slots;
                       and the sum of tensor and issue time as the other end (no overlap)
    unfused torch      matrix product + N × K float32 written once, read once more for
                       −2x·c + |c|² and again for the argmin, + N indices counted
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))


@dataclass(frozen=True)
class Chip:
    """Datasheet rates: dense fp16 TFLOP/s (float32 accumulation), GB/s, multiprocessors, GHz."""

    architecture: int
    teraflops: float
    bandwidth: float
    multiprocessors: int
    clock: float


CHIPS = {
    "A5500": Chip(86, 136.4, 768.0, 80, 1.665),
    "A100": Chip(80, 312.0, 1555.0, 108, 1.410),
    "H100": Chip(90, 989.4, 3350.0, 132, 1.830),
}
WARP_INSTRUCTIONS_PER_CYCLE = 4


@dataclass(frozen=True)
class Prediction:
    """Milliseconds, and instructions per tile of the best configuration."""

    operations: float
    bytes: float
    issue: float
    unfused: float
    tile: str
    tensor_instructions: float
    other_instructions: float

    @property
    def overlapped(self) -> float:
        """Ours, if the epilogue hides behind the tensor cores."""
        return max(self.operations, self.bytes, self.issue)

    @property
    def serial(self) -> float:
        """Ours, if it does not."""
        return max(self.bytes, self.operations + self.issue)


def predict(chip: Chip, N: int, K: int, D: int) -> Prediction:
    """Model one search on one chip, compiling its configurations."""
    import kernel_resources

    from b2t_kernels.prepare import padded_codes, padded_width

    jobs = kernel_resources.jobs({"nearest_kernel"}, {chip.architecture}, {D})
    reports = [kernel_resources.compile_job(job) for job in jobs if job.variant == "fast"]
    operations = 2 * N * padded_codes(K) * padded_width(D)
    seconds = operations / (chip.teraflops * 1e12)
    moved = 4 * N * D + 4 * K * D + 8 * N + 8 * K
    slots = WARP_INSTRUCTIONS_PER_CYCLE * chip.multiprocessors * chip.clock * 1e9

    def issue(report: kernel_resources.Report) -> float:
        rows, codes, width = (int(part) for part in report.tile.split(" × "))
        tiles = -(-N // rows) * (padded_codes(K) / codes) * (padded_width(D) / width)
        return tiles * report.other_instructions_per_tile * report.warps / slots

    best = min(reports, key=issue)
    matrix = 4 * N * K
    unfused = 2 * N * K * D / (chip.teraflops * 1e12) + 4 * matrix / (chip.bandwidth * 1e9)
    return Prediction(
        seconds * 1e3,
        moved / (chip.bandwidth * 1e9) * 1e3,
        issue(best) * 1e3,
        unfused * 1e3,
        best.tile,
        best.tensor_instructions_per_tile,
        best.other_instructions_per_tile,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--N", type=int, default=65_536, help="rows")
    parser.add_argument("--K", type=int, default=8192, help="codes")
    parser.add_argument("--D", type=int, default=256, help="width")
    parser.add_argument("--chip", nargs="+", default=list(CHIPS), choices=CHIPS)
    options = parser.parse_args()
    sizes = (options.N, options.K, options.D)
    print("N = {:,}, K = {:,}, D = {:,}; predicted milliseconds, not measured".format(*sizes))
    print(
        "| chip | operations floor | bytes floor | instructions per tile: tensor, other "
        "(warp instructions per warp) | issue | ours, overlapped to serial | unfused torch | "
        "ratio |"
    )
    print("|---" * 8 + "|")
    for name in options.chip:
        found = predict(CHIPS[name], *sizes)
        print(
            f"| {name} | {found.operations:.3f} | {found.bytes:.3f} | {found.tile}: "
            f"{found.tensor_instructions:g}, {found.other_instructions:g} | {found.issue:.3f} | "
            f"{found.overlapped:.3f} to {found.serial:.3f} | {found.unfused:.3f} | "
            f"{found.unfused / found.serial:.1f} to {found.unfused / found.overlapped:.1f} |"
        )


if __name__ == "__main__":
    main()
