"""A look through the tags of a FIF file before MNE follows them: they can lead in circles.

Layout: tags of kind, type, size and place of the next one, four big-endian words each, in nested
blocks (Functional Image File Format, as MNE's `mne._fiff` reads and writes it).
"""

import gzip
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, cast

from b2t.errors import UserError

_START, _END = 104, 105
_TAG = struct.Struct(">iIii")


def require_sound(path: Path) -> None:
    """Refuse a file whose tags come back to an earlier one, or that ends within one or a block.

    Raises:
        UserError: names the file and what is wrong in it.
    """
    packed = path.name.lower().endswith(".gz")
    try:
        with cast(BinaryIO, gzip.open(path)) if packed else path.open("rb") as file:
            problem = _problem(file, None if packed else path.stat().st_size)
    except (OSError, EOFError, zlib.error) as error:
        problem = str(error)
    if problem:
        raise UserError(
            f"{path} cannot be read as FIF: {problem}; it is damaged or incomplete, copy it again"
        )


def _problem(file: BinaryIO, size: int | None) -> str | None:
    seen: set[int] = set()
    place, depth = 0, 0
    while True:
        if place in seen:
            return f"its tags lead in a circle (byte {place})"
        seen.add(place)
        file.seek(place)
        header = file.read(_TAG.size)
        if len(header) < _TAG.size:
            # Some programs close all blocks and write no last tag.
            return (
                f"it ends within a block (byte {place})" if header or depth or not place else None
            )
        kind, _, length, following = _TAG.unpack(header)
        if size is not None and place + _TAG.size + length > size:
            return f"it ends within a tag (byte {place}, {length} bytes)"
        depth += (kind == _START) - (kind == _END)
        if following < 0:
            return None
        place = following or place + _TAG.size + length
