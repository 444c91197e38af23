"""A look at the heaps of an HDF5 file before it is read: libhdf5 can walk a damaged one for ever.

Texts of variable length lie in global heaps, collections of objects one after another (HDF5 File
Format Specification 3.0, III.E). An object of free space and size 0 never leads to the next one.
"""

import contextlib
import mmap
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import h5py

from b2t.errors import UserError

_SIGNATURE = b"GCOL\x01\0\0\0"
_SIZE = struct.Struct("<Q")
_OBJECT = struct.Struct("<HHIQ")
_WORTH = 1 << 14
"""Bytes of values that are worth passing over."""
_HEADER = len(_SIGNATURE) + _SIZE.size


def require_sound_heaps(path: Path) -> None:
    """Refuse a file with a global heap whose objects do not follow one another.

    Values of datasets that lie in one piece are passed over: they may be anything, and are most of
    a file.

    Raises:
        UserError: names the file and the place.
    """
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for place in _heaps(content, _between(_values(path), len(content))):
                if not _is_sound(content, place):
                    raise UserError(
                        f"{path} cannot be read as HDF5 (its heap at byte {place} is damaged): the "
                        "download may be incomplete; fetch it again"
                    )


def _heaps(content: mmap.mmap, stretches: Iterable[tuple[int, int]]) -> Iterator[int]:
    """Yield where heaps begin within ``stretches`` (first byte, end)."""
    for start, stop in stretches:
        place = start - 1
        while (place := content.find(_SIGNATURE, place + 1, stop + len(_SIGNATURE) - 1)) >= 0:
            yield place


def _values(path: Path) -> list[tuple[int, int]]:
    """Return where values of datasets lie in one piece: names and headers need no global heap."""
    found: list[tuple[int, int]] = []

    def note(name: bytes) -> None:
        with contextlib.suppress(KeyError):  # a group
            dataset = h5py.h5d.open(file.id, name)
            start, size = dataset.get_offset(), dataset.get_storage_size()
            if start is not None and size >= _WORTH:
                found.append((start, start + size))

    try:
        with h5py.File(path, "r") as file:
            h5py.h5o.visit(file.id, note)
    except Exception:  # h5py's own, by what is damaged; then all is looked at
        return []
    return found


def _between(taken: list[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """Yield the stretches of ``size`` bytes that are not ``taken``."""
    end = 0
    for start, stop in sorted(taken):
        if start > end:
            yield end, start
        end = max(end, stop)
    if end < size:
        yield end, size


def _is_sound(content: mmap.mmap, start: int) -> bool:
    if start + _HEADER > len(content):
        return False
    (size,) = _SIZE.unpack(content[start + len(_SIGNATURE) : start + _HEADER])
    stop = start + size
    if size < _HEADER or stop > len(content):
        return False
    place = start + _HEADER
    while place + _OBJECT.size <= stop:
        index, _, _, length = _OBJECT.unpack(content[place : place + _OBJECT.size])
        # The size of free space, index 0, counts its header; others are padded to 8 bytes.
        needed = length if index == 0 else _OBJECT.size + -(-length // 8) * 8
        if not 0 < needed <= stop - place:
            return False
        place += needed
    return True
