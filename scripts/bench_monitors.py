"""What the monitors cost: every batch trained on twice, once with them and once without.

    python scripts/bench_monitors.py --data data/demo/prepared
    deepspeed --num_accelerators 2 scripts/bench_monitors.py --data data/demo/prepared

Both steps of a pair meet the same machine and the same batch; a coin says which comes first. What
monitors do only now and then is in the mean of a block of pairs, long enough to hold all of it; the
median over blocks keeps the machine's own disturbances out. On CPUs the time within the monitors is
measured too, on the wall and of the processor, which other jobs on the machine hardly touch.
Nothing is written unless --json names a file.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from b2t.config import load_config
from b2t.log import quiet_libraries
from b2t.train.build import build
from b2t.train.callbacks import Callback
from b2t.train.ds_config import load_ds_config
from b2t.train.launch import prepare_torch
from b2t.train.main import default_ds_config, name_accelerator
from b2t.train.monitoring import build_monitors
from b2t.train.ranks import join, leave
from b2t.train.trainer import Trainer

BLOCK = 10
"""Pairs in which every monitor has done all that it does only now and then."""


def arguments() -> argparse.Namespace:
    """Options of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="prepared dataset")
    parser.add_argument("--config", default="demo", help="preset or YAML file (default: demo)")
    parser.add_argument("--deepspeed_config", help="DeepSpeed file (default: as train_ds.py)")
    parser.add_argument("--pairs", type=int, default=200, help="timed pairs (default: 200)")
    parser.add_argument("--warmup", type=int, default=10, help="untimed pairs (default: 10)")
    parser.add_argument(
        "--log-every",
        type=int,
        default=20,
        help="steps between readings of the monitors (default: 20)",
    )
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args()


def main() -> int:
    """Train with monitors on in one step of each pair; print the cost."""
    options = arguments()
    quiet_libraries()
    name_accelerator()
    ds_file = load_ds_config(options.deepspeed_config or default_ds_config())
    prepare_torch(load_config(options.config, options.overrides), ds_file)
    ranks = join()
    with tempfile.TemporaryDirectory() as scratch:
        steps = 2 * (options.warmup + options.pairs)
        config = load_config(
            options.config,
            [
                f"data.path={options.data}",
                f"run.dir={scratch}",
                "evaluation.decode_trials=0",
                "evaluation.max_trials=1",
                "codebook_start.after_steps=0",
                *options.overrides,
            ],
        )
        phase = config.phases[-1].model_copy(update={"steps": steps})
        config = config.model_copy(update={"phases": [phase]})
        config.evaluation.every = config.checkpoint.every = config.log.every = steps + 1
        materials = build(config)
        monitors = build_monitors(config, materials, ranks)
        clock = Clock(monitors, options.log_every, ranks.device)
        trainer = Trainer(config, ds_file, materials, ranks, [clock])
        clock.watch(trainer)
        trainer.fit()
    found = cost(clock, options)
    if ranks.is_main:
        print_cost(found, ranks)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    leave()
    return 0


class Stopwatch:
    """Seconds on the wall, and of the processor in this process, since it was started."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._wait()
        self._wall, self._busy = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Return (wall, processor) seconds, all work on the device done."""
        self._wait()
        return time.perf_counter() - self._wall, time.process_time() - self._busy

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class Clock(Callback):
    """Times whole steps, with monitors and without, and the readings apart from them."""

    def __init__(self, monitors: Any, log_every: int, device: torch.device) -> None:
        self.monitors, self.log_every, self.device = monitors, log_every, device
        self.watching = False
        self.updates = 0
        self.steps: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        self.inside: list[tuple[float, float]] = []
        self.reads: list[tuple[float, float]] = []
        # The same on all ranks, so that they watch the same steps.
        self._coin = np.random.default_rng(0)

    def watch(self, trainer: Any) -> None:
        """Time the steps of this trainer."""
        step = trainer._step

        def pair(*arguments: Any) -> None:
            first = bool(self._coin.integers(2))
            for self.watching in (first, not first):
                stopwatch = Stopwatch(self.device)
                step(*arguments)
                self.steps[self.watching].append(stopwatch.read())
            if self.updates % self.log_every == 0:
                self._read(trainer.progress.step)

        trainer._step = pair

    def on_step(self, trainer: Any, context: Any) -> None:
        """Update the monitors in one step of each pair."""
        if self.watching:
            stopwatch = Stopwatch(torch.device("cpu"))
            self.monitors.update(context)
            self.inside.append(stopwatch.read())
            self.updates += 1

    def _read(self, step: int) -> None:
        # Ranks wait for one another at the next step anyway: that is no cost of the monitors.
        if dist.is_initialized():
            dist.barrier()
        stopwatch = Stopwatch(self.device)
        self.monitors.check(step, self.monitors.metrics())
        self.reads.append(stopwatch.read())


def cost(clock: Clock, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Cost by how it was measured: pairs of whole steps, and on CPUs the time within the monitors.

    On a GPU the time within them is only that of giving it work.
    """
    on, off = (np.array(clock.steps[which][options.warmup :]) for which in (True, False))
    reads, every = np.array(clock.reads[1:] or clock.reads), options.log_every
    found = {"whole steps": _cost(on[:, 0] - off[:, 0], off[:, 0], reads[:, 0], every)}
    if clock.device.type == "cpu":
        inside = np.array(clock.inside[options.warmup :])
        for which, name in enumerate(("within the monitors", "processor, within the monitors")):
            found[name] = _cost(inside[:, which], off[:, which], reads[:, which], every)
    return found


def _cost(added: np.ndarray, off: np.ndarray, reads: np.ndarray, every: int) -> dict[str, float]:
    """Seconds per step, and what the monitors add to it, readings included."""
    whole = max(1, len(added) // BLOCK) * BLOCK
    blocks = added[:whole].reshape(-1, min(BLOCK, len(added))).mean(1)
    drawn = np.random.default_rng(0).choice(blocks, (2000, len(blocks)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    plain, read, update = (float(np.median(x)) for x in (off, reads, blocks))
    return {
        "pairs": float(len(added)),
        "step_s": plain,
        "update_s": update,
        "read_s": read,
        "read_every": float(every),
        "overhead": (update + read / every) / plain,
        "overhead_low": (float(low) + read / every) / plain,
        "overhead_high": (float(high) + read / every) / plain,
    }


def print_cost(costs: dict[str, dict[str, float]], ranks: Any) -> None:
    """Print the cost for people."""
    pairs = next(iter(costs.values()))["pairs"]
    print(f"{ranks.world} rank(s) on {ranks.device.type}, {pairs:.0f} pairs of steps")
    for kind, found in costs.items():
        print(
            f"{kind}\n"
            f"  step without monitors  {1e3 * found['step_s']:9.2f} ms\n"
            f"  update of the monitors {1e3 * found['update_s']:9.2f} ms in each step\n"
            f"  reading them           {1e3 * found['read_s']:9.2f} ms every "
            f"{found['read_every']:.0f} steps\n"
            f"  together               {100 * found['overhead']:9.2f} % of a step (95 % interval "
            f"{100 * found['overhead_low']:.2f} to {100 * found['overhead_high']:.2f} %)"
        )


if __name__ == "__main__":
    sys.exit(main())
