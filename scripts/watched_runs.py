"""Runs that are watched from outside: left when they are ready, read, and compared."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def leave_when(process: subprocess.Popen, ready: Callable[[], bool], limit: float) -> int:
    """Exit status of a run that is asked to leave once it is ``ready``, or at its limit."""
    deadline = time.monotonic() + limit
    while process.poll() is None and time.monotonic() < deadline and not ready():
        time.sleep(0.05)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def losses(run: Path) -> list[tuple[str, float]]:
    """(phase, total loss) of every log step so far."""
    file = run / "metrics.jsonl"
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    found = []
    for line in lines:
        record = json.loads(line)
        if "loss/total" in record.get("metrics", record):
            metrics = record.get("metrics", record)
            found.append((str(record.get("phase")), float(metrics["loss/total"])))
    return found


def differences(alone: Path, stopped: Path) -> dict[str, Any]:
    """How far the last checkpoints of two runs are apart.

    Raises:
        RuntimeError: one has tensors that the other has not, or they differ beyond fp16 rounding.
    """
    from safetensors.torch import load_file

    last = sorted(path.name for path in (alone / "checkpoints").glob("step-*"))[-1]
    ours, theirs = (
        load_file(run / "checkpoints" / last / "weights.safetensors") for run in (alone, stopped)
    )
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"{last}: other tensors: {sorted(ours.keys() ^ theirs.keys())}")
    equal, greatest = 0, 0.0
    for name, value in ours.items():
        equal += int(value.equal(theirs[name]))
        if value.numel():
            distance = (value.double() - theirs[name].double()).norm()
            greatest = max(greatest, float(distance / value.double().norm().clamp(min=1e-12)))
    found = {"tensors": len(ours), "bitwise equal": equal, "greatest relative difference": greatest}
    if greatest > 0.05:
        raise RuntimeError(f"the runs went apart: {found}")
    return found
