"""Many small values of HDF5: h5py's own objects take ten times as long to make as to read.

What is unusual (texts, links, references) goes h5py's usual way.
"""

import math
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np

NUMBERS = (h5py.h5t.INTEGER, h5py.h5t.FLOAT)
_FLOAT32 = h5py.h5t.IEEE_F32LE


def attribute(group: h5py.Group, name: str, default: Any = None) -> Any:
    """Return an attribute of ``group``, ``default`` where there is none; one number as float64."""
    try:
        found = h5py.h5a.open(group.id, name.encode())
    except KeyError:
        return default
    value = np.empty(())
    try:
        if found.shape == ():
            found.read(value)
            return value[()]
    except (OSError, TypeError, ValueError):  # a text
        pass
    return group.attrs[name]


def member(group: h5py.Group, name: str) -> Any:
    """Return the identifier (`h5py.h5d.DatasetID` …) of what is in ``group``, None for nothing."""
    try:
        return h5py.h5o.open(group.id, name.encode())
    except KeyError:
        return None


def is_of(dataset: h5py.h5d.DatasetID, kinds: tuple[int, ...]) -> bool:
    """Whether values are of classes of types such as `h5py.h5t.INTEGER`."""
    return dataset.get_type().get_class() in kinds


def place_of_float32(dataset: h5py.h5d.DatasetID, shape: tuple[int, ...]) -> int | None:
    """Return the byte at which values begin that lie in the file one after another, as float32.

    None for what is compressed, in pieces, in other files, of another type, or not written yet.
    """
    start = dataset.get_offset()
    if start is None or dataset.get_storage_size() != 4 * math.prod(shape):
        return None
    return int(start) if dataset.get_type().equal(_FLOAT32) else None


class PlainFile:
    """Values of a file by their place, as `place_of_float32` tells: one copy and no library."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)

    def read(self, place: int, bins: int, channels: int) -> np.ndarray:
        """Return float32 [bins, channels] from byte ``place`` on.

        Raises:
            OSError: the file ends before.
        """
        values = np.empty((bins, channels), np.float32)
        rest = values.data.cast("B")
        while rest:
            got = os.preadv(self._file.fileno(), [rest], place)
            if not got:
                raise OSError(f"the file ends at byte {place}, within the trial")
            rest, place = rest[got:], place + got
        return values

    def close(self) -> None:
        """Give the file back."""
        self._file.close()
