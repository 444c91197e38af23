"""Train on many ranks of one machine: what they learn, and what a rank costs.

    python scripts/simulate_training_ranks.py --ranks 1 4 16 64

Each rank is a process that runs the real trainer, with gloo between them and DeepSpeed's ZeRO-2; it
is forked from one that has imported the packages, which all then share. The model is tiny, the
global batch 64 simulated trials on any number of ranks. Three phases have the start of
the codebooks, a revival and a checkpoint in the middle. For each number of ranks:

  same      weights, buffers and codebooks are the same on all ranks after each step
  off       greatest relative difference of a loss, and of codebooks at the end, from one rank's
  shards    of ZeRO hold each weight and moment once, and are the checkpoint's bit for bit
  resumed   from the checkpoint in the middle it ends with the same weights and moments, bit for
            bit; and on a quarter of the ranks within rounding

Processor time is the mean of ranks, memory the most of one: what it shares with no other process.
Neither may grow faster with the number of ranks than the shares in `GROWTH` say. Exit status 1
where anything differs or grows faster.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from many_ranks import checks
from many_ranks.forked import RankFailed, import_once, run_ranks
from rich.console import Console
from rich.table import Table

from b2t.run_files import CHECKPOINTS, STEP_PREFIX
from b2t.train.ds_config import shipped_files

PHASES, STEPS, MIDDLE = ("tokenizer", "codebook", "joint"), 3, 5
LIMIT = 1e-4
"""What rounding may change, as a share."""
GROWTH = {"start_cpu": 0.05, "step_cpu": 0.1, "private": 0.01}
"""How much more each further rank may cost a rank, as a share of what the fewest ranks cost it."""
SECONDS = 400.0
IMPORTED = ["deepspeed", "torch._inductor.compile_fx", "b2t.train.main", "many_ranks.observed"]
"""Most of what a start waits for; torch's compiler comes with DeepSpeed's first step."""

OVERRIDES = (
    f"""
    model.adapter.dropout=0 model.encoder.dim=16 model.encoder.depth=1 model.encoder.heads=2
    model.encoder.dropout=0 model.signal_decoder.depth=1 model.signal_decoder.heads=2
    model.phoneme_head.dropout=0 model.text_decoder.tokenizer=byte model.text_decoder.dim=16
    model.text_decoder.depth=1 model.text_decoder.heads=2 model.text_decoder.ffn_dim=16
    model.text_decoder.dropout=0 model.quantizer.codebook_size=64 model.quantizer.num_quantizers=2
    model.quantizer.revival_every=4 codebook_start.after_steps=1 codebook_start.frames_per_code=8
    data.max_text_tokens=64 evaluation.every=100 evaluation.decode_trials=0
    checkpoint.every={MIDDLE} checkpoint.keep=9 log.every=1 log.progress=false log.report=false
""".split()
    + [
        f"phases.{number}.{key}"
        for number in range(len(PHASES))
        for key in (f"steps={STEPS}", "warmup_steps=1")
    ]
)


def main(argv: list[str] | None = None) -> int:
    """Train, compare and print; 1 where something differs."""
    options = arguments(argv)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import_once(IMPORTED)
    with tempfile.TemporaryDirectory(prefix="b2t-ranks-") as temporary:
        folder = options.out or Path(temporary)
        shutil.rmtree(folder / "runs", ignore_errors=True)
        simulation = Simulation(folder, options.data or simulate(folder), options.batch)
        try:
            if len(set(options.ranks) - {1}) > 1:  # whose costs are to be compared
                simulation.rehearse()
            simulation.train(1)
            rows = [simulation.row(world) for world in options.ranks]
        except RankFailed as failure:
            print(failure, file=sys.stderr)
            return 1
    problems = [problem for row in rows for problem in row["problems"]] + grown(rows)
    show(rows)
    for problem in problems:
        print(problem)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    return 1 if problems else 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--batch", type=int, default=64, help="trials of a step (default: 64)")
    parser.add_argument("--data", type=Path, help="prepared recordings (default: simulated)")
    parser.add_argument("--out", type=Path, help="keep runs and logs here (default: nowhere)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args(argv)
    for world in options.ranks:
        if world < 1 or options.batch % world:
            parser.error(f"--ranks {world}: expected a divisor of the {options.batch} trials")
    return options


def simulate(folder: Path) -> Path:
    """Simulate and prepare 128 trials of 8 electrodes; return the prepared folder."""
    recordings, prepared = folder / "recordings", folder / "prepared"
    if prepared.is_dir():
        return prepared
    size = ["--sessions=2", "--electrodes=8", "--select-from=16", "--trials", "128", "8", "4"]
    for command in (
        ["simulate", str(recordings), *size, "--speaking-rate=120", "--jobs=1"],
        ["prepare", str(recordings), str(prepared)],
    ):
        subprocess.run([sys.executable, "-m", "b2t.cli", *command], check=True, capture_output=True)
    return prepared


class Simulation:
    """Runs of the same training on different numbers of ranks.

    Args:
        folder: where runs go.
        data: prepared recordings.
        batch: trials of a step, over all ranks.
    """

    def __init__(self, folder: Path, data: Path, batch: int) -> None:
        self.folder = folder / "runs"
        self.folder.mkdir(parents=True)
        self._data, self._batch = data, batch
        self._trained: dict[int, list[dict[str, Any]]] = {}

    def rehearse(self) -> None:
        """Import what two ranks import in their first steps, so that ranks share that as well."""
        found = self._run(2, "rehearsal", self._file(2))
        import_once([name for each in found for name in each["modules"]])

    def train(self, world: int) -> list[dict[str, Any]]:
        """Train on so many ranks, once; return what they have observed."""
        if world not in self._trained:
            self._trained[world] = self._run(world, str(world), self._file(world))
        return self._trained[world]

    def row(self, world: int) -> dict[str, Any]:
        """Train on so many ranks, go on from the middle, and compare."""
        found, run, alone = self.train(world), self.run(str(world)), self.run("1")
        last = len(PHASES) * STEPS
        row = {
            "ranks": world, **cost(found),
            "loss_off": checks.loss_off(run, alone),
            "codebooks_off": checks.state_off(run, alone, last, only="quantizer."),
            "checkpoint": directory_bytes(run / CHECKPOINTS / f"{STEP_PREFIX}{last:08d}"),
            "same": checks.ranks_apart(found),
            "shards": [p for phase in PHASES for p in checks.uncovered(found, phase)]
            + checks.not_in_checkpoint(found, self.folder / str(world), run, PHASES[-1]),
            "resumed": self._resumed(world, world, last),
        }  # fmt: skip
        row["problems"] = [*row["same"], *row["shards"], *row["resumed"], *self._other(world, row)]
        return row

    def _other(self, world: int, row: Mapping[str, Any]) -> list[str]:
        """Say what else is not as it should be."""
        problems = []
        for key in ("loss_off", "codebooks_off"):
            if not row[key] <= LIMIT:
                problems.append(f"{world} ranks: {key} {row[key]:.1e}, at most {LIMIT:g} expected")
        if not checks.revived(self.run(str(world))):
            problems.append(f"{world} ranks: no code was revived")
        if world >= 4:
            problems += self._resumed(world, world // 4, len(PHASES) * STEPS)
        return problems

    def _resumed(self, then: int, now: int, last: int) -> list[str]:
        """Go on from the middle of a run; say what is not as in the run left alone."""
        name = f"{then}-on-{now}"
        run, whole = self.run(name), self.run(str(then))
        shutil.copytree(whole, run)
        for folder in (run / CHECKPOINTS).glob(f"{STEP_PREFIX}*"):
            if int(folder.name.removeprefix(STEP_PREFIX)) > MIDDLE:
                shutil.rmtree(folder)
        found = self._run(now, name, self._file(then))
        problems = [f"{name}: {problem}" for problem in checks.ranks_apart(found)]
        begun = found[0]["steps"][0]["step"]
        if begun != MIDDLE + 1:
            problems.append(f"{name}: went on with step {begun}, not {MIDDLE + 1}")
        if then == now:
            return problems + [f"{name}: {n} differs" for n in checks.not_bitwise(run, whole, last)]
        off = max(checks.loss_off(run, whole), checks.state_off(run, whole, last))
        return problems + ([] if off <= LIMIT else [f"{name}: off by {off:.1e}"])

    def run(self, name: str) -> Path:
        """The run folder."""
        return self.folder / f"run-{name}"

    def _file(self, world: int) -> Path:
        """Write `ds_configs/zero2_cpu.json` for a share of the global batch and a small model."""
        raw = json.loads(shipped_files()["zero2_cpu"].read_text("utf-8"))
        raw["train_micro_batch_size_per_gpu"] = self._batch // world
        # DeepSpeed touches whole buckets: those of the file would take all of a small step.
        raw["zero_optimization"] |= {
            "reduce_bucket_size": 100_000,
            "allgather_bucket_size": 100_000,
        }
        path = self.folder / f"zero2-{world}.json"
        path.write_text(json.dumps(raw), "utf-8")
        return path

    def _run(self, world: int, name: str, file: Path) -> list[dict[str, Any]]:
        command = ["--config", "demo", "--deepspeed_config", str(file), *OVERRIDES]
        command += [f"data.path={self._data}", f"run.dir={self.run(name)}"]
        return run_ranks(world, self.folder / name, command, SECONDS)


def cost(found: checks.Found) -> dict[str, float]:
    """What a rank costs: seconds by the clock and of the processor, bytes."""
    first = [0] + [n for n in range(1, len(found[0]["steps"])) if n % STEPS == 0]
    steady = [[s for n, s in enumerate(rank["steps"]) if n not in first] for rank in found]
    peak = max(s["private"] for rank in found for s in rank["steps"])
    shards = [3 * 4 * sum(rank["phases"][PHASES[-1]]["flats"]) for rank in found]
    return {
        "start": max(rank["start"]["wall"] for rank in found),
        "start_cpu": statistics.fmean(rank["start"]["cpu"] for rank in found),
        "step": statistics.median(step["wall"] for step in steady[0]),
        "step_cpu": statistics.fmean(statistics.median(s["cpu"] for s in r) for r in steady),
        "private_start": max(rank["start"]["private"] for rank in found),
        "private": max(peak, *(rank["private"] for rank in found)),
        "shard": max(shards),
    }


def directory_bytes(folder: Path) -> int:
    """Size of the files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def grown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what grows faster with the number of ranks than `GROWTH` allows.

    From the fewest ranks above one on: one has neither ZeRO nor connections.
    """
    several = sorted((row for row in rows if row["ranks"] > 1), key=lambda row: row["ranks"])
    problems = []
    for row in several[1:]:
        for key, share in GROWTH.items():
            allowed = several[0][key] * (1 + share * (row["ranks"] - several[0]["ranks"]))
            if not row[key] <= allowed:
                problems.append(
                    f"{row['ranks']} ranks: {key} {row[key]:.4g}, at most {allowed:.4g} allowed "
                    f"after {several[0][key]:.4g} on {several[0]['ranks']}"
                )
    return problems


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a row for each number of ranks."""
    table = Table()
    for name in ("ranks", "same", "loss off", "codebooks off", "shards", "resumed", "start, s",
                 "CPU s", "step, s", "CPU s", "start, MB", "most, MB", "shards, KB",
                 "checkpoint, KB"):  # fmt: skip
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row["ranks"]), said(row["same"]), f"{row['loss_off']:.1e}",
            f"{row['codebooks_off']:.1e}", said(row["shards"]), said(row["resumed"]),
            f"{row['start']:.1f}", f"{row['start_cpu']:.2f}", f"{row['step']:.2f}",
            f"{row['step_cpu']:.3f}", f"{row['private_start'] / 1e6:.0f}",
            f"{row['private'] / 1e6:.0f}", f"{row['shard'] / 1e3:.1f}",
            f"{row['checkpoint'] / 1e3:.0f}",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def said(problems: Sequence[str]) -> str:
    """Whether there are no problems, in words."""
    return "NO" if problems else "yes"


if __name__ == "__main__":
    sys.exit(main())
