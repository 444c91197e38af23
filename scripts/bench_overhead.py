"""What the trainer costs: its steps and those of a bare loop, in turn, in one process.

    python scripts/bench_overhead.py --data data/demo/prepared
    deepspeed --num_accelerators 2 scripts/bench_overhead.py --data data/demo/prepared

One rank in float32 is compared with bare PyTorch, all else with bare DeepSpeed; `--against`
chooses. Segments of a few steps alternate in the order A B B A, so that both meet the same state of
the machine, and segment i of both trains on the same batches. The ratio of steps per second is the
median over pairs of segments.

The trainer is `b2t.train.trainer.Trainer` in the last phase of the configuration with the hooks
that `train_ds.py` gives it: monitors, alerts, console, metrics file. Its segment is the whole of
its loop, from before a batch is read until before the next segment's. Log steps and checkpoints are
rarer than segments: they are timed apart, and added as often as the configuration has them. Not in
it: validation (as much work in any loop), and the HTML report, which another process writes.

The bare loop reads the same dataset through the same loader, and on a model with the same weights
and codebooks computes the same losses (each rank by its own counts), gradients, clipping, AdamW of
the same groups, learning rates, temperature, and quantizer statistics and update with revival. With
PyTorch that is `clip_grad_norm_` and `torch.optim.AdamW`; with DeepSpeed an engine of its own from
the same file. It has no hooks, no counts or stop flags over ranks, no window of metrics, no seeds
per micro-batch, no check of what comes out; it reads its loss once a segment. With accumulation the
trainer's additional encoder pass (`phases.N.exact_regularizers`) counts as its cost.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]

from throughput.bare import Bare, BareDeepSpeed, BareTorch  # noqa: E402

from b2t.config import Config, load_config  # noqa: E402
from b2t.data.batches import Batch  # noqa: E402
from b2t.log import configure, quiet_libraries  # noqa: E402
from b2t.train.admission import prepare_run  # noqa: E402
from b2t.train.build import build  # noqa: E402
from b2t.train.ds_config import load_ds_config  # noqa: E402
from b2t.train.launch import main_callbacks, prepare_torch  # noqa: E402
from b2t.train.main import default_ds_config, name_accelerator  # noqa: E402
from b2t.train.monitoring import Watch, build_monitors  # noqa: E402
from b2t.train.ranks import Ranks, join, leave  # noqa: E402
from b2t.train.trainer import Trainer  # noqa: E402

CHECKPOINT_EVERY = 500
TARGETS = {"torch": 0.95, "deepspeed": 0.97}
CHECKPOINT_TARGET = 0.02


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="prepared dataset")
    parser.add_argument("--config", default="demo", help="preset or YAML file (default: demo)")
    parser.add_argument("--deepspeed_config", help="DeepSpeed file (default: as train_ds.py)")
    parser.add_argument("--against", choices=sorted(TARGETS), help="the bare loop")
    parser.add_argument("--segments", type=int, default=150, help="timed pairs (default: 150)")
    parser.add_argument("--warmup", type=int, default=10, help="untimed pairs (default: 10)")
    parser.add_argument("--length", type=int, default=2, help="steps of a segment (default: 2)")
    parser.add_argument("--saves", type=int, default=8, help="checkpoints timed (default: 8)")
    parser.add_argument("--folder", type=Path, help="where checkpoints go (default: temporary)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    options = arguments(argv)
    quiet_libraries()
    name_accelerator()
    prepare_torch(
        load_config(options.config, options.overrides),
        load_ds_config(options.deepspeed_config or default_ds_config()),
    )
    ranks = join()
    configure(ranks.rank)
    logging.getLogger("b2t").setLevel(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            found = measure(options, ranks, ranks.from_main(scratch))
            ranks.barrier()
    finally:
        leave()
    if ranks.is_main:
        print(describe(found))
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return 0


def measure(options: argparse.Namespace, ranks: Ranks, folder: str) -> dict[str, Any]:
    """Train in segments, trainer and bare loop in turn; return the numbers."""
    ds_file = load_ds_config(options.deepspeed_config or default_ds_config())
    plain = ranks.world == 1 and ds_file.precision == "fp32"
    against = options.against or ("torch" if plain else "deepspeed")
    pairs, length = options.warmup + options.segments, options.length
    config, checkpoint_every = benchmark_config(options, folder, pairs * length)
    materials = build(config)
    monitors = build_monitors(config, materials, ranks)
    hooks = [Watch(monitors), *(main_callbacks(config, monitors) if ranks.is_main else [])]
    trainer = Trainer(config, ds_file, materials, ranks, hooks)
    prepare_run(trainer, "never")
    bare = (BareTorch if against == "torch" else BareDeepSpeed)(trainer)
    clock = Turns(trainer, bare, length, pairs, options.saves)
    trainer._batches = lambda: clock  # type: ignore[method-assign]
    trainer.fit()
    found = {
        "against": against,
        "ranks": ranks.world,
        "threads": torch.get_num_threads(),
        "device": ranks.device.type,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "log_every": config.log.every,
        "checkpoint_every": checkpoint_every,
    }
    return {**found, **clock.summary(options.warmup, config.log.every, checkpoint_every)}


def benchmark_config(options: argparse.Namespace, folder: str, steps: int) -> tuple[Config, int]:
    """Return the last phase alone without validation, and the interval of checkpoints."""
    config = load_config(
        options.config,
        [
            f"data.path={options.data}",
            f"run.dir={folder}/run",
            "evaluation.decode_trials=0",
            "evaluation.max_trials=1",
            "codebook_start.after_steps=0",
            "log.report=false",
            "log.wandb.enabled=false",
            *options.overrides,
        ],
    )
    every = config.checkpoint.every
    config.phases = [config.phases[-1].model_copy(update={"steps": steps})]
    config.evaluation.every = config.checkpoint.every = steps + 1
    return config, every


@dataclass
class Turns:
    """The trainer's batches; between segments of them the bare loop has its turn, and the clock.

    Attributes:
        ours, theirs: (wall, processor) seconds of the segments of the trainer, without its log
            steps' logging, and of the bare loop.
        logs: wall seconds of each logging.
        saves: of each checkpoint until it is on the disk; all of it counts against the trainer,
            though it is written beside the next steps.
        stalls: of each checkpoint until training goes on.
    """

    trainer: Trainer
    bare: Bare
    length: int
    pairs: int
    wanted_saves: int
    ours: list[np.ndarray] = field(default_factory=list)
    theirs: list[np.ndarray] = field(default_factory=list)
    logs: list[float] = field(default_factory=list)
    saves: list[float] = field(default_factory=list)
    stalls: list[float] = field(default_factory=list)
    checkpoint_bytes: int = 0
    taken: int = 0
    started: np.ndarray = field(default_factory=lambda: np.zeros(2))
    logged: np.ndarray = field(default_factory=lambda: np.zeros(2))

    def __post_init__(self) -> None:
        self.inner = Trainer._batches(self.trainer)
        self.losses: list[float] = []
        self.trainer._log = self._log  # type: ignore[method-assign]

    def __next__(self) -> list[Batch]:
        """Return the next batch, after the other's turn where one is due."""
        self._turn_when_due()
        self.taken += 1
        return next(self.inner)

    def close(self) -> None:
        """End the last segment; called by the trainer when its phase is over."""
        if self.taken == self.pairs * self.length:
            self._turn(self.pairs)
        self.inner.close()
        self.bare.batches.close()

    def _turn_when_due(self) -> None:
        """Begin the next turn; none is left where the trainer makes up for steps it skipped."""
        number, within = divmod(self.taken, self.length)
        if not within and number <= self.pairs:
            self._turn(number)

    def _turn(self, number: int) -> None:
        """Close segment ``number`` − 1 and open segment ``number``: ours first where it is even."""
        now = self._now()
        if number == 0:
            self.bare.start(self.trainer)
        else:
            self.ours.append(now - self.started - self.logged)
            if number % 2 == 1:
                self._let_bare()
            if number * self.wanted_saves // self.pairs > len(self.saves):
                self._save()
        if number % 2 == 1 and number < self.pairs:
            self._let_bare()
        self.trainer.clock.restart()
        self.logged = np.zeros(2)
        self.started = self._now()

    def _let_bare(self) -> None:
        started = self._now()
        self.losses.append(self.bare.segment(self.length))
        self.theirs.append(self._now() - started)

    def _log(self) -> None:
        started = self._now()
        Trainer._log(self.trainer)
        self.logged += self._now() - started
        self.logs.append(float(self.logged[0]))

    def _save(self) -> None:
        """Time how long training stands still, and until the checkpoint is on the disk."""
        started = self._now()
        self.trainer.save()
        self.stalls.append(float((self._now() - started)[0]))
        self.trainer.wait_for_checkpoint()
        self.saves.append(float((self._now() - started)[0]))
        store = self.trainer.store
        newest = store.folder / f"step-{store.steps()[-1]:08d}"
        self.checkpoint_bytes = sum(file.stat().st_size for file in newest.iterdir())

    def _now(self) -> np.ndarray:
        """Return wall and processor time once all ranks and their devices have come here."""
        if self.trainer.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.ranks.device)
        self.trainer.ranks.barrier()
        return np.array([time.perf_counter(), time.process_time()])

    def summary(self, warmup: int, log_every: int, checkpoint_every: int) -> dict[str, Any]:
        """Return the numbers, seconds per step."""
        (ours, our_cpu), (theirs, their_cpu) = (
            np.array(segments[warmup:]).T / self.length for segments in (self.ours, self.theirs)
        )
        log, save = float(np.median(self.logs)), float(np.median(self.saves))
        ours = ours + log / log_every
        ratios = theirs / (ours + save / checkpoint_every)
        step = float(np.median(ours))
        return {
            "pairs": len(ours),
            "steps_per_segment": self.length,
            "trainer_step_s": step,
            "bare_step_s": float(np.median(theirs)),
            "log_s": log,
            "ratio": float(np.median(ratios)),
            "ratio_quartiles": np.percentile(ratios, [25, 75]).tolist(),
            "ratio_of_totals": float(theirs.sum() / (ours + save / checkpoint_every).sum()),
            "ratio_of_processor_time": float(np.median(their_cpu / our_cpu)),
            "save_s": save,
            "stall_s": float(np.median(self.stalls)),
            "stall_range_s": [min(self.stalls), max(self.stalls)],
            "stall_share": float(np.median(np.array(self.stalls) / np.array(self.saves))),
            "save_range_s": [min(self.saves), max(self.saves)],
            "checkpoint_bytes": self.checkpoint_bytes,
            "checkpoint_share": save / (CHECKPOINT_EVERY * step),
        }


def describe(found: dict[str, Any]) -> str:
    """Put the numbers in words, with the targets."""
    target, share = TARGETS[found["against"]], found["checkpoint_share"]
    bare = {"torch": "bare PyTorch", "deepspeed": "bare DeepSpeed"}[found["against"]]
    low, high = found["ratio_quartiles"]
    fastest, slowest = found["save_range_s"]
    least, most = found["stall_range_s"]
    return "\n".join(
        [
            f"{found['ranks']} rank(s) on {found['device']}, {found['threads']} thread(s) each, "
            f"{found['parameters'] / 1e6:.2f} M parameters, {found['pairs']} pairs of segments of "
            f"{found['steps_per_segment']} steps",
            f"{'trainer':16}{1e3 * found['trainer_step_s']:8.1f} ms/step (median), of it logging "
            f"{1e3 * found['log_s']:.1f} ms every {found['log_every']} steps",
            f"{bare:16}{1e3 * found['bare_step_s']:8.1f} ms/step (median)",
            f"steps/s, checkpoint every {found['checkpoint_every']} steps, trainer over bare: "
            f"{found['ratio']:.3f} (quartiles {low:.3f} – {high:.3f}), target ≥ {target}: "
            f"{_verdict(found['ratio'] >= target)}",
            f"  of the totals {found['ratio_of_totals']:.3f}, of rank 0's processor time, without "
            f"logging and checkpoints, {found['ratio_of_processor_time']:.3f}",
            f"checkpoint of {found['checkpoint_bytes'] / 1e6:.1f} MB: {1e3 * found['save_s']:.0f} "
            f"ms (median; {1e3 * fastest:.0f} – {1e3 * slowest:.0f}), every {CHECKPOINT_EVERY} "
            f"steps {100 * share:.2f} % of the time, target ≤ {100 * CHECKPOINT_TARGET:g} %: "
            f"{_verdict(share <= CHECKPOINT_TARGET)}",
            f"  training stands still for {1e3 * found['stall_s']:.0f} ms of it (median; "
            f"{1e3 * least:.0f} – {1e3 * most:.0f}), {100 * found['stall_share']:.1f} %",
        ]
    )


def _verdict(reached: bool) -> str:
    return "reached" if reached else "MISSED"


if __name__ == "__main__":
    sys.exit(main())
