"""A look at the heaps of an HDF5 file before it is read: libhdf5 can walk a damaged one for ever.

Texts of variable length lie in global heaps, collections of objects one after another (HDF5 File
Format Specification 3.0, III.E). An object of free space and size 0 never leads to the next one.
"""

import mmap
import struct
from pathlib import Path

from b2t.errors import UserError

_SIGNATURE = b"GCOL\x01\0\0\0"
_SIZE = struct.Struct("<Q")
_OBJECT = struct.Struct("<HHIQ")
_HEADER = len(_SIGNATURE) + _SIZE.size


def require_sound_heaps(path: Path) -> None:
    """Refuse a file with a global heap whose objects do not follow one another.

    Raises:
        UserError: names the file and the place.
    """
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            place = content.find(_SIGNATURE)
            while place >= 0:
                if not _is_sound(content, place):
                    raise UserError(
                        f"{path} cannot be read as HDF5 (its heap at byte {place} is damaged): the "
                        "download may be incomplete; fetch it again"
                    )
                place = content.find(_SIGNATURE, place + 1)


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
