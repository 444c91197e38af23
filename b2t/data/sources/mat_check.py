"""A look through a MATLAB 5 file before it is read: scipy's reader, in C, trusts every tag.

One wrong byte in a tag ends the process (an index into a table is not checked), and a wrong
dimension asks for as much memory as it says. The layout is that of MathWorks' "MAT-File Format".
"""

import math
import mmap
import struct
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from b2t.errors import UserError

_NUMBERS = {1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 16, 17, 18}
_WHOLE = {5, 6}
_NAMES = {1, 2, 16}
_MATRIX, _COMPRESSED = 14, 15
_CELL, _STRUCT, _OBJECT, _SPARSE, _FUNCTION, _OPAQUE = 1, 2, 3, 5, 16, 17
_HEADER = 128
_DEEPEST = 64
_MOST_EMPTY = 2**20


_Bytes = mmap.mmap | bytes


class _DamagedError(Exception):
    """What is wrong, without the file's name."""


class _Element(NamedTuple):
    """Type and content [start, stop) of an element."""

    kind: int
    start: int
    stop: int


def require_sound(path: Path) -> None:
    """Refuse a MATLAB 5 file whose elements do not fit into one another.

    Files of MATLAB 7.3, which are HDF5, are left to their reader.

    Raises:
        UserError: names the file and what is wrong in it.
    """
    with path.open("rb") as file:
        header = file.read(_HEADER)
        order = {b"IM": "<", b"MI": ">"}.get(header[126:128])
        version = header[125:126] if order == "<" else header[124:125]
        if header.startswith(b"\x89HDF") or version == b"\2":
            return
        try:
            if order is None:
                raise _DamagedError("it does not begin as a MATLAB file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                _look(content, order, _HEADER, len(content), 0)
        except (_DamagedError, zlib.error) as error:
            raise UserError(
                f"{path} cannot be read as {path.suffix.lstrip('.').upper()} ({error}): it may be "
                "damaged or incomplete; copy it again"
            ) from None


def _look(content: _Bytes, order: str, start: int, stop: int, depth: int) -> None:
    """Look through the elements between two places."""
    if depth > _DEEPEST:
        raise _DamagedError("elements are nested too deeply")
    for element in _elements(content, order, start, stop):
        if element.kind == _COMPRESSED:
            packed = content[element.start : element.stop]
            inner = zlib.decompressobj().decompress(packed, 2**32)
            _look(inner, order, 0, len(inner), depth + 1)
        elif element.kind == _MATRIX:
            _look_at_matrix(content, order, element, depth)
        elif element.kind not in _NUMBERS:
            raise _DamagedError(f"an element is of the unknown type {element.kind}")


def _elements(content: _Bytes, order: str, start: int, stop: int) -> Iterator[_Element]:
    while start < stop:
        if stop - start < 8:
            raise _DamagedError("it ends within an element")
        kind, size = struct.unpack(f"{order}II", content[start : start + 8])
        if kind >> 16:  # a small element: its content stands in the second half of the tag
            size, kind = kind >> 16, kind & 0xFFFF
            if size > 4:
                raise _DamagedError("a small element holds more than 4 bytes")
            yield _Element(kind, start + 4, start + 4 + size)
            start += 8
            continue
        first = start + 8
        if first + size > stop:
            raise _DamagedError("an element is larger than what holds it")
        yield _Element(kind, first, first + size)
        start = first + size + (0 if kind == _COMPRESSED else -size % 8)


def _look_at_matrix(content: _Bytes, order: str, matrix: _Element, depth: int) -> None:
    size = matrix.stop - matrix.start
    if not size:
        return
    parts = _elements(content, order, matrix.start, matrix.stop)
    flags = next(parts)
    if flags.kind not in _WHOLE or flags.stop - flags.start != 8:
        raise _DamagedError("a matrix does not begin with its class")
    word = struct.unpack(f"{order}I", content[flags.start : flags.start + 4])[0]
    kind = word & 0xFF
    if not _CELL <= kind <= _OPAQUE:
        raise _DamagedError(f"a matrix is of the unknown class {kind}")
    if kind != _OPAQUE:
        _look_at_shape(content, order, kind, list(islice(parts, 2)), size)
    _look(content, order, matrix.start, matrix.stop, depth + 1)


def _look_at_shape(
    content: _Bytes, order: str, kind: int, parts: list[_Element], size: int
) -> None:
    """Refuse dimensions that the matrix is too small for."""
    if len(parts) != 2 or parts[0].kind not in _WHOLE or parts[1].kind not in _NAMES:
        raise _DamagedError("a matrix has no dimensions or no name")
    dimensions = content[parts[0].start : parts[0].stop]
    count = len(dimensions) // 4
    if len(dimensions) % 4 or not 2 <= count <= 32:
        raise _DamagedError(f"a matrix has {count} dimensions")
    shape = struct.unpack(f"{order}{count}i", dimensions)
    # Sparse matrices hold less than their shape says, structs and functions may hold nothing.
    most = _MOST_EMPTY if kind in (_STRUCT, _OBJECT, _SPARSE, _FUNCTION) else 0
    if min(shape) < 0 or math.prod(shape) > max(size, most):
        raise _DamagedError(f"a matrix of {size} bytes claims the shape {shape}")
