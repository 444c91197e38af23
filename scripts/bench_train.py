"""Throughput of training, beside plain DistributedDataParallel and Hugging Face's Trainer.

    python scripts/bench_train.py --data data/demo/prepared
    torchrun --standalone --nproc_per_node 2 scripts/bench_train.py --data data/demo/prepared
    python scripts/bench_train.py --data data/demo/prepared --alone b2t      # and ddp, hf: memory

Each line is one phase of the configuration with one setting of what can be switched: the kernels
(`reference` are their naive versions), activation checkpointing, and blocks compiled or not.
`--one-by-one` takes the first value of each with every loop, and then each other value alone,
instead of all combinations. Segments of a few steps of the trainer alternate with those of the
other loop, A B B A, as in `bench_overhead.py`, which has the details; the ratio is the median over
pairs of segments. All loops train the same model on the same batches with the same losses,
optimizer groups, learning rates, clipping and codebook updates; the trainer alone logs, watches
and draws its dropout anew in each micro-batch. `run.deterministic` holds for all loops, but on a
GPU the trainer alone goes backward by deterministic algorithms only: compare with it set to false.
In 16 bit the trainer casts its model, as DeepSpeed does, and the others run theirs under autocast,
with the quantizer in float32.

Frames are valid latent frames of all ranks. Data wait is the share of the trainer's time in which
rank 0 waits for a batch; sync, from the second segment on, that in which it packs and awaits the
quantizer's sums over ranks. MFU and HFU need a GPU whose peak is known, and 16 bit. Memory can only
be told apart where a loop trains alone: `--alone` prints the most that a rank held in its steps,
and the trainer with its last checkpoint; of a GPU's memory, which torch counts, for several loops
one after the other.

A case that runs out of memory is named, and the others go on; so are those that `--budget` seconds
leave no time for. The exit status is 1 after either.
"""

import argparse
import csv
import gc
import logging
import resource
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]

from bench_overhead import Turns  # noqa: E402
from throughput.bare import Bare, BareTorch  # noqa: E402
from throughput.peers import HuggingFace, PlainDDP  # noqa: E402
from throughput.shares import Shares  # noqa: E402
from throughput.sync import QuantizerSync  # noqa: E402

from b2t.config import Config, load_config  # noqa: E402
from b2t.log import configure, quiet_libraries  # noqa: E402
from b2t.monitor.context import StepContext  # noqa: E402
from b2t.monitor.training import peak_flops  # noqa: E402
from b2t.train.admission import prepare_run  # noqa: E402
from b2t.train.build import Materials, build  # noqa: E402
from b2t.train.callback import Callback, Run  # noqa: E402
from b2t.train.dry_batch import out_of_memory  # noqa: E402
from b2t.train.ds_config import DeepSpeedFile, load_ds_config  # noqa: E402
from b2t.train.flops import StepFlops, flops_of_phases  # noqa: E402
from b2t.train.launch import main_callbacks, prepare_torch  # noqa: E402
from b2t.train.main import default_ds_config, name_accelerator  # noqa: E402
from b2t.train.monitoring import Watch, build_monitors  # noqa: E402
from b2t.train.ranks import Ranks, join, leave  # noqa: E402
from b2t.train.trainer import Trainer  # noqa: E402

PEERS: dict[str, type[Bare]] = {"ddp": PlainDDP, "hf": HuggingFace, "torch": BareTorch}
GIB = 2**30


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="prepared dataset")
    parser.add_argument("--config", default="demo", help="preset or YAML file (default: demo)")
    parser.add_argument("--deepspeed_config", help="DeepSpeed file (default: as train_ds.py)")
    parser.add_argument("--against", nargs="+", choices=sorted(PEERS), default=["ddp", "hf"])
    parser.add_argument("--phases", nargs="+", type=int, help="numbers from 0 (default: all)")
    parser.add_argument(
        "--kernels", nargs="+", choices=("kernels", "reference"), default=["kernels"]
    )
    parser.add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=["off"])
    parser.add_argument("--compile", nargs="+", choices=("off", "on"), default=["off"])
    parser.add_argument("--one-by-one", action="store_true", help="not all combinations")
    parser.add_argument("--budget", type=float, metavar="S", help="begin no case after S seconds")
    parser.add_argument("--segments", type=int, default=30, help="timed pairs (default: 30)")
    parser.add_argument("--warmup", type=int, default=4, help="untimed pairs (default: 4)")
    parser.add_argument("--length", type=int, default=2, help="steps of a segment (default: 2)")
    parser.add_argument(
        "--alone", nargs="+", choices=["b2t", *sorted(PEERS)], help="a loop, for its memory"
    )
    parser.add_argument("--shares", action="store_true", help="what a step goes into")
    parser.add_argument("--csv", type=Path, help="append the lines to this file")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(argv)


@dataclass(frozen=True)
class Case:
    """One line: a phase, what it is compared with, and what is switched."""

    phase: int
    against: str
    kernels: str
    checkpointing: str
    compiled: str


@dataclass
class Line:
    """What was measured of a case; `ratio` is steps per second of the trainer over the other's.

    `processor` is the same of processor time on rank 0: on a busy machine the steadier of the two.
    """

    phase: str
    against: str
    kernels: str
    checkpointing: str
    compiled: str
    ranks: int
    steps_per_s: float
    frames_per_s: float
    data_wait: float
    sync: float
    mfu: float | None
    hfu: float | None
    ratio: float
    ratio_low: float
    ratio_high: float
    processor: float


class Frames(Callback):
    """Counts valid frames of all ranks, and steps."""

    def __init__(self) -> None:
        self.frames = self.steps = 0.0

    def on_step(self, trainer: Run, context: StepContext) -> None:
        """Add the step."""
        assert context.frames is not None
        self.frames += float(context.frames)
        self.steps += 1


class Held(Callback):
    """Notes the most memory that a rank has held up to the last step, before what follows on it."""

    most = 0

    def on_step(self, trainer: Run, context: StepContext) -> None:
        """Look."""
        self.most = held(trainer.ranks)


@dataclass
class Waits(Turns):
    """Turns that also time how long the trainer waits for its own batches and for other ranks.

    Attributes:
        waited: seconds for batches, but for the first ``untimed`` of them, which loaders start in.
        sync: for other ranks.
        shares: times parts of a step, from the first pair that is timed.
    """

    waited: float = 0.0
    untimed: int = 0
    sync: QuantizerSync = field(default_factory=QuantizerSync)
    shares: Shares | None = None

    def __next__(self) -> Any:
        """Return the next batch, after the other's turn where one is due."""
        self._turn_when_due()
        if self.taken == self.length:
            self.sync.seconds = 0.0  # with the start of the codebooks
        self.taken += 1
        if self.shares is not None:
            self.shares.on = self.taken > self.untimed
        began = time.perf_counter()
        batch = next(self.inner)
        if self.untimed < self.taken <= self.pairs * self.length:
            self.waited += time.perf_counter() - began
        return batch

    def _let_bare(self) -> None:
        with self.sync.paused(), self.shares.of_the_other() if self.shares else nullcontext():
            super()._let_bare()


def case_config(options: argparse.Namespace, case: Case, folder: str, steps: int) -> Config:
    """Return the configuration of one phase alone, without validation and checkpoints."""
    every = 1 if case.checkpointing == "on" else 0
    switched = [
        f"model.activation_checkpointing.{name}={every}"
        for name in ("encoder", "signal_decoder", "text_decoder")
    ]
    config = load_config(
        options.config,
        [
            f"data.path={options.data}", f"run.dir={folder}/run", "evaluation.decode_trials=0",
            "evaluation.max_trials=1", "codebook_start.after_steps=0", "log.report=false",
            "log.progress=false", "log.wandb.enabled=false", *switched,
            f"model.compile_blocks={str(case.compiled == 'on').lower()}", *options.overrides,
        ],
    )  # fmt: skip
    config.phases = [config.phases[case.phase].model_copy(update={"steps": steps})]
    config.evaluation.every = config.checkpoint.every = steps + 1
    return config


def make_trainer(
    case: Case, config: Config, ds_file: DeepSpeedFile, ranks: Ranks, materials: Materials
) -> tuple[Trainer, Frames]:
    """Return the trainer of a case with all its hooks, ready to fit."""
    if materials.model.quantizer is not None:
        materials.model.quantizer.backend = case.kernels
    monitors, frames = build_monitors(config, materials, ranks), Frames()
    hooks = [Watch(monitors), *(main_callbacks(config, monitors) if ranks.is_main else []), frames]
    trainer = Trainer(config, ds_file, materials, ranks, hooks)
    prepare_run(trainer, "never")
    return trainer, frames


def measure(options: argparse.Namespace, case: Case, ranks: Ranks, folder: str) -> Line:
    """Train the trainer and a peer in turn."""
    ds_file = load_ds_config(options.deepspeed_config or default_ds_config())
    pairs = options.warmup + options.segments
    config = case_config(options, case, folder, pairs * options.length)
    materials = build(config)
    flops = known_flops(config, ds_file, ranks, materials)
    trainer, frames = make_trainer(case, config, ds_file, ranks, materials)
    peer = PEERS[case.against](trainer)
    clock = Waits(trainer, peer, options.length, pairs, 1)
    clock.untimed = options.warmup * options.length
    trainer._batches = lambda: clock  # type: ignore[method-assign]
    start = peer.start

    def started(of: Trainer) -> None:
        start(of)
        peer.model.quantizer.backend = case.kernels

    peer.start = started  # type: ignore[method-assign]
    clock.shares = Shares() if options.shares else None
    with clock.sync, clock.shares or nullcontext():
        trainer.fit()
    (ours, our_cpu), (theirs, their_cpu) = (
        np.array(segments[options.warmup :]).T / options.length
        for segments in (clock.ours, clock.theirs)
    )
    if clock.shares is not None and ranks.is_main:
        timed = (
            np.array(segments[options.warmup :]).sum(0) for segments in (clock.ours, clock.theirs)
        )
        print(clock.shares.table(*timed, options.segments * options.length))
    ratios, step_s = theirs / ours, float(np.median(ours))
    low, high = np.percentile(ratios, [25, 75])
    rate = frames.frames / frames.steps / step_s
    mfu, hfu = utilization(flops, ranks, rate)
    return Line(
        trainer.config.phases[0].name, case.against, case.kernels, case.checkpointing,
        case.compiled, ranks.world,
        1 / step_s, rate, clock.waited / (options.segments * options.length) / step_s,
        clock.sync.seconds / (frames.steps - options.length) / step_s, mfu, hfu,
        float(np.median(ratios)), float(low), float(high), float(np.median(their_cpu / our_cpu)),
    )  # fmt: skip


def known_flops(
    config: Config, ds_file: DeepSpeedFile, ranks: Ranks, materials: Materials
) -> StepFlops | None:
    """Return the operations of a frame where the device's peak is known; the model on the CPU."""
    if peak_flops(ranks.device) is None or ds_file.precision == "fp32":
        return None
    return flops_of_phases(config, materials, ds_file.accumulation)[config.phases[0].name]


def utilization(
    flops: StepFlops | None, ranks: Ranks, frames_per_s: float
) -> tuple[float | None, float | None]:
    """Return MFU and HFU, None where the device's peak is not known."""
    peak = peak_flops(ranks.device)
    if flops is None or peak is None:
        return None, None
    mfu = frames_per_s * flops.per_frame / (peak * ranks.world)
    return mfu, mfu * (1 + flops.recomputed)


def alone(options: argparse.Namespace, case: Case, ranks: Ranks, folder: str, loop: str) -> str:
    """Train one loop, and say how much memory a rank held at most."""
    gc.collect()
    on_gpu, others = ranks.device.type == "cuda", 0
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(ranks.device)
        others = torch.cuda.memory_allocated(ranks.device)
    ds_file = load_ds_config(options.deepspeed_config or default_ds_config())
    steps = options.length * (options.warmup + options.segments)
    config = case_config(options, case, folder, steps)
    trainer, _ = make_trainer(case, config, ds_file, ranks, build(config))
    before = held(ranks) - others
    began = time.perf_counter()
    if loop == "b2t":
        watched = Held()
        trainer.callbacks.append(watched)
        trainer.fit()
        in_steps = watched.most
    else:
        peer = PEERS[loop](trainer)
        peer.start_alone(trainer)
        peer.segment(steps)
        peer.batches.close()
        in_steps = held(ranks)
    if on_gpu:
        torch.cuda.synchronize(ranks.device)
    taken = time.perf_counter() - began
    most = max(ranks.gather(in_steps - others))
    saved = max(ranks.gather(held(ranks) - others))
    kind = "of the GPU" if on_gpu else "of the host"
    return (
        f"{loop} alone, phase {config.phases[0].name}, {ranks.world} rank(s): at most "
        f"{most / GIB:.3f} GiB {kind} held by a rank in its steps, {before / GIB:.3f} before them"
        + (f", {saved / GIB:.3f} with its checkpoint" if loop == "b2t" else "")
        + f"; {steps} steps in {taken:.1f} s with their start"
    )


def held(ranks: Ranks) -> int:
    """Most memory that this rank has held so far, in bytes: of the GPU, or of the process."""
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated(ranks.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(lines: list[Line]) -> str:
    """Put the lines in columns."""
    head = (
        f"{'phase':12}{'against':8}{'kernels':11}{'ckpt':6}{'compile':9}{'ranks':6}{'steps/s':>9}{'frames/s':>11}"
        f"{'data wait':>11}{'sync':>8}{'MFU':>8}{'HFU':>8}  ratio (quartiles)      processor"
    )

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f} %"

    rows = [
        f"{line.phase:12}{line.against:8}{line.kernels:11}{line.checkpointing:6}"
        f"{line.compiled:9}{line.ranks:<6}"
        f"{line.steps_per_s:9.2f}{line.frames_per_s:11,.0f}{percent(line.data_wait):>11}"
        f"{percent(line.sync):>8}{percent(line.mfu):>8}{percent(line.hfu):>8}  "
        f"{line.ratio:.3f} ({line.ratio_low:.3f} – {line.ratio_high:.3f})"
        f"  {line.processor:.3f}"
        for line in lines
    ]
    return "\n".join([head, *rows])


def cases(options: argparse.Namespace) -> list[Case]:
    """Return the cases that are asked for, in order."""
    phases = options.phases or range(len(load_config(options.config, []).phases))
    loops = options.against[:1] if options.alone else options.against
    chosen = [loops, options.kernels, options.checkpointing, options.compile]
    if options.one_by_one:
        first = [values[0] for values in chosen]
        sets = (
            [first]
            + [
                [*first[:place], value, *first[place + 1 :]]
                for place in (0, 3, 2, 1)  # what may run out of memory comes last
                for value in chosen[place][1:]
            ]
        )
    else:
        sets = [list(each) for each in product(*chosen)]
    return [Case(phase, *each) for phase in phases for each in sets]


def run_case(options: argparse.Namespace, case: Case, ranks: Ranks, lines: list[Line]) -> str:
    """Measure a case; return what there is to say of it."""
    with tempfile.TemporaryDirectory() as scratch:
        place = ranks.from_main(scratch)
        if options.alone:
            told = [alone(options, case, ranks, f"{place}/{loop}", loop) for loop in options.alone]
            said = "\n".join(told)
        else:
            lines.append(measure(options, case, ranks, place))
            said = table(lines[-1:]).splitlines()[1]
        ranks.barrier()
    return said


def main(argv: list[str] | None = None) -> int:
    """Measure all cases and print them; 1 where one could not be measured."""
    began = time.monotonic()
    options = arguments(argv)
    quiet_libraries()
    name_accelerator()
    config = load_config(options.config, options.overrides)
    prepare_torch(config, load_ds_config(options.deepspeed_config or default_ds_config()))
    ranks = join()
    configure(ranks.rank)
    logging.getLogger("b2t").setLevel(logging.WARNING)
    if options.alone and len(options.alone) > 1 and ranks.device.type != "cuda":
        raise SystemExit("--alone takes one loop on CPUs: memory is that of the process")
    lines: list[Line] = []
    missed = 0
    try:
        for case in cases(options):
            late = time.monotonic() - began > (options.budget or float("inf"))
            if any(ranks.gather(late)):
                said, missed = f"{case}: no time left", missed + 1
            else:
                try:
                    said = run_case(options, case, ranks, lines)
                except RuntimeError as error:
                    if ranks.world > 1 or not out_of_memory(error):
                        raise
                    said, missed = f"{case}: {str(error).splitlines()[0]}", missed + 1
            if ranks.is_main:
                print(said, flush=True)
            gc.collect()
    finally:
        leave()
    if ranks.is_main and lines:
        print(f"\n{table(lines)}")
        if options.csv:
            write(options.csv, lines)
    return 1 if missed else 0


def write(path: Path, lines: list[Line]) -> None:
    """Append lines to a CSV file."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(lines[0])))
        if new:
            writer.writeheader()
        writer.writerows(asdict(line) for line in lines)


if __name__ == "__main__":
    sys.exit(main())
