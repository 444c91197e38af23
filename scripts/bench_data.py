"""What data cost, as ratios within one run: reading batches, memory, the wait of a step.

    scripts/bench_data.py                                 # batches, memory
    scripts/bench_data.py --wait data/demo/prepared       # also the share of a training step

Recordings are noise in the layout of Brain-to-Text '25, written for the purpose and removed. Times
are processor seconds, the least of `--repeats`, on files in the page cache.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from b2t.data.batches import BatchPlan, train_batches
from b2t.data.dataset import load_trials
from b2t.data.prepare import PrepareOptions, prepare
from b2t.data.sources import detect
from b2t.data.trials import read_signal, signal_lengths
from b2t.log import quiet_libraries

MIB = 1 << 20


def arguments() -> argparse.Namespace:
    """Options of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=360, help="in the recordings (360)")
    parser.add_argument("--channels", type=int, default=512, help="of them (512)")
    parser.add_argument("--repeats", type=int, default=5, help="of each time (5)")
    parser.add_argument("--limit", type=int, default=28, help="MiB that training may grow by (28)")
    parser.add_argument("--wait", metavar="DATASET", help="time the steps of preset demo on it")
    parser.add_argument("--steps", type=int, default=60, help="of --wait (60)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--grow-on", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measure, print one line for each ratio."""
    options = arguments()
    quiet_libraries()
    torch.set_num_threads(1)
    if options.grow_on:
        print(json.dumps(train_within(Path(options.grow_on), options.limit)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(Path(scratch), options)
    if options.wait:
        found["wait"] = wait(options.wait, options.steps)
        print(f"waiting for data: {100 * found['wait']:.2f} % of a training step of preset demo")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))
    return 0


def measure(scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Read prepared recordings, train on them; return the ratios."""
    release, out = scratch / "release", scratch / "prepared"
    size = write_release(release, options.trials, options.channels)
    prepare(detect(release), out, PrepareOptions())
    print(f"{size / MIB:.0f} MiB in {options.trials} trials of {options.channels} channels")
    found: dict[str, Any] = {"mib": size / MIB}
    copy, batches = against_a_copy(out, scratch / "flat.bin", options.repeats)
    found["batches"] = copy / batches
    print(f"batches: {found['batches']:.2f} × the rate of copying a memory-mapped file")
    command = [sys.executable, __file__, "--grow-on", str(out), "--limit", str(options.limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found["memory"] = {**json.loads(done.stdout), "times": size / MIB / options.limit}
    print(
        f"memory: {found['memory']['epochs']} epochs on data of {found['memory']['times']:.0f} × "
        f"what the process may allocate more ({options.limit} MiB, by setrlimit); it grew by "
        f"{found['memory']['grown_mib']:.1f} MiB after the first"
    )
    return found


def write_release(folder: Path, trials: int, channels: int, compression: str | None = None) -> int:
    """Write recordings of noise as Brain-to-Text '25 comes; return their bytes uncompressed."""
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((2600, channels)).astype(np.float32)
    lengths = np.clip(generator.lognormal(np.log(750), 0.4, trials), 150, 2500).astype(int)
    size = 0
    for split, part in zip(
        ("train", "val"), np.split(lengths, [trials - max(2, trials // 20)]), strict=True
    ):
        day = folder / "hdf5_data_final" / "t15.2023.08.11"
        day.mkdir(parents=True, exist_ok=True)
        with h5py.File(day / f"data_{split}.hdf5", "w") as file:
            for number, bins in enumerate(part):
                group = file.create_group(f"trial_{number:04d}")
                start = int(generator.integers(0, 2600 - bins))
                signal = noise[start : start + bins] + number
                group.create_dataset("input_features", data=signal, compression=compression)
                size += signal.nbytes
                codes = np.zeros(500, np.int32)
                codes[:3] = list(b"yes")
                group["transcription"], group["seq_class_ids"] = codes, np.zeros(500, np.int32)
                group.attrs.update(
                    n_time_steps=int(bins), seq_len=0, sentence_label="yes",
                    session="t15.2023.08.11", block_num=1, trial_num=number,
                )  # fmt: skip
    return size


def against_a_copy(folder: Path, flat: Path, repeats: int) -> tuple[float, float]:
    """Seconds of copying trials from one mapped file into padded arrays, and of reading batches.

    Three epochs each: what a phase does once, as it begins, is counted once.
    """
    trials = load_trials(folder, "train")
    lengths = signal_lengths(trials)
    rows = trials.with_format("arrow")
    with flat.open("wb") as file:
        for index in range(len(rows)):
            file.write(read_signal(rows[index]).tobytes())
    mapped = np.memmap(flat, np.float32, "r").reshape(int(lengths.sum()), -1)
    starts = np.cumsum(lengths) - lengths
    plan = BatchPlan(lengths, 16)

    def copied() -> None:
        for step in range(3 * len(plan)):
            chosen = plan.rows(0, 0, *divmod(step, len(plan)))
            batch = np.zeros((16, lengths[chosen].max(), mapped.shape[1]), np.float32)
            for place, row in zip(batch, chosen, strict=True):
                place[: lengths[row]] = mapped[starts[row] : starts[row] + lengths[row]]

    def read() -> None:
        batches = train_batches(trials, plan, None, [], None, seed=0, micro_batch=16)
        for _ in range(3 * len(plan)):
            next(batches)
        batches.close()  # type: ignore[attr-defined]

    return best(copied, repeats), best(read, repeats)


def train_within(folder: Path, limit_mib: int, epochs: int = 4) -> dict[str, Any]:
    """Train on every trial, several times, allocating ``limit_mib`` more than the start at most."""
    trials = load_trials(folder, "train")
    plan = BatchPlan(signal_lengths(trials), 1)
    # No convolution: torch keeps a kernel for each length that one has met.
    model = torch.nn.Linear(read_signal(trials.with_format("arrow")[0]).shape[1], 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    batches = train_batches(trials, plan, None, [], None, seed=0, micro_batch=1)
    after = []
    for step in range(epochs * len(plan)):
        _, _, (batch,) = next(batches)
        loss = model(batch.signal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 2:  # the libraries have what they need
            allowed = (status("VmData") + limit_mib * 1024) * 1024
            resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
        if (step + 1) % len(plan) == 0:
            after.append(status("RssAnon"))
    return {"epochs": epochs, "grown_mib": (after[-1] - after[0]) / 1024}


def status(name: str) -> int:
    """Return a number of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def wait(dataset: str, steps: int) -> float:
    """Return the share of a training step of preset demo that waits for data."""
    with tempfile.TemporaryDirectory() as scratch:
        phase = [f"phases.{number}.steps={steps if number == 0 else 1}" for number in range(3)]
        settings = [
            f"data.path={dataset}", f"run.dir={scratch}/run", "evaluation.max_trials=1",
            "evaluation.decode_trials=0", f"log.every={steps // 3}", "log.progress=false",
            "log.report=false", "codebook_start.after_steps=1", "evaluation.every=100000",
            "checkpoint.every=100000",
        ]  # fmt: skip
        command = [
            sys.executable, "train_ds.py", "--deepspeed_config", "ds_configs/zero2_cpu.json",
            "--config", "demo", *settings, *phase,
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, text=True)
        lines = (Path(scratch) / "run" / "metrics.jsonl").read_text().splitlines()
    shares = [json.loads(line).get("time/data_wait_fraction") for line in lines]
    return [share for share in shares if share is not None][1]  # past the first steps


def best(work: Callable[[], None], repeats: int) -> float:
    """Return the least processor seconds that ``work`` takes."""
    times = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


if __name__ == "__main__":
    raise SystemExit(main())
