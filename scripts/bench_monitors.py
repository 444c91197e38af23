"""What the monitors cost: steps with them and steps without, in turn, in one training run.

    python scripts/bench_monitors.py --data data/demo/prepared
    deepspeed --num_accelerators 2 scripts/bench_monitors.py --data data/demo/prepared

Alternating within one run lets both kinds of steps meet the same machine, data and weights. The
median of the paired differences is compared with the median step without monitors. Nothing is
written unless --json names a file.
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

from b2t.config import load_config
from b2t.log import quiet_libraries
from b2t.train.build import build
from b2t.train.callbacks import Callback
from b2t.train.ds_config import load_ds_config
from b2t.train.main import default_ds_config, name_accelerator
from b2t.train.monitoring import build_monitors
from b2t.train.ranks import join, leave
from b2t.train.trainer import Trainer


def arguments() -> argparse.Namespace:
    """Options of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="prepared dataset")
    parser.add_argument("--config", default="demo", help="preset or YAML file (default: demo)")
    parser.add_argument("--deepspeed_config", help="DeepSpeed file (default: as train_ds.py)")
    parser.add_argument("--steps", type=int, default=200, help="timed steps (default: 200)")
    parser.add_argument("--warmup", type=int, default=20, help="untimed steps (default: 20)")
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
    """Train with monitors on in every other step; print the cost."""
    options = arguments()
    quiet_libraries()
    name_accelerator()
    ranks = join()
    with tempfile.TemporaryDirectory() as scratch:
        steps = options.warmup + options.steps
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
        monitors = build_monitors(config.monitor, materials, ranks)
        clock = Clock(monitors, options.log_every, ranks.device)
        ds_file = load_ds_config(options.deepspeed_config or default_ds_config())
        trainer = Trainer(config, ds_file, materials, ranks, [clock])
        clock.watch(trainer)
        trainer.fit()
    found = cost(np.array(clock.on), np.array(clock.off), clock.read_s, options)
    if ranks.is_main:
        print_cost(found, ranks)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    leave()
    return 0


class Clock(Callback):
    """Times whole steps, the monitors on in every other, and the readings apart from them."""

    def __init__(self, monitors: Any, log_every: int, device: Any) -> None:
        self.monitors, self.log_every, self.device = monitors, log_every, device
        self.on: list[float] = []
        self.off: list[float] = []
        self.read_s: list[float] = []

    def watch(self, trainer: Any) -> None:
        """Time the steps of this trainer."""
        step = trainer._step

        def timed(*args: Any) -> None:
            self._wait()
            started = time.perf_counter()
            step(*args)
            self._wait()
            seconds = time.perf_counter() - started
            (self.on if trainer.progress.step % 2 else self.off).append(seconds)
            if trainer.progress.step % self.log_every == 0:
                started = time.perf_counter()
                self.monitors.check(trainer.progress.step, self.monitors.metrics())
                self.read_s.append(time.perf_counter() - started)

        trainer._step = timed

    def on_step(self, trainer: Any, context: Any) -> None:
        """Update the monitors in odd steps."""
        if trainer.progress.step % 2:
            self.monitors.update(context)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def cost(
    on: np.ndarray, off: np.ndarray, reads: list[float], options: argparse.Namespace
) -> dict[str, float]:
    """Seconds per step, and what the monitors add to it, readings included."""
    skip = options.warmup // 2
    pairs = min(len(on), len(off))
    on, off = on[skip:pairs], off[skip:pairs]
    plain = float(np.median(off))
    update = float(np.median(on - off))
    read = float(np.median(reads[1:] or reads or [0.0]))
    return {
        "pairs": float(len(on)),
        "step_s": plain,
        "update_s": update,
        "read_s": read,
        "read_every": float(options.log_every),
        "overhead": (update + read / options.log_every) / plain,
    }


def print_cost(found: dict[str, float], ranks: Any) -> None:
    """Print the cost for people."""
    print(
        f"{ranks.world} rank(s) on {ranks.device.type}, {found['pairs']:.0f} pairs of steps\n"
        f"step without monitors  {1e3 * found['step_s']:9.2f} ms\n"
        f"update of the monitors {1e3 * found['update_s']:9.2f} ms in each step\n"
        f"reading them           {1e3 * found['read_s']:9.2f} ms every "
        f"{found['read_every']:.0f} steps\n"
        f"together               {100 * found['overhead']:9.2f} % of a step"
    )


if __name__ == "__main__":
    sys.exit(main())
