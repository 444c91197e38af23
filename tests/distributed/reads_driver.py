"""Trains a little, and writes down who reads tensors in steps that log nothing.

On a GPU torch itself says where the host waits for it:

    python tests/distributed/reads_driver.py --config demo \\
        --deepspeed_config ds_configs/zero2_fp16.json run.dir=RUN data.path=PREPARED log.every=20 \\
        phases.0.steps=60 … ; cat RUN/reads.json
"""

import contextlib
import functools
import json
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import b2t
import b2t_kernels
from b2t.config import load_config
from b2t.train import main as entry
from b2t.train.trainer import Trainer

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal")
"""Operations whose result or its shape the CPU must know: on a GPU they wait for it."""

READERS = ("tolist", "numpy", "cpu")
"""The same as methods, which on the CPU dispatch nothing."""

MAKERS = ("tensor", "as_tensor")
"""Functions that copy what the host has to a device, and wait until it is there."""

found: dict[str, int] = {}


def note(kind: str) -> None:
    """Count one read for the innermost caller in this package, or in DeepSpeed."""
    frames = traceback.extract_stack()
    for package in (b2t, b2t_kernels, deepspeed, torch, transformers):
        # By the package's own place: a checkout may be named like one.
        part = f"{Path(package.__file__).parent}/"
        for frame in reversed(frames):
            if frame.filename.startswith(part):
                place = f"{package.__name__}/{frame.filename.removeprefix(part)}"
                key = f"{place}:{frame.name}"
                found[key] = found.get(key, 0) + 1
                return
    found[kind] = found.get(kind, 0) + 1


class Probe(TorchDispatchMode):
    """Notes operations that wait."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function.overloadpacket.__name__ in WAITING:
            note(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def watched(name: str) -> Any:
    """A reader of tensors that notes who calls it while a probe is on."""
    plain = getattr(torch.Tensor, name)

    @functools.wraps(plain)
    def reader(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if watched.on and not torch.cuda.is_available():  # type: ignore[attr-defined]
            note(name)
        return plain(self, *args, **kwargs)

    return reader


def watched_maker(name: str) -> Any:
    """A function that makes tensors, which notes who has it copy numbers to a device."""
    plain = getattr(torch, name)

    @functools.wraps(plain)
    def maker(data: Any, *args: Any, **kwargs: Any) -> Any:
        placed = kwargs.get("device") is not None and not isinstance(data, torch.Tensor)
        if watched.on and placed and not torch.cuda.is_available():  # type: ignore[attr-defined]
            note(name)
        return plain(data, *args, **kwargs)

    return maker


def say_of_waits(message: Any, *rest: Any, **more: Any) -> None:
    """Note the caller where torch warns that the host waits for the GPU; show other warnings."""
    if "called a synchronizing CUDA operation" in str(message):
        if watched.on:  # type: ignore[attr-defined]
            note("wait")
    else:
        _shown(message, *rest, **more)


_shown = warnings.showwarning


def main() -> int:
    """Train with the probe on in every step but those that log."""
    arguments = entry.parser().parse_intermixed_args()
    run = load_config(arguments.config, arguments.overrides).run.dir
    for name in READERS:
        setattr(torch.Tensor, name, watched(name))
    for name in MAKERS:
        setattr(torch, name, watched_maker(name))
    gpu = torch.cuda.is_available()
    if gpu:
        warnings.simplefilter("always")
        warnings.showwarning = say_of_waits
    step, steps = Trainer._step, []

    def probed(self: Trainer, *rest: Any) -> None:
        logs = (self.progress.step + 1) % self.config.log.every == 0
        if logs or self.progress.phase_step + 1 == self.phase.steps:
            return step(self, *rest)
        steps.append(self.progress.step)
        watched.on = True  # type: ignore[attr-defined]
        if gpu:
            torch.cuda.set_sync_debug_mode("warn")
        with contextlib.nullcontext() if gpu else Probe():
            step(self, *rest)
        if gpu:
            torch.cuda.set_sync_debug_mode("default")
        watched.on = False  # type: ignore[attr-defined]

    Trainer._step = probed  # type: ignore[method-assign]
    watched.on = False  # type: ignore[attr-defined]
    status = entry.main()
    report = {"steps": len(steps), "reads": dict(sorted(found.items()))}
    (Path(run) / "reads.json").write_text(json.dumps(report, indent=1), "utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
