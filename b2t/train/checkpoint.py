"""Checkpoints: whole, checked, independent of the number of ranks, and free of pickles.

A checkpoint is a folder `checkpoints/step-00000200/` of

    weights.safetensors    float32 masters of all parameters, and all buffers (codebooks)
    moments.safetensors    Adam's moments of the current phase, whole tensors by name
    state.json             progress, engine counters, callbacks, configuration, versions
    manifest.json          size and SHA-256 of each file

It is written beside its place, synced and renamed; `latest` is replaced last. DeepSpeed's own
format is not used: it is a set of pickles tied to the number of ranks, not atomic, and its
conversion for another number of ranks drops buffers.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from b2t import manifest
from b2t.errors import UserError
from b2t.log import logger

LATEST = "latest"
KEEP = "keep"
"""Name of an empty file in checkpoints that are never removed."""
BEST = "best"
_PREFIX = "step-"
_PARTIAL = ".writing-"
_REPLACED = ".replaced-"
_STEP = re.compile("[0-9]{8,}")
_FILES = ("weights.safetensors", "moments.safetensors", "state.json")


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
        found = self.folder.glob(f"{_PREFIX}*") if self.folder.is_dir() else []
        numbers = [path.name.removeprefix(_PREFIX) for path in found if path.is_dir()]
        return sorted(int(number) for number in numbers if _STEP.fullmatch(number))

    def save(self, step: int, checkpoint: Checkpoint, milestone: bool = False) -> Path | None:
        """Write a checkpoint; on a full disk say so, keep the older ones and return None.

        Args:
            step: applied steps of the run.
            checkpoint: what to write.
            milestone: never to be removed, as the end of a phase; so is what replaces one.
        """
        target = self.folder / f"{_PREFIX}{step:08d}"
        partial = self.folder / f"{_PARTIAL}{target.name}"
        replaced = self.folder / f"{_REPLACED}{target.name}"
        try:
            self._clear_unfinished()
            partial.mkdir(parents=True)
            if milestone or (target / KEEP).exists():
                (partial / KEEP).touch()
            _write(partial, checkpoint)
            if target.exists():
                target.rename(replaced)
            partial.rename(target)
            sync_folder(self.folder)
            _replace_text(self.folder / LATEST, target.name + "\n")
            shutil.rmtree(replaced, ignore_errors=True)
        except (OSError, SafetensorError) as error:
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
        self._remove_old()
        return target

    def _remove_old(self) -> None:
        folders = [self.folder / f"{_PREFIX}{step:08d}" for step in self.steps()]
        passing = [folder for folder in folders if not (folder / KEEP).exists()]
        for old in passing[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def _clear_unfinished(self) -> None:
        """Remove what a killed process left half written."""
        for path in self.folder.glob(f"{_PARTIAL}{_PREFIX}*"):
            shutil.rmtree(path, ignore_errors=True)

    def recover(self) -> None:
        """Put back a checkpoint that a killed process was about to replace; rank 0 only."""
        for path in self.folder.glob(f"{_REPLACED}{_PREFIX}*"):
            place = path.with_name(path.name.removeprefix(_REPLACED))
            if place.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):  # a folder that cannot be written is named when it is
                    path.rename(place)

    def load(self) -> Checkpoint | None:
        """Read the newest whole checkpoint; torn ones are named and passed over.

        Raises:
            UserError: there are checkpoints, and none is whole.
        """
        steps = self.steps()
        for step in reversed(steps):
            path = self.folder / f"{_PREFIX}{step:08d}"
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


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    save_file(_contiguous(checkpoint.weights), folder / "weights.safetensors")
    save_file(_contiguous(checkpoint.moments), folder / "moments.safetensors")
    (folder / "state.json").write_text(json.dumps(checkpoint.state, indent=1), "utf-8")
    manifest.write_manifest(folder, _FILES)
    for file in folder.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    sync_folder(folder)


def _read(path: Path) -> Checkpoint:
    try:
        return Checkpoint(
            weights=load_file(path / "weights.safetensors"),
            moments=load_file(path / "moments.safetensors"),
            state=json.loads((path / "state.json").read_text("utf-8")),
        )
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _replace_text(path: Path, text: str) -> None:
    partial = path.with_name(f"{_PARTIAL}{path.name}")
    with partial.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make renames in a folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
