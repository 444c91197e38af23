"""Checkpoints: whole, checked, independent of the number of ranks, and free of pickles.

A checkpoint is a folder `checkpoints/step-00000200/` of

    weights.safetensors    float32 masters of all parameters, and all buffers (codebooks)
    moments.safetensors    Adam's moments of the current phase by name, whole; tensors of hooks
    state.json             progress, engine counters, callbacks, configuration, versions
    manifest.json          size and SHA-256 of each file

It is written beside its place, synced and renamed; `latest` is replaced last. DeepSpeed's own
format is not used: it is a set of pickles tied to the number of ranks, not atomic, and its
conversion for another number of ranks drops buffers.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from b2t import manifest
from b2t.errors import UserError
from b2t.log import logger
from b2t.run_files import (
    BEST,
    MODEL_FILE,
    MOMENTS_FILE,
    REPLACED,
    STATE_FILE,
    STEP_PREFIX,
    WEIGHTS_FILE,
    WRITING,
)
from b2t.train.replacing import (
    recover_folder,
    replace_folder,
    sync_folder,
    write_synced,
    writing,
)
from b2t.train.safetensors_file import write_safetensors

LATEST = "latest"
KEEP = "keep"
"""Name of an empty file in checkpoints that are never removed."""
_STEP = re.compile("[0-9]{8,}")
_FILES = (WEIGHTS_FILE, MOMENTS_FILE, STATE_FILE)


@dataclass
class Checkpoint:
    """One moment of a run: everything that the next step depends on."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    state: dict[str, Any]


class CheckpointStore:
    """The `checkpoints/` folder of a run; only rank 0 writes.

    Args:
        folder: where checkpoints live.
        keep: most recent checkpoints that are kept, besides those that hold a file `keep`.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = Path(folder)
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        found = self.folder.glob(f"{STEP_PREFIX}*") if self.folder.is_dir() else []
        numbers = [path.name.removeprefix(STEP_PREFIX) for path in found if path.is_dir()]
        return sorted(int(number) for number in numbers if _STEP.fullmatch(number))

    def save(
        self,
        step: int,
        checkpoint: Checkpoint,
        milestone: bool = False,
        spare: Collection[int] = (),
    ) -> Path | None:
        """Write a checkpoint; on a full disk say so, keep the older ones and return None.

        Args:
            step: applied steps of the run.
            checkpoint: what to write.
            milestone: never to be removed, as the end of a phase; so is what replaces one.
            spare: steps of older checkpoints that are still needed.
        """
        target = self.folder / f"{STEP_PREFIX}{step:08d}"
        partial = writing(target)
        try:
            self._clear_unfinished()
            partial.mkdir(parents=True)
            if milestone or (target / KEEP).exists():
                (partial / KEEP).touch()
            _write(partial, checkpoint)
            replace_folder(target)
            _replace_text(self.folder / LATEST, target.name + "\n")
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            kept = self.steps()
            logger(__name__).error(
                "checkpoint at step %d could not be written (%s): training goes on, the newest "
                "checkpoint is %s; free space on %s",
                step,
                error,
                f"step {kept[-1]}" if kept else "none",
                self.folder,
            )
            return None
        self._remove_old(spare)
        return target

    def _remove_old(self, spare: Collection[int]) -> None:
        folders = {step: self.folder / f"{STEP_PREFIX}{step:08d}" for step in self.steps()}
        passing = [step for step, folder in folders.items() if not (folder / KEEP).exists()]
        for step in passing[: -self.keep]:
            if step not in spare:
                shutil.rmtree(folders[step], ignore_errors=True)

    def _clear_unfinished(self) -> None:
        """Remove what a killed process left half written."""
        for path in self.folder.glob(f"{WRITING}{STEP_PREFIX}*"):
            shutil.rmtree(path, ignore_errors=True)

    def recover(self) -> None:
        """Put back what a killed process was about to replace; rank 0 only."""
        for path in self.folder.glob(f"{REPLACED}*"):
            recover_folder(path.with_name(path.name.removeprefix(REPLACED)), is_whole)
        recover_folder(self.folder / BEST, is_whole)

    def read(self, step: int) -> Checkpoint | None:
        """Read the checkpoint of a step; None where it is not there or damaged, and says so."""
        path = self.folder / f"{STEP_PREFIX}{step:08d}"
        problem = find_problem(path)
        if problem is None:
            return _read(path)
        logger(__name__).error("checkpoint %s cannot be read: %s", path, problem)
        return None

    def load(self) -> Checkpoint | None:
        """Read the newest whole checkpoint; torn ones are named and passed over.

        Raises:
            UserError: there are checkpoints, and none is whole.
        """
        steps = self.steps()
        for step in reversed(steps):
            path = self.folder / f"{STEP_PREFIX}{step:08d}"
            problem = find_problem(path)
            if problem is None:
                return _read(path)
            logger(__name__).error(
                "checkpoint %s is damaged (%s): trying the one before", path, problem
            )
        if steps:
            raise UserError(
                f"{self.folder}: none of the {len(steps)} checkpoints is whole; restore one from a "
                "copy, or start again with another run.dir"
            )
        return None


def find_problem(path: Path) -> str | None:
    """Compare a checkpoint with its manifest; None means whole."""
    return manifest.find_problem(path, _FILES)


def is_whole(model: Path) -> bool:
    """Whether a saved model is written to its end."""
    return manifest.find_problem(model, (MODEL_FILE,)) is None


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    state = json.dumps(checkpoint.state, indent=1).encode()
    write_synced(folder / STATE_FILE, state)
    weights, moments = _on_the_cpu(checkpoint.weights), _on_the_cpu(checkpoint.moments)
    manifest.write_entries(
        folder,
        {
            WEIGHTS_FILE: write_safetensors(folder / WEIGHTS_FILE, weights),
            MOMENTS_FILE: write_safetensors(folder / MOMENTS_FILE, moments),
            STATE_FILE: (len(state), hashlib.sha256(state).hexdigest()),
        },
    )
    with (folder / manifest.MANIFEST).open("rb") as handle:
        os.fsync(handle.fileno())
    sync_folder(folder)


def _read(path: Path) -> Checkpoint:
    try:
        return Checkpoint(
            weights=load_file(path / WEIGHTS_FILE),
            moments=load_file(path / MOMENTS_FILE),
            state=json.loads((path / STATE_FILE).read_text("utf-8")),
        )
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _on_the_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def _replace_text(path: Path, text: str) -> None:
    partial = path.with_name(f"{WRITING}{path.name}")
    write_synced(partial, text.encode())
    partial.replace(path)
    sync_folder(path.parent)
