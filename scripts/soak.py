"""Kill a run at random moments, again and again, and compare it with one never interrupted.

    python scripts/soak.py --kills 60 --out runs/soak

Two ranks train a small model on simulated recordings and save every few steps. All ranks get
SIGKILL at a random moment, wherever they are: start, k-means, a step, a save, a validation, a phase
change. The same command follows. At the end weights, codebooks, losses, monitors' metrics and
decoded text must be bitwise those of the run that was left alone. Exit status 1 where they are not.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
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

OVERRIDES = """
    model.encoder.dim=32 model.encoder.depth=1 model.encoder.heads=2 model.signal_decoder.depth=1
    model.signal_decoder.heads=2 model.text_decoder.dim=32 model.text_decoder.depth=1
    model.text_decoder.heads=2 model.text_decoder.ffn_dim=64 model.text_decoder.tokenizer=byte
    model.quantizer.codebook_size=32 model.quantizer.num_quantizers=2 data.max_text_tokens=128
    optim.weight_ema=0.9
    codebook_start.after_steps=6 codebook_start.frames_per_code=4 evaluation.every=9
    evaluation.decode_trials=4 evaluation.max_trials=8 evaluation.max_new_tokens=8
    checkpoint.every=4 log.every=1 log.report=false log.progress=false run.seed=5
""".split()  # noqa: SIM905


def main() -> int:
    """Run the comparison; return the exit status."""
    options = arguments()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    data = simulate(options.out)
    (options.out / "ds.json").write_text(json.dumps(DS_CONFIG), "utf-8")
    ranks = Ranks(options, data, "alone")
    wait_for_start(ranks)
    began = time.monotonic()
    status = finish(ranks)
    seconds = time.monotonic() - began
    if status != EXIT_OK:
        print(f"the run that is left alone failed with status {status}")
        return 1
    print(f"left alone: {seconds:.0f} s of training", flush=True)
    killed = kill_and_resume(options, data, seconds)
    problems = compare(options.out / "alone", options.out / "killed")
    record = {"kills": killed, "seconds_alone": round(seconds, 1), "problems": problems}
    (options.out / "soak.json").write_text(json.dumps(record, indent=1), "utf-8")
    print("\n".join(problems) or f"{len(killed)} kills: bitwise equal to the run left alone")
    return 1 if problems else 0


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=60, help="SIGKILLs of all ranks")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60, help="steps of all phases together")
    parser.add_argument("--minutes", type=float, default=120.0, help="give up after so long")
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


class Ranks:
    """All ranks of one run, started without a launcher so that nothing restarts or cleans up."""

    def __init__(self, options: argparse.Namespace, data: Path, name: str) -> None:
        self.folder = options.out / name
        self.started = time.time()
        port = free_port()
        steps = [options.steps // 2, options.steps // 4, options.steps - options.steps * 3 // 4]
        self.processes = []
        for rank in range(options.ranks):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(options.ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "B2T_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
                "CUDA_VISIBLE_DEVICES": "",
            }
            command = [
                *(sys.executable, str(REPOSITORY / "train_ds.py"), "--config", "demo"),
                *("--deepspeed_config", str(options.out / "ds.json")),
                *(f"run.dir={self.folder}", f"data.path={data}", *OVERRIDES),
                *(f"phases.{number}.steps={count}" for number, count in enumerate(steps)),
            ]
            log = (options.out / f"{name}-rank{rank}.log").open("ab")
            self.processes.append(
                subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=log, stderr=log)
            )
            log.close()

    def poll(self) -> list[int | None]:
        """Exit statuses, None where a rank still runs."""
        return [process.poll() for process in self.processes]

    def kill(self) -> None:
        """SIGKILL to all, and wait until they are gone."""
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()


def finish(ranks: Ranks) -> int:
    """Wait for a run; return its worst exit status."""
    while None in ranks.poll():
        time.sleep(0.05)
        if any(status not in (None, EXIT_OK) for status in ranks.poll()):
            time.sleep(2.0)
            ranks.kill()
    return max((abs(status) for status in ranks.poll() if status), default=EXIT_OK)


def newest_step(folder: Path) -> int:
    """Step of the newest checkpoint, 0 without one."""
    names = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    return int(names[-1].removeprefix("step-")) if names else 0


def wait_for_start(ranks: Ranks) -> None:
    """Wait until a run has read its checkpoint and is about to train."""
    file = ranks.folder / "config.yaml"
    while None in ranks.poll() and not (file.exists() and file.stat().st_mtime > ranks.started):
        time.sleep(0.005)


def saving(ranks: Ranks) -> bool:
    """Whether a checkpoint or an export of these ranks is half written."""
    for path in (ranks.folder / "checkpoints").glob(".writing-*"):
        with suppress(FileNotFoundError):
            if path.stat().st_mtime > ranks.started:
                return True
    return False


def wait_for_save(ranks: Ranks) -> None:
    """Wait until a run writes a checkpoint."""
    while None in ranks.poll() and not saving(ranks):
        time.sleep(0.001)


def kill_and_resume(options: argparse.Namespace, data: Path, seconds: float) -> list[dict]:
    """Kill the run `--kills` times, then let it finish; return what each kill hit.

    Most kills fall within the time that half of the training takes, counted from its start or
    resume; one in eight may fall earlier, and one in four waits for a save. A run that finishes
    before the kills are used up must be equal too; a new one takes the rest.
    """
    generator = random.Random(options.seed)
    deadline = time.monotonic() + 60 * options.minutes
    kills: list[dict] = []
    while len(kills) < options.kills and time.monotonic() < deadline:
        ranks = Ranks(options, data, "killed")
        if generator.random() < 1 / 8:
            moment = time.monotonic() + generator.uniform(0.0, seconds)
        else:
            wait_for_start(ranks)
            moment = time.monotonic() + generator.uniform(0.0, 0.5 * seconds)
        while time.monotonic() < moment and None in ranks.poll():
            time.sleep(0.002)
        if generator.random() < 1 / 4:
            wait_for_save(ranks)
            time.sleep(generator.uniform(0.0, 0.02))
        if None not in ranks.poll():
            if any(ranks.poll()):
                raise SystemExit(f"a resumed run failed with statuses {ranks.poll()}")
            start_over(options)
            continue
        ranks.kill()
        writing = saving(ranks)
        kills.append({"step": newest_step(options.out / "killed"), "while_saving": writing})
        print(f"kill {len(kills)}: {kills[-1]}", flush=True)
    status = finish(Ranks(options, data, "killed"))
    if status != EXIT_OK:
        raise SystemExit(f"the last resume failed with status {status}")
    return kills


def start_over(options: argparse.Namespace) -> None:
    """Compare a finished run, and make room for another."""
    problems = compare(options.out / "alone", options.out / "killed")
    if problems:
        raise SystemExit("\n".join(problems))
    shutil.rmtree(options.out / "killed")


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
    command = [sys.executable, "-m", "b2t.cli", "evaluate", folder, "--device", "cpu"]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, cwd=REPOSITORY)
    found = folder / "predictions.jsonl"
    found.replace(out)
    return out.read_text("utf-8")


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
