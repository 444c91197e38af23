"""Trains a little, and writes down who reads tensors in steps that log nothing."""

import functools
import json
import sys
import traceback
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
        if watched.on:  # type: ignore[attr-defined]
            note(name)
        return plain(self, *args, **kwargs)

    return reader


def main() -> int:
    """Train with the probe on in every step but those that log."""
    arguments = entry.parser().parse_intermixed_args()
    run = load_config(arguments.config, arguments.overrides).run.dir
    for name in READERS:
        setattr(torch.Tensor, name, watched(name))
    step, steps = Trainer._step, []

    def probed(self: Trainer, *rest: Any) -> None:
        logs = (self.progress.step + 1) % self.config.log.every == 0
        if logs or self.progress.phase_step + 1 == self.phase.steps:
            return step(self, *rest)
        steps.append(self.progress.step)
        watched.on = True  # type: ignore[attr-defined]
        with Probe():
            step(self, *rest)
        watched.on = False  # type: ignore[attr-defined]

    Trainer._step = probed  # type: ignore[method-assign]
    watched.on = False  # type: ignore[attr-defined]
    status = entry.main()
    report = {"steps": len(steps), "reads": dict(sorted(found.items()))}
    (Path(run) / "reads.json").write_text(json.dumps(report, indent=1), "utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
