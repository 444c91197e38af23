"""Kill a run at random moments, again and again, and compare it with one never interrupted.

    python scripts/soak.py --kills 60 --out runs/soak

Two ranks train a small model on simulated recordings and save every few steps. All ranks get
SIGKILL at a random moment, wherever they are, and the same command follows. Then places that
chance has not hit twice are aimed at: the start, k-means, each phase, a save, a validation, a phase
change. A table says where kills landed. At the end weights, codebooks, losses, monitors' metrics
and decoded text must be bitwise those of the run that was left alone. Exit status 1 where they are
not, or where a place was never hit.

The run that is left alone is started as users start it (with --fp16, which tests alone may do on
CPUs, it is forked too). Killed ranks are forked from a process
that has imported the packages, which spares each of them ten seconds; they run the same `main`.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
EXIT_OK = 0
TIMES = ("time", "throughput", "time_s")
"""First parts of the names of metrics that measure time."""

DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": False,
        "reduce_bucket_size": 20000,
        "allgather_bucket_size": 20000,
    },
}

FP16 = {
    "enabled": True,
    "loss_scale": 0,
    "initial_scale_power": 20,
    "loss_scale_window": 4,
    "hysteresis": 1,
    "min_loss_scale": 1,
}
"""A scale that starts far too high and grows often, so that steps are skipped all along."""

OVERRIDES = """
    model.encoder.dim=32 model.encoder.depth=1 model.encoder.heads=2 model.signal_decoder.depth=1
    model.signal_decoder.heads=2 model.text_decoder.dim=32 model.text_decoder.depth=1
    model.text_decoder.heads=2 model.text_decoder.ffn_dim=64 model.text_decoder.tokenizer=byte
    model.quantizer.codebook_size=32 model.quantizer.num_quantizers=2 data.max_text_tokens=128
    data.workers=1 optim.weight_ema=0.9
    codebook_start.after_steps=6 codebook_start.frames_per_code=4 evaluation.every=9
    evaluation.decode_trials=4 evaluation.max_trials=8 evaluation.max_new_tokens=8
    checkpoint.every=4 log.every=3 log.report=false log.progress=false run.seed=5
""".split()  # noqa: SIM905

PHASES = ("tokenizer", "codebook", "joint")
PLACES = (
    "start",
    "k-means",
    *(f"step of phase {phase}" for phase in PHASES),
    "save",
    "half-written checkpoint",
    "validation",
    "decoding",
    "phase change",
)
"""Where a kill may land; all of them must be hit."""

_ONCE = ("k-means", *(f"step of phase {phase}" for phase in PHASES[:-1]))
"""Places that a run passes once, in this order, before the last phase."""


def main() -> int:
    """Run the comparison; return the exit status."""
    options = arguments()
    began = time.monotonic()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    data = simulate(options.out)
    sections = {**DS_CONFIG, "fp16": FP16} if options.fp16 else DS_CONFIG
    (options.out / "ds.json").write_text(json.dumps(sections), "utf-8")
    soak = Soak(options, data)
    if options.fp16:
        soak.start("alone").wait()
    else:
        leave_alone(options, data)
    try:
        soak.rehearse()
        soak.kill_at_random()
        soak.aim_at_what_was_missed()
        soak.finish_and_compare()
    finally:
        soak.report(time.monotonic() - began)
    return 1 if soak.problems else 0


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=60, help="SIGKILLs at random moments")
    parser.add_argument("--each", type=int, default=2, help="kills at least in each place")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60, help="steps of all phases together")
    parser.add_argument(
        "--fp16",
        action="store_true",
        help="fp16 with the loss scaler; DeepSpeed's refusal of fp16 on CPUs is overridden",
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="give up after so long")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "soak")
    return parser.parse_args()


def simulate(out: Path) -> Path:
    """Write and prepare a few short recordings."""
    commands = [
        ["simulate", out / "recordings", "--sessions", "2", "--trials", "64", "12", "4"],
        ["prepare", out / "recordings", out / "data"],
    ]
    commands[0] += ["--electrodes", "4"]
    for command in commands:
        subprocess.run(
            [sys.executable, "-m", "b2t.cli", *map(str, command)],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=REPOSITORY,
        )
    return out / "data"


def steps_of_phases(steps: int) -> list[int]:
    """Steps of the three phases, a half, a quarter and the rest of all."""
    return [steps // 2, steps // 4, steps - steps // 2 - steps // 4]


def training_arguments(options: argparse.Namespace, data: Path, name: str) -> list[str]:
    """Arguments of `train_ds.py` for the run of this name."""
    return [
        *("--config", "demo", "--deepspeed_config", str(options.out / "ds.json")),
        *(f"run.dir={options.out / name}", f"data.path={data}", *OVERRIDES),
        *(f"phases.{n}.steps={count}" for n, count in enumerate(steps_of_phases(options.steps))),
    ]


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What a launcher would tell a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "B2T_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }


def leave_alone(options: argparse.Namespace, data: Path) -> None:
    """Train without interruption, by the command that users type."""
    command = [sys.executable, "train_ds.py", *training_arguments(options, data, "alone")]
    port = free_port()
    with (options.out / "alone.log").open("w") as log:
        ranks = [
            subprocess.Popen(
                command,
                env={**os.environ, **environment(rank, options.ranks, port)},
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
            )
            for rank in range(options.ranks)
        ]
        statuses = [rank.wait(600) for rank in ranks]
    if any(statuses):
        raise SystemExit(f"the run that is left alone failed: {statuses}, see {log.name}")


def killable_rank(
    argv: list[str], variables: dict[str, str], log: Path, trace: Path, fp16: bool
) -> None:
    """Train as one rank, in a process of its own that notes where it is, for whoever kills it."""
    os.environ.update(variables)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    from b2t.train.main import main
    from b2t.train.ranks import Ranks

    if fp16:
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True
    notes = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def move(self: Ranks, place: str) -> None:
        self.__dict__["place"] = place
        os.write(notes, f"{time.monotonic():.4f} {place}\n".encode())

    Ranks.place = property(lambda self: self.__dict__["place"], move)  # type: ignore
    os.chdir(REPOSITORY)
    sys.exit(main(argv))


class KillableRun:
    """All ranks of the run, without a launcher, so that nothing restarts them or cleans up."""

    def __init__(
        self, options: argparse.Namespace, data: Path, context: object, name: str = "killed"
    ) -> None:
        self.folder = options.out / name
        self.started = time.time()
        self.began = time.monotonic()
        self._traces = [options.out / f"{name}-rank{rank}.places" for rank in range(options.ranks)]
        port = free_port()
        argv = training_arguments(options, data, name)
        self.processes = []
        for rank, trace in enumerate(self._traces):
            trace.unlink(missing_ok=True)
            variables = environment(rank, options.ranks, port)
            log = options.out / f"{name}-rank{rank}.log"
            process = context.Process(  # type: ignore[attr-defined]
                target=killable_rank, args=(argv, variables, log, trace, options.fp16)
            )
            process.start()
            self.processes.append(process)

    def trace(self, rank: int = 0) -> list[tuple[float, str]]:
        """Where a rank has been: seconds since the start of the run, and the place."""
        try:
            lines = self._traces[rank].read_text("utf-8").splitlines()
        except FileNotFoundError:
            return []
        return [
            (float(when) - self.began, place) for when, place in (x.split(" ", 1) for x in lines)
        ]

    def where(self, rank: int = 0) -> str:
        """Which of the places a rank is in."""
        return place_of([place for _, place in self.trace(rank)])

    @property
    def running(self) -> bool:
        """Whether any rank still runs."""
        return any(process.exitcode is None for process in self.processes)

    @property
    def half_written(self) -> bool:
        """Whether a checkpoint or an export of this start is half written."""
        for path in (self.folder / "checkpoints").glob(".writing-*"):
            try:
                if path.stat().st_mtime >= self.started:
                    return True
            except FileNotFoundError:
                continue
        return False

    def kill(self) -> None:
        """SIGKILL to all, and wait until they are gone."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def wait(self) -> None:
        """Wait for the end, which must be a good one."""
        for process in self.processes:
            process.join(600)
        self.require_good_end()

    def require_good_end(self) -> None:
        """Give up where a rank has failed, or hangs."""
        statuses = [process.exitcode for process in self.processes]
        if any(status != EXIT_OK for status in statuses):
            raise SystemExit(f"a resumed run was lost: statuses {statuses}, see {self.folder}*.log")


def place_of(visited: list[str]) -> str:
    """Name the last of the places that a rank has visited, one of `PLACES`."""
    if not visited:
        return "start"
    place = visited[-1]
    for words, name in (
        ("opening step", "step of phase"),
        ("in step", "step of phase"),
        ("starting the codebooks", "k-means"),
        ("saving after", "save"),
        ("validating", "validation"),
        ("decoding", "decoding"),
        ("ending phase", "phase change"),
        ("saving before phase", "phase change"),
        ("finishing", "save"),
    ):
        if place.startswith(words):
            return f"{name} {place.split()[-1]}" if name == "step of phase" else name
    changing = any(earlier.startswith("ending phase") for earlier in visited[-3:])
    return "phase change" if changing else "start"


class Soak:
    """Kills one run again and again, and remembers where.

    Attributes:
        kills: what each kill hit.
        compared: finished runs that were compared with the one left alone.
        problems: what went wrong, empty after a good soak.
    """

    def __init__(self, options: argparse.Namespace, data: Path) -> None:
        self.options, self.data = options, data
        self.deadline = time.monotonic() + 60 * options.minutes
        self.kills: list[dict] = []
        self.compared = 0
        self.problems: list[str] = []
        self._random = random.Random(options.seed)
        os.environ.update(environment(0, 1, 0))
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["__main__", "deepspeed", "b2t.train.trainer", "b2t.train.main", "b2t.train.startup"]
        )
        self._start_s = self._training_s = 0.0
        self._spans: dict[str, float] = {}

    def start(self, name: str = "killed") -> KillableRun:
        """Start a run or go on with it."""
        return KillableRun(self.options, self.data, self._context, name)

    def rehearse(self) -> None:
        """Time the start, the training and each place in a run that is not killed."""
        run = self.start()
        run.wait()
        trace = run.trace()
        first = next(when for when, place in trace if place.startswith("opening step"))
        for number, (when, _) in enumerate(trace[:-1]):
            place = place_of([visited for _, visited in trace[: number + 1]])
            self._spans[place] = max(self._spans.get(place, 0.0), trace[number + 1][0] - when)
        self._start_s, self._training_s = first, trace[-1][0] - first
        print(f"start {first:.1f} s, training {self._training_s:.1f} s", flush=True)
        self._compare()

    def kill_at_random(self) -> None:
        """Kill one run in six before its first step, others in what half of the training takes."""
        while len(self.kills) < self.options.kills and not self._out_of_time():
            run = self.start()
            moment = self._random.uniform(0.0, self._start_s)
            if self._random.random() < 5 / 6:
                while run.where() == "start" and run.running:
                    time.sleep(0.005)
                moment = self._random.uniform(0.0, 0.5 * self._training_s)
                moment += time.monotonic() - run.began
            while time.monotonic() < run.began + moment and run.running:
                time.sleep(0.001)
            self._kill(run, "random")

    def aim_at_what_was_missed(self) -> None:
        """Kill in places that random moments have hit fewer than `--each` times."""
        while missing := self.missing():
            if self._out_of_time():
                return
            self._aim(next((place for place in missing if self._lies_ahead(place)), missing[0]))

    def missing(self) -> list[str]:
        """Places that were hit too rarely."""
        hits = self.hits()
        return [place for place in PLACES if hits[place] < self.options.each]

    def hits(self) -> Counter:
        """How many kills hit each place."""
        hits = Counter(place for kill in self.kills for place in {*kill["places"]})
        hits["half-written checkpoint"] = sum(kill["half_written"] for kill in self.kills)
        return hits

    def finish_and_compare(self) -> None:
        """Let the run finish, undisturbed, and compare it."""
        self.start().wait()
        self._compare()

    def report(self, seconds: float) -> None:
        """Print the table of places, and write `soak.json`."""
        hits = self.hits()
        never = [place for place in PLACES if not hits[place]]
        self.problems += [f"never killed in: {place}" for place in never]
        width = max(map(len, PLACES))
        print(f"\n{'place':{width}}  kills (of a rank at least)")
        print(*(f"{place:{width}}  {hits[place]}" for place in PLACES), sep="\n")
        record = {
            "kills": self.kills,
            "hits": hits,
            "runs_compared": self.compared,
            "seconds": round(seconds, 1),
            "problems": self.problems,
        }
        (self.options.out / "soak.json").write_text(json.dumps(record, indent=1), "utf-8")
        resumes = f"{len(self.kills)} kills, {self.compared} runs to their end, {seconds:.0f} s"
        print("\n".join(self.problems) or f"{resumes}: bitwise equal to the run left alone")

    def _out_of_time(self) -> bool:
        if time.monotonic() < self.deadline:
            return False
        self.problems = [f"out of time after {self.options.minutes:g} minutes"]
        return True

    def _kill(self, run: KillableRun, how: str) -> None:
        """Kill a run, or start over where it has finished by itself."""
        if not run.running:
            run.require_good_end()
            self._compare()
            return
        run.kill()
        places = [run.where(rank) for rank in range(self.options.ranks)]
        last = run.trace()
        self.kills.append(
            {
                "how": how,
                "places": places,
                "half_written": run.half_written,
                "after_s": round(time.monotonic() - run.began, 3),
                "rank0": last[-1][1] if last else "importing",
                "checkpoint": newest_step(run.folder),
            }
        )
        print(f"kill {len(self.kills)}: {json.dumps(self.kills[-1])}", flush=True)

    def _aim(self, target: str) -> None:
        run = self.start()
        delay = self._random.uniform(0.0, 0.8 * self._spans.get(target, 0.0))
        while run.running:
            if target == "half-written checkpoint" and run.half_written:
                break
            if run.where() == target:
                time.sleep(delay)
                break
            time.sleep(0.0005)
        self._kill(run, f"aimed at {target}")

    def _lies_ahead(self, place: str) -> bool:
        """Whether the run, as it is, will still come to a place."""
        first, second, _ = steps_of_phases(self.options.steps)
        ends = dict(zip(_ONCE, (6, first, first + second), strict=True))
        return newest_step(self.options.out / "killed") < ends.get(place, self.options.steps)

    def _compare(self) -> None:
        """Compare a finished run, and make room for another."""
        alone, killed = self.options.out / "alone", self.options.out / "killed"
        if problems := compare(alone, killed):
            self.problems = problems
            raise SystemExit(f"{killed} differs from {alone}")
        self.compared += 1
        shutil.rmtree(killed)


def newest_step(folder: Path) -> int:
    """Step of the newest checkpoint, 0 without one."""
    names = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    return int(names[-1].removeprefix("step-")) if names else 0


def compare(alone: Path, killed: Path) -> list[str]:
    """Differences between two finished runs, none where they are bitwise equal."""
    problems = []
    last = sorted(path.name for path in (alone / "checkpoints").glob("step-*"))[-1]
    files = [f"checkpoints/{last}/{name}.safetensors" for name in ("weights", "moments")]
    for name in [*files, "checkpoints/best/model.safetensors"]:
        if not (killed / name).is_file() or tensors(alone / name) != tensors(killed / name):
            problems.append(f"{name} differs")
    if records(alone) != records(killed):
        problems.append("metrics.jsonl differs")
    if transcripts(alone) != transcripts(killed):
        problems.append("decoded text differs")
    return problems


def tensors(path: Path) -> dict[str, bytes]:
    """Content of a safetensors file, bit by bit."""
    from safetensors.numpy import load_file

    return {name: value.tobytes() for name, value in load_file(path).items()}


def records(folder: Path) -> list[dict]:
    """Metrics of all steps, without those that measure time or memory."""
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not measures_machine(key)}
        for line in lines
    ]


def measures_machine(key: str) -> bool:
    """Whether a metric tells of the machine and not of the model."""
    return key.split("/")[0] in (*TIMES, "memory", "system", "device", "health")


def transcripts(folder: Path) -> str:
    """What the finished model says about held-out trials, through `b2t evaluate`."""
    out = folder / "decoded.jsonl"
    if not out.is_file():
        command = [sys.executable, "-m", "b2t.cli", "evaluate", folder, "--device", "cpu"]
        done = list(map(str, command))
        subprocess.run(done, check=True, stdout=subprocess.DEVNULL, cwd=REPOSITORY)
        (folder / "predictions.jsonl").replace(out)
    return out.read_text("utf-8")


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
