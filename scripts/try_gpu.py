"""A first quarter of an hour on a GPU, in one command of eight minutes: is it right, is it fast.

    python scripts/try_gpu.py --write             # all but scale, into results/gpu and RESULTS.md
    python scripts/try_gpu.py --only scale        # one step
    python scripts/try_gpu.py --device cpu --dry  # the same steps, small, where there is no GPU

Each step is a process with a limit of its own; one that fails or is cut off does not stop the
others. What they print lies in results/gpu/<step>.log; checks that failed, the benchmark's times
and the ends of logs of what failed are printed too. results/gpu/summary.md and .json say what
passed, with the device, the versions, and figures of training; --write puts that and the goals of
the benchmark between the markers of kernels/RESULTS.md. The steps, and their seconds:

    device       20  the GPU, its driver, what it reaches, and the versions of what runs on it
    correct     100  the kernels' checks on the device, CUDA graphs; augmentation, attention, CTC
    bench       110  scripts/bench_kernels.py, wall time and host time, from the flagship case on
    train       140  the demo in fp16 on simulated recordings, stopped after two minutes: it saves
    resume      110  a short run stopped by a signal and gone on, beside one left alone: the same?
    scale       120  scripts/bench_train.py with a5500x2 in fp16 beside DDP and Hugging Face's
                     Trainer; memory, measured and planned; where a step waits: results/gpu/scale.md

The exit status is 1 when a step failed.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from step_logs import failing, told
from watched_runs import differences, leave_when, losses

ROOT = Path(__file__).resolve().parent.parent
SAVED = 75
BESIDE = (
    *("data/test_augment_gpu.py", "model/test_packing.py"),
    *("model/test_ctc_gradient.py", "model/test_attention_backends.py"),
)
PROCESSES = max(4, min(8, (os.cpu_count() or 4) // 2))
SHORT = [
    *("phases.0.steps=24", "phases.1.steps=8", "phases.2.steps=16", "phases.0.warmup_steps=4"),
    *("phases.1.warmup_steps=4", "phases.2.warmup_steps=4", "codebook_start.after_steps=4"),
    *("codebook_start.frames_per_code=4", "evaluation.every=1000", "checkpoint.every=1000"),
    "log.every=4",
]
TINY = [
    *("model.encoder.dim=32", "model.encoder.depth=1", "model.quantizer.codebook_size=32"),
    *("model.text_decoder.dim=32", "model.text_decoder.depth=1", "model.text_decoder.ffn_dim=64"),
]
SMALL_BENCH = [
    *("model.encoder.dim=32", "model.encoder.depth=1", "model.encoder.heads=2"),
    *("model.signal_decoder.depth=1", "model.signal_decoder.heads=2", "model.text_decoder.dim=32"),
    *("model.text_decoder.depth=1", "model.text_decoder.heads=2", "model.text_decoder.ffn_dim=64"),
    *("model.quantizer.codebook_size=32", "model.quantizer.codebook_dim=8"),
]
RESULTS = ROOT / "kernels" / "RESULTS.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


@dataclass
class Outcome:
    """What a step came to: ``passed``, ``failed`` or ``cut off``, and what it found."""

    step: str
    status: str
    seconds: float
    found: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """Where everything happens, and on what."""

    out: Path
    device: str
    dry: bool

    @property
    def data(self) -> Path:
        """Prepared recordings."""
        return self.out / "recordings" / "prepared"

    def environment(self) -> dict[str, str]:
        """Variables of every process."""
        paths = os.pathsep.join(
            [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        )
        chosen = {"PYTHONPATH": paths.rstrip(os.pathsep)}
        if self.device == "cpu":
            chosen |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        return {**os.environ, **chosen}

    def start(self, log: str, command: list[str]) -> subprocess.Popen:
        """A process whose output is appended to a log."""
        file = (self.out / f"{log}.log").open("a", encoding="utf-8")
        with file:
            file.write(f"$ {' '.join(command)}\n")
            file.flush()
            return subprocess.Popen(
                command, cwd=ROOT, env=self.environment(), stdout=file, stderr=subprocess.STDOUT
            )

    def run(self, log: str, command: list[str], limit: float) -> int:
        """Exit status of a process.

        Raises:
            subprocess.TimeoutExpired: it took longer than ``limit`` seconds, and was killed.
        """
        process = self.start(log, command)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise

    def run_together(self, commands: dict[str, list[str]], deadline: float) -> dict[str, int]:
        """Exit statuses of processes beside each other, by their logs; 124 where one was killed."""
        processes = {log: self.start(log, command) for log, command in commands.items()}
        statuses = {}
        for log, process in processes.items():
            try:
                statuses[log] = process.wait(max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                statuses[log] = 124
        return statuses

    def training(self, name: str, overrides: list[str]) -> list[str]:
        """Command of a run of the demo's configuration."""
        file = "zero2_cpu" if self.device == "cpu" else "zero2_fp16"
        return [
            *(sys.executable, "train_ds.py", "--config", "demo"),
            *("--deepspeed_config", str(ROOT / "ds_configs" / f"{file}.json")),
            *(f"run.dir={self.out / name}", f"data.path={self.data}", *overrides),
            *(TINY if self.dry else []),
        ]

    def simulated(self, limit: float) -> None:
        """Simulate and prepare recordings, unless they are there."""
        counts = ["40", "8", "8"] if self.dry else ["400", "40", "40"]
        self.recorded("recordings", [*counts, "--electrodes", "64", "--select-from", "128"], limit)

    def recorded(self, name: str, trials: list[str], limit: float) -> Path:
        """Prepared recordings of this name, simulated unless they are there."""
        prepared = self.out / name / "prepared"
        if not (prepared / "b2t.json").exists():
            raw, b2t = str(self.out / name / "simulated"), [sys.executable, "-m", "b2t.cli"]
            simulate = ["simulate", raw, "--force", "--trials", *trials]
            for command in (simulate, ["prepare", raw, str(prepared)]):
                if self.run(name, b2t + command, limit):
                    raise RuntimeError(f"b2t {command[0]} failed: see {name}.log")
        return prepared


def device_step(trial: Trial, limit: float) -> dict[str, Any]:
    """What runs here."""
    code = (
        "import json, torch, triton; from importlib.metadata import version; "
        "gpu = torch.cuda.is_available(); "
        "print('FOUND', json.dumps({'device': torch.cuda.get_device_name() if gpu else 'CPU', "
        "'capability': torch.cuda.get_device_capability() if gpu else None, "
        "'cuda': torch.version.cuda, 'torch': torch.__version__, 'triton': triton.__version__, "
        "'deepspeed': version('deepspeed')}))"
    )
    require(trial.run("device", [sys.executable, "-c", code], limit))
    if shutil.which("nvidia-smi"):
        require(trial.run("device", ["nvidia-smi"], limit))
    limits = [sys.executable, "scripts/card_limits.py", "--device", trial.device]
    small = ["--size", "64", "--megabytes", "1"] if trial.dry else []
    require(trial.run("device", [*limits, *small], limit))
    log = (trial.out / "device.log").read_text("utf-8")
    line = re.search(r"^FOUND (.*)$", log, re.MULTILINE)
    assert line is not None
    return {**json.loads(line[1]), **json.loads(log.strip().rsplit("\n", 1)[-1])}


def correct_step(trial: Trial, limit: float) -> dict[str, Any]:
    """The tests of kernels, augmentation, packed frames, CTC and attention."""
    tests = ROOT / "tests" / "kernels"
    if trial.device == "cuda":
        # Most of the time goes into compiling: several processes share it.
        names = ("kernel_checks.py", "draw_checks.py", "test_kernel_gpu.py")
        places = [tests / name for name in names] + [ROOT / "tests" / name for name in BESIDE]
        chosen = ["-v", "-k", "not test_kernels_on_the_gpu", "--numprocesses", str(PROCESSES)]
    else:
        places, chosen = [tests], ["-k", "test_kernel_ops and mistakes"] if trial.dry else []
    command = [sys.executable, "-m", "pytest", "-o", "addopts=--import-mode=importlib"]
    command += ["-p", "no:cacheprovider", *map(str, places), *chosen]
    status = trial.run("correct", command, limit)
    log = (trial.out / "correct.log").read_text("utf-8").strip()
    last = log.rsplit("\n", 1)[-1]
    require(status, ", ".join([last, *(name.split(" - ")[0] for name in failing(log))]))
    if " passed" not in last:
        raise RuntimeError(f"no check ran: {last}")
    return {"pytest": last}


def bench_step(trial: Trial, limit: float) -> dict[str, Any]:
    """The benchmark, which checks every case before it times it."""
    command = [sys.executable, "scripts/bench_kernels.py", "--device", trial.device]
    command += ["--out", str(trial.out), "--budget", str(0.75 * limit)]
    require(trial.run("bench", command + (["--tiny"] if trial.dry else []), limit))
    return {"table": "bench_kernels.md"}


def train_step(trial: Trial, limit: float) -> dict[str, Any]:
    """Train until the time is nearly over, then ask the run to save and leave."""
    began = time.monotonic()
    trial.simulated(limit / 2)
    process = trial.start("train", trial.training("train", SHORT if trial.dry else ["log.every=5"]))
    status = leave_when(process, lambda: False, 0.85 * limit - (time.monotonic() - began))
    require(status not in (0, SAVED), f"status {status}")
    steps = losses(trial.out / "train")
    if len(steps) < 4:
        raise RuntimeError(f"{len(steps)} records of a loss: see train.log")
    first, last = steps[0], steps[-1]
    quarter = max(1, len(steps) // 4)
    early = sum(loss for _, loss in steps[:quarter]) / quarter
    late = sum(loss for _, loss in steps[-quarter:]) / quarter
    same_phase = [phase for phase, _ in steps]
    found = {"records": len(steps), "first loss": first[1], "last loss": last[1]}
    if len(set(same_phase)) == 1 and not late < early:
        raise RuntimeError(f"the loss did not fall: {early:.4f}, then {late:.4f}")
    return found


def resume_step(trial: Trial, limit: float) -> dict[str, Any]:
    """One run left alone, one stopped by SIGTERM and gone on: largest difference at the end."""
    deadline = time.monotonic() + limit

    def left() -> float:
        return max(1.0, deadline - time.monotonic())

    trial.simulated(limit / 2)
    alone = trial.start("resume-alone", trial.training("alone", SHORT))
    try:
        process = trial.start("resume", trial.training("stopped", SHORT))
        status = leave_when(process, lambda: len(losses(trial.out / "stopped")) >= 3, left())
        require(status != SAVED, f"stopped with status {status}, expected {SAVED}")
        require(trial.run("resume", trial.training("stopped", SHORT), left()))
        require(alone.wait(left()))
    finally:
        alone.kill()
    return differences(trial.out / "alone", trial.out / "stopped")


def scale_step(trial: Trial, limit: float) -> dict[str, Any]:
    """Throughput beside other loops, then memory beside them and the plan, and waits in a step."""
    began = time.monotonic()
    electrodes = "4" if trial.dry else "256"
    counts = ["24", "4", "4"] if trial.dry else ["128", "8", "8"]
    data = trial.recorded("wide", [*counts, "--electrodes", electrodes], limit / 2)
    bench = scale_command(trial, data)
    cases = {"scale": [*bench, *scale_sizes(trial.dry), *scale_cases(limit)]}
    statuses = trial.run_together(cases, began + 0.72 * limit)
    memory = [*bench, "--segments", "2", "--warmup", "1", "--alone", "b2t"]
    memory += ["ddp", "hf"] if trial.device == "cuda" else []
    plan = [sys.executable, "scripts/measure_plan.py"]
    plan += ["a5500x2", "t15", "a5500x2, activations kept"] if not trial.dry else ["demo"]
    shutil.rmtree(trial.out / "reads", ignore_errors=True)
    reads = trial.training("reads", [*SHORT, "log.every=50", f"data.path={data}"])
    reads[1] = "tests/distributed/reads_driver.py"
    beside = {"scale-memory": memory, "scale-plan": plan, "scale-reads": reads}
    statuses |= trial.run_together(beside, began + limit)
    logs = {name: (trial.out / f"{name}.log").read_text("utf-8") for name in ("scale", *beside)}
    waits = trial.out / "reads" / "reads.json"
    logs["waits for the device"] = waits.read_text("utf-8") if waits.exists() else "none counted"
    text = "\n".join(f"## {name}\n\n```\n{log.strip()}\n```\n" for name, log in logs.items())
    (trial.out / "scale.md").write_text(text, "utf-8")
    failed = [name for name, code in statuses.items() if code]
    require(bool(failed), f"{', '.join(failed)}: see scale.md")
    return {"table": "scale.md"}


def scale_command(trial: Trial, data: Path) -> list[str]:
    """What all runs of the throughput's benchmark have in common: one step a batch, in fp16."""
    file = "zero2_cpu" if trial.device == "cpu" else "zero2_fp16"
    content = json.loads((ROOT / "ds_configs" / f"{file}.json").read_text("utf-8"))
    content |= {
        "train_micro_batch_size_per_gpu": 4 if trial.dry else 32,
        "gradient_accumulation_steps": 1,
    }
    if "fp16" in content:
        content["fp16"]["initial_scale_power"] = 12  # few steps are skipped on the way down
    chosen = trial.out / "scale.json"
    chosen.write_text(json.dumps(content, indent=1), "utf-8")
    return [
        *(sys.executable, "scripts/bench_train.py", "--phases", "2", "--config", "a5500x2"),
        *("--deepspeed_config", str(chosen), "--data", str(data)),
        # Other loops do not go backward by deterministic algorithms alone, as training does.
        *("run.deterministic=false", "model.quantizer.kmeans_init=false"),
        *(SMALL_BENCH if trial.dry else []),
    ]


def scale_cases(limit: float) -> list[str]:
    """One case for each loop, then one for each thing that can be switched."""
    return [
        *("--one-by-one", "--against", "ddp", "hf", "--compile", "off", "on"),
        *("--checkpointing", "off", "on", "--kernels", "kernels", "reference"),
        *("--budget", str(0.5 * limit)),
    ]


def scale_sizes(dry: bool) -> list[str]:
    """How many steps are timed."""
    segments, warmup, length = ("2", "1", "1") if dry else ("8", "3", "4")
    return ["--segments", segments, "--warmup", warmup, "--length", length]


def require(failed: int | bool, why: str = "") -> None:
    """Refuse a status other than 0."""
    if failed:
        raise RuntimeError(why or f"status {int(failed)}")


STEPS: dict[str, tuple[Callable[[Trial, float], dict[str, Any]], float]] = {
    "device": (device_step, 20),
    "correct": (correct_step, 100),
    "bench": (bench_step, 110),
    "train": (train_step, 140),
    "resume": (resume_step, 110),
    "scale": (scale_step, 120),
}

BY_NAME = ("scale",)
"""Steps that run when they are asked for."""


def attempt(name: str, trial: Trial, limit: float) -> Outcome:
    """Do one step; whatever it meets becomes its outcome."""
    began = time.monotonic()
    try:
        status, found = "passed", STEPS[name][0](trial, limit)
    except subprocess.TimeoutExpired:
        status, found = "cut off", {"limit": limit}
    except Exception as error:
        status, found = "failed", {"why": f"{type(error).__name__}: {error}"}
    return Outcome(name, status, round(time.monotonic() - began, 1), found)


def summary(outcomes: list[Outcome]) -> str:
    """The outcomes as Markdown."""
    rows = ["| step | outcome | seconds | found |", "|---|---|---|---|"]
    for each in outcomes:
        found = ", ".join(f"{key} {value}" for key, value in each.found.items())
        rows.append(f"| {each.step} | {each.status} | {each.seconds} | {found} |")
    return "\n".join(rows) + "\n"


def measured(outcomes: list[Outcome], out: Path) -> str:
    """What goes into kernels/RESULTS.md: device and versions, the outcomes, the benchmark."""
    device = next((each.found for each in outcomes if each.step == "device"), {})
    head = ", ".join(f"{name} {value}" for name, value in device.items())
    lines = [f"{datetime.now(timezone.utc):%Y-%m-%d}: {head}.", "", summary(outcomes)]
    table = out / "bench_kernels.md"
    if any(each.step == "bench" and each.status == "passed" for each in outcomes):
        lines.append(table.read_text("utf-8"))
    return "\n".join(lines).rstrip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--dry", action="store_true", help="small everything")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=STEPS,
        default=[step for step in STEPS if step not in BY_NAME],
        help="steps",
    )
    parser.add_argument("--write", action="store_true", help="update kernels/RESULTS.md")
    parser.add_argument("--patience", type=float, default=1.0, help="factor on all limits")
    options = parser.parse_args(argv)
    if options.write and (options.device == "cpu" or options.dry):
        parser.error("--write is for what a GPU measured")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    trial = Trial(out, options.device, options.dry)
    outcomes = []
    for name in options.only:
        for old in (*out.glob(f"{name}*.log"), out / "train" if name == "train" else out / "none"):
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        if name == "resume":
            for run in ("alone", "stopped"):
                shutil.rmtree(out / run, ignore_errors=True)
        outcomes.append(attempt(name, trial, STEPS[name][1] * options.patience))
        passed = outcomes[-1].status == "passed"
        said = [*told(out, name, passed), summary(outcomes[-1:]).splitlines()[-1]]
        print("\n".join(said), flush=True)
        (out / "summary.md").write_text(summary(outcomes), "utf-8")
        (out / "summary.json").write_text(
            json.dumps([asdict(o) for o in outcomes], indent=1), "utf-8"
        )
    print(summary(outcomes))
    if options.write:
        from kernel_resources import write_between_markers

        write_between_markers(RESULTS, measured(outcomes, out), BEGIN, END)
    return 1 if any(each.status != "passed" for each in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
