"""Folders that are replaced whole: whenever a process is killed, one of the two is left."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from b2t.run_files import REPLACED, WRITING


def writing(folder: Path) -> Path:
    """Return where the successor of a folder is written."""
    return folder.with_name(f"{WRITING}{folder.name}")


def replace_folder(folder: Path) -> None:
    """Put what was written at `writing(folder)` in the place of ``folder``."""
    replaced = folder.with_name(f"{REPLACED}{folder.name}")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    writing(folder).rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def recover_folder(folder: Path, is_whole: Callable[[Path], bool]) -> None:
    """Undo or end a replacement that a killed process left between its renames.

    Args:
        folder: that may be missing.
        is_whole: whether a successor is written to its end.
    """
    replaced = folder.with_name(f"{REPLACED}{folder.name}")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        return
    with suppress(OSError):  # a folder that cannot be written is named when it is
        if replaced.exists():
            replaced.rename(folder)
        elif writing(folder).exists() and is_whole(writing(folder)):
            writing(folder).rename(folder)


def sync_files(folder: Path) -> None:
    """Make the files of a folder survive a power cut."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    sync_folder(folder)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file that survives a power cut, once its folder is synced too."""
    with path.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def sync_folder(path: Path) -> None:
    """Make renames in a folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
