"""Speed and memory of the residual quantizer on the CPU, at the sizes of the mission.

    python scripts/bench_quantizer.py
    python scripts/bench_quantizer.py --repeats 30 --threads 2

**Speed.** Forward in training mode plus codebook update, one layer, N frames = K codes = 8192,
width 256, of `b2t.quantize.ResidualVQ` and of vector-quantize-pytorch's `VectorQuantize`, whose
forward in training updates. Both start from the same codes, see the same frames without a mask,
and compute their commitment loss; turn by turn in one process, ratio of the medians of processor
time, which other programs on the machine change less than wall time. Ours is timed again with the
diversity and perplexity losses, which the peer has not. Ours revives every fifth update, which the
means include and the medians do not. No backward pass.

**Memory.** Greatest anonymous resident memory over that held before, in a fresh process
(`--memory`), for N = 65,536: forward, backward of all three losses, update. A thread reads it every
millisecond; the baseline is taken once the input, the quantizer and one small call exist. Pages of
files are left out: the kernel drops and reads them as it likes; blocks over 1 MB go back to it when
freed (MALLOC_MMAP_THRESHOLD_), as glibc keeps up to some 30 MB otherwise, now more, now less.
The figure includes, beside temporaries, the quantized output and the input's gradient, N × 256
float32 (67 MB) each.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from b2t.quantize import ResidualVQ

MEMORY_TARGET = 250e6
SPEED_TARGET = 6.0
ALL_LOSSES_TARGET = 3.5
LABELS = {
    "ours": "b2t, commitment loss",
    "peer": "vector-quantize-pytorch",
    "ours_all_losses": "b2t, with both regularisers",
}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--codes", type=int, default=8192, help="K (default: 8192)")
    parser.add_argument("--dim", type=int, default=256, help="D (default: 256)")
    parser.add_argument("--frames", type=int, default=8192, help="N for speed (default: 8192)")
    parser.add_argument("--memory-frames", type=int, default=65_536, help="N for memory")
    parser.add_argument("--repeats", type=int, default=15, help="timed turns (default: 15)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default: 1)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--memory", action="store_true", help="measure memory only, print JSON")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    if options.memory:
        print(json.dumps(extra_memory(options.memory_frames, options.codes, options.dim)))
        return 0
    found = {
        "threads": options.threads,
        "frames": options.frames,
        "codes": options.codes,
        "dim": options.dim,
        **speed(options.frames, options.codes, options.dim, options.repeats),
        "memory_frames": options.memory_frames,
        **memory_of_fresh_process(options),
    }
    print(describe(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return 0


def started_quantizer(codes: Tensor) -> ResidualVQ:
    """Return a quantizer of one layer in training, started from ``codes`` [K, D]."""
    K, D = codes.shape
    quantizer = ResidualVQ(dim=D, codebook_size=K, num_quantizers=1)
    # Frames and codes drawn from N(0, 1): the nearest of many is a little nearer than 2·D.
    error = torch.tensor(1.5 * D)
    quantizer.codebooks.start_layer(0, codes, torch.ones(K), torch.tensor(1.0), error)
    quantizer.codebooks.initialized.fill_(1)
    return quantizer.train()


def speed(frames: int, codes: int, dim: int, repeats: int) -> dict[str, Any]:
    """Time both in turns; seconds are medians."""
    from vector_quantize_pytorch import VectorQuantize

    generator = torch.Generator().manual_seed(0)
    book = torch.randn(codes, dim, generator=generator)
    ours, all_losses = started_quantizer(book), started_quantizer(book)
    peer = VectorQuantize(dim=dim, codebook_size=codes, codebook_dim=dim).train()
    peer._codebook.embed.data.copy_(book[None])
    peer._codebook.embed_avg.data.copy_(book[None])

    def update(quantizer: ResidualVQ, x: Tensor, losses: tuple[str, ...]) -> None:
        output = quantizer(x, losses=losses)
        quantizer.update(output.stats)

    every = ("commitment", "diversity", "perplexity")
    runs: dict[str, Callable[[Tensor], Any]] = {
        "ours": lambda x: update(ours, x, ("commitment",)),
        "peer": peer,
        "ours_all_losses": lambda x: update(all_losses, x, every),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 2):
        x = torch.randn(1, frames, dim, generator=generator).requires_grad_()
        for name, run in runs.items():
            started = time.process_time()
            run(x)
            if turn >= 2:
                seconds[name].append(time.process_time() - started)
    found: dict[str, Any] = {"repeats": repeats}
    for name, values in seconds.items():
        found[f"{name}_s"] = float(np.median(values))
        found[f"{name}_mean_s"] = float(np.mean(values))
        found[f"{name}_quartiles_s"] = np.percentile(values, [25, 75]).tolist()
    pairs = np.array(seconds["peer"]) / np.array(seconds["ours"])
    found["ratio"] = found["peer_s"] / found["ours_s"]
    found["ratio_quartiles"] = np.percentile(pairs, [25, 75]).tolist()
    found["ratio_all_losses"] = found["peer_s"] / found["ours_all_losses_s"]
    return found


def extra_memory(frames: int, codes: int, dim: int) -> dict[str, float]:
    """Peak resident bytes of forward, backward and update over those held before."""
    generator = torch.Generator().manual_seed(0)
    quantizer = started_quantizer(torch.randn(codes, dim, generator=generator))
    x = torch.randn(1, frames, dim, generator=generator).requires_grad_()
    _step(quantizer, x.detach()[:, :64].clone().requires_grad_())
    before = _anonymous()
    peak, stop = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(1e-3):
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    _step(quantizer, x)
    stop.set()
    watcher.join()
    return {"memory_before": before, "memory_extra": peak - before}


def _step(quantizer: ResidualVQ, x: Tensor) -> None:
    output = quantizer(x)
    torch.stack(list(output.losses.values())).sum().backward()
    quantizer.update(output.stats)


def _anonymous() -> float:
    """Anonymous resident bytes of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def memory_of_fresh_process(options: argparse.Namespace) -> dict[str, float]:
    """Run `--memory` in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--memory"]
    for name in ("memory_frames", "codes", "dim", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def describe(found: dict[str, Any]) -> str:
    """Put the numbers in words, with the targets."""
    low, high = found["ratio_quartiles"]
    extra = found["memory_extra"]
    reached = found["ratio"] >= SPEED_TARGET and found["ratio_all_losses"] >= ALL_LOSSES_TARGET
    return "\n".join(
        [
            f"N = {found['frames']}, K = {found['codes']}, D = {found['dim']}, one layer, training,"
            f" {found['threads']} thread(s), {found['repeats']} turns, medians (means)",
            *(
                f"{label:28}{1e3 * found[f'{name}_s']:8.1f} ms "
                f"({1e3 * found[f'{name}_mean_s']:.1f})"
                for name, label in LABELS.items()
            ),
            f"peer over ours {found['ratio']:.2f} × (quartiles of pairs {low:.2f} – {high:.2f}), "
            f"with both regularisers {found['ratio_all_losses']:.2f} ×; targets ≥ "
            f"{SPEED_TARGET:g} and {ALL_LOSSES_TARGET:g} ×: {'reached' if reached else 'MISSED'}",
            f"N = {found['memory_frames']}: forward, backward and update take {extra / 1e6:.0f} MB "
            f"more than the {found['memory_before'] / 1e6:.0f} MB held before; target < "
            f"{MEMORY_TARGET / 1e6:g} MB: {'reached' if extra < MEMORY_TARGET else 'MISSED'}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
