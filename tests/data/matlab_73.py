"""Writes MATLAB 7.3 files with h5py: transposed numbers, UTF-16 text, references for cells."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np


def save(path: Path, variables: dict[str, Any]) -> None:
    """Write variables: arrays, text, lists (cell arrays) and lists of dictionaries (structs)."""
    with h5py.File(path, "w", userblock_size=512) as file:
        file.create_group("#refs#")
        for name, value in variables.items():
            _write(file, file, name, value)


def _write(file: h5py.File, group: h5py.Group, name: str, value: Any) -> None:
    if isinstance(value, str):
        codes = np.array([[ord(letter)] for letter in value], np.uint16).reshape(len(value), 1)
        group[name] = codes
        group[name].attrs["MATLAB_class"] = np.bytes_("char")
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        inner = group.create_group(name)
        inner.attrs["MATLAB_class"] = np.bytes_("struct")
        for key in value[0]:
            inner[key] = _references(file, [item[key] for item in value])
    elif isinstance(value, list):
        group[name] = _references(file, value)
        group[name].attrs["MATLAB_class"] = np.bytes_("cell")
    else:
        group[name] = np.asarray(value).T
        group[name].attrs["MATLAB_class"] = np.bytes_("double")


def _references(file: h5py.File, values: list[Any]) -> np.ndarray:
    store = file["#refs#"]
    references = np.empty((len(values), 1), dtype=h5py.ref_dtype)
    for row, value in enumerate(values):
        name = f"r{len(store)}"
        _write(file, store, name, value)
        references[row, 0] = store[name].ref
    return references
