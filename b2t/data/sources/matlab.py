"""Variables of MATLAB files, version 5 to 7.2 and 7.3 (HDF5), one at a time and alike.

Numbers come as arrays in MATLAB's shape, text as a list with one string per row, a cell array as a
list and a struct array as a list of `Struct`, both in MATLAB's order (columns first). Content of a
7.3 file is read when it is asked for, so that a file may be larger than the memory.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy  # its parts load as they are met

from b2t.data.sources import mat_check
from b2t.data.sources.reading import reading
from b2t.errors import UserError

_KIND = "a MATLAB file"


class Struct:
    """Fields of one struct, decoded when they are asked for."""

    def __init__(self, fields: dict[str, Callable[[], Any]]) -> None:
        self._fields = fields

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def __getitem__(self, name: str) -> Any:
        return self._fields[name]()

    def get(self, name: str) -> Any:
        """Decode a field, None where there is none of that name."""
        field = self._fields.get(name)
        return None if field is None else field()


class MatFile:
    """One MATLAB file, open.

    Raises:
        UserError: it cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._hdf5: h5py.File | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        with reading(file, _KIND):
            if h5py.is_hdf5(file):
                self._hdf5 = h5py.File(file, "r")
                for name, item in self._hdf5.items():
                    if not name.startswith("#"):
                        self._shapes[name] = getattr(item, "shape", (1, 1))[::-1]
            else:
                mat_check.require_sound(file)
                self._shapes = {name: tuple(shape) for name, shape, _ in scipy.io.whosmat(file)}

    def names(self) -> list[str]:
        """Names of the variables."""
        return list(self._shapes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the variables, nothing read."""
        return dict(self._shapes)

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def __getitem__(self, name: str) -> Any:
        """Decode a variable.

        Raises:
            UserError: there is none of that name, or it is damaged.
        """
        if name not in self._shapes:
            raise UserError(
                f"{self.file} has no variable {name}: it has {', '.join(self.names()) or 'none'}"
            )
        with reading(f"{self.file}, {name}", _KIND):
            if self._hdf5 is not None:
                return _of_hdf5(self._hdf5[name], self._hdf5)
            return _of_scipy(
                scipy.io.loadmat(self.file, variable_names=[name], chars_as_strings=True)[name]
            )


def numbers(value: Any, place: str) -> np.ndarray:
    """Return a decoded value as an array of real numbers.

    Raises:
        UserError: it is something else; ``place`` says where.
    """
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
        found = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise UserError(f"{place} holds {found}, where real numbers are expected")
    return value


def number(value: Any, place: str) -> float:
    """Return a decoded value as one number. Errors as in `numbers`."""
    array = numbers(value, place)
    if array.size != 1:
        raise UserError(f"{place} holds {array.size} numbers, where one is expected")
    return float(array.item())


def text(value: Any) -> str | None:
    """Return a decoded value as one line of text, None where it holds none."""
    rows = value if isinstance(value, list) else []
    joined = " ".join(row.strip() for row in rows if isinstance(row, str)).strip()
    return joined or None


def _of_scipy(value: Any) -> Any:
    if value.dtype.names:
        return [
            Struct({name: partial(_field, item, name) for name in item.dtype.names})
            for item in value.flatten(order="F")
        ]
    if value.dtype == object:
        return [_of_scipy(np.asarray(item)) for item in value.flatten(order="F")]
    if value.dtype.kind == "U":
        return [str(row) for row in value.flatten()]
    return value


def _field(item: Any, name: str) -> Any:
    return _of_scipy(np.asarray(item[name]))


def _of_hdf5(item: Any, file: h5py.File) -> Any:
    if isinstance(item, h5py.Group):
        return _structs(item, file)
    kind = item.attrs.get("MATLAB_class", b"")
    kind = kind.decode() if isinstance(kind, bytes) else str(kind)
    if item.attrs.get("MATLAB_empty", 0):
        return [] if kind in ("char", "cell", "struct") else np.zeros((0, 0))
    if item.dtype == h5py.ref_dtype:
        # HDF5 holds the transpose, so its rows are MATLAB's columns.
        return [_of_hdf5(file[reference], file) for reference in item[()].flatten()]
    values = item[()]
    if kind == "char":
        return [_utf16(row) for row in np.atleast_2d(values.T)]
    return np.asarray(values).T


def _utf16(codes: np.ndarray) -> str:
    """Return a row of characters, which MATLAB keeps as UTF-16, without the zeros that pad it."""
    content = codes[codes != 0].astype("<u2").tobytes()
    return content.decode("utf-16-le", "replace")


def _structs(group: h5py.Group, file: h5py.File) -> list[Struct]:
    """Read a struct, or an array of them, whose fields are then tables of references."""
    references = {
        name: item[()].flatten()
        for name, item in group.items()
        if isinstance(item, h5py.Dataset)
        and item.dtype == h5py.ref_dtype
        and "MATLAB_class" not in item.attrs
    }
    if not references:
        return [Struct({name: partial(_of_hdf5, item, file) for name, item in group.items()})]
    count = min(len(found) for found in references.values())
    return [
        Struct({name: partial(_of_reference, at[row], file) for name, at in references.items()})
        for row in range(count)
    ]


def _of_reference(reference: Any, file: h5py.File) -> Any:
    return _of_hdf5(file[reference], file)
