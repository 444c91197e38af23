"""Whether two finished runs are bitwise equal, but for what tells of the machine."""

import json
import subprocess
import sys
from pathlib import Path

from soaking.runs import REPOSITORY

TIMES = ("time", "throughput", "time_s")
"""First parts of the names of metrics that measure time."""


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
