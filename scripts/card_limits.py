"""What this device reaches at best: matrix products, copies, and how soon the host starts work.

    python scripts/card_limits.py                # the GPU where there is one, else the CPU
    python scripts/card_limits.py --size 1024    # smaller products

Products are of random square matrices, the mean of a few after a warm-up; a copy counts the bytes
read and those written; a launch is the host's time for one small `index_add`, the median. They
stand beside what `b2t plan` assumes (docs/SCALING.md). Prints one JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch


def seconds(work: Callable[[], object], device: str, times: int) -> float:
    """Mean time of ``work`` on the device, which is given all of it before anybody waits."""
    for _ in range(2):
        work()
    wait(device)
    began = time.perf_counter()
    for _ in range(times):
        work()
    wait(device)
    return (time.perf_counter() - began) / times


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def products(device: str, size: int) -> dict[str, float]:
    """TFLOP/s of size³ matrix products by type."""
    kinds = [torch.float16, torch.bfloat16, torch.float32] if device == "cuda" else [torch.float32]
    left, right = torch.randn(2, size, size, device=device)
    found = {}
    for kind in kinds:
        a, b = left.to(kind), right.to(kind)
        took = seconds(lambda a=a, b=b: a @ b, device, 10)
        found[str(kind).removeprefix("torch.")] = round(2 * size**3 / took / 1e12, 3)
    return found


def copies(device: str, megabytes: int) -> dict[str, float]:
    """GB/s of a copy within the device's memory, and of pinned memory to it."""
    here = torch.ones(megabytes << 20, dtype=torch.uint8, device=device)
    there = torch.empty_like(here)
    took = seconds(lambda: there.copy_(here), device, 10)
    found = {"within": round(2 * here.numel() / took / 1e9, 2)}
    if device == "cuda":
        pinned = torch.ones(megabytes << 18, dtype=torch.uint8).pin_memory()
        target = there[: pinned.numel()]
        took = seconds(lambda: target.copy_(pinned, non_blocking=True), device, 5)
        found["pinned to device"] = round(pinned.numel() / took / 1e9, 2)
    return found


def launch(device: str) -> float:
    """Microseconds of the host for one `index_add` of 1,500 rows."""
    rows = torch.randn(1500, 64, device=device)
    index = torch.randint(0, 1024, (1500,), device=device)
    sums, times = torch.zeros(1024, 64, device=device), []
    for _ in range(200):
        wait(device)
        began = time.perf_counter()
        sums.index_add_(0, index, rows)
        times.append(time.perf_counter() - began)
    return round(1e6 * statistics.median(times), 1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--size", type=int, help="rows of a product (default: 8192, CPU 1024)")
    parser.add_argument("--megabytes", type=int, help="of a copy (default: 2048, CPU 256)")
    options = parser.parse_args(argv)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device == "cuda"
    found = {
        "device": torch.cuda.get_device_name() if gpu else "CPU",
        "product, TFLOP/s": products(device, options.size or (8192 if gpu else 1024)),
        "copy, GB/s": copies(device, options.megabytes or (2048 if gpu else 256)),
        "launch, µs": launch(device),
    }
    print(json.dumps(found, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
