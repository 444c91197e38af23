"""Damage that keeps a file readable: other values, types and names in it."""

import pickle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.io import loadmat, savemat

from tests.data.damages import rename_key, replace_value


def hdf5_content(generator: np.random.Generator, path: Path) -> None:
    """Another attribute, dataset or kind of object in one trial."""
    strange: list[Any] = [
        -1, 0, 3, 2**62, np.nan, np.inf, 1.5, "text", "", b"\xff\xfe", [1, 2], np.zeros((2, 2)),
        np.zeros(0), 1j, True, "2023", np.full(9, -5), np.full((12, 4), 1e38),
        np.full((12, 4), "a", dtype="S1"), np.zeros((12, 4)), np.ones((1, 4)), np.ones((12, 5)),
        np.arange(48).reshape(12, 4), h5py.SoftLink("/gone"), h5py.ExternalLink("gone.h5", "/"),
    ]  # fmt: skip
    with h5py.File(path, "a") as file:
        trial = file[str(generator.choice(sorted(file)))]
        value = strange[int(generator.integers(0, len(strange)))]
        name = str(
            generator.choice(sorted(trial.attrs) if generator.random() < 0.5 else sorted(trial))
        )
        if name in trial.attrs and not isinstance(value, (h5py.SoftLink, h5py.ExternalLink)):
            del trial.attrs[name]
            trial.attrs[name] = value
        elif name in trial:
            del trial[name]
            if generator.random() < 0.8:
                trial[name] = value
        else:
            del trial.attrs[name]


def set_content(generator: np.random.Generator, path: Path) -> None:
    """Another value in a field of EEGLAB's struct, or a field less."""
    strange: list[Any] = [
        np.nan, -1.0, 0.0, 1e9, 1e300, "text", np.zeros((0, 0)), np.zeros((2, 2)), np.inf,
        np.array([], dtype=object), {"a": 1.0}, 3.7, np.full((3, 600), np.nan), 1 + 2j,
    ]  # fmt: skip
    eeg = loadmat(path, struct_as_record=False, squeeze_me=True)["EEG"]
    fields = {name: getattr(eeg, name) for name in eeg._fieldnames}
    name = str(generator.choice(sorted(fields)))
    fields[name] = strange[int(generator.integers(0, len(strange)))]
    if generator.random() < 0.2:
        del fields[name]
    whole = fields if generator.random() < 0.95 else strange[int(generator.integers(0, 10))]
    path.unlink()
    savemat(path, {"EEG": whole}, appendmat=False)


def parquet_content(generator: np.random.Generator, path: Path) -> None:
    """Another type or other values in one column, or a column less."""
    table = pq.read_table(path)
    name = str(generator.choice(table.column_names))
    place, rows = table.column_names.index(name), len(table)
    strange: list[list[Any]] = [
        [None], [1], [-1], [0.5], [float("nan")], ["text"], [b"\xff"], [[]], [[1, None]], [[[]]],
        [[[1.0], [2.0, 3.0]]], [[[None]]], [[["a"]]], [{"a": 1}], [True], [2**62], [[float("inf")]],
        [[[1e38] * 4]], [[[0.0] * 4] * 3], ["dev"], ["train"], [["text"]], [10**30],
    ]  # fmt: skip
    chosen = strange[int(generator.integers(0, len(strange)))]
    if generator.random() < 0.1:
        table = table.remove_column(place)
    else:
        values = table.column(name).to_pylist()
        alone = generator.random() < 0.5
        mixed = [*values[:-1], *chosen] if alone else chosen * rows
        try:
            table = table.set_column(place, name, pa.array(mixed))
        except (pa.ArrowException, OverflowError, TypeError):
            table = table.set_column(place, name, pa.array([str(value) for value in chosen * rows]))
    path.unlink()
    pq.write_table(table, path)


_VALUES: list[Any] = [
    -1, 0, 3, 2**40, np.nan, np.inf, 1.5, "text", "", np.zeros((2, 2)), np.zeros(0), 1j,
    np.zeros((0, 4)), np.full((9, 4), np.nan), np.full((9, 4), 1e30), np.ones((1, 1, 1, 1)),
    np.arange(48.0).reshape(12, 4), np.arange(40.0).reshape(4, 10), np.ones(7), "ü",
]  # fmt: skip


def any_hdf5_content(generator: np.random.Generator, path: Path) -> None:
    """Another value of a dataset or attribute anywhere in a file, or one less."""
    with h5py.File(path, "a") as file:
        places: list[tuple[str, str | None]] = []
        file.visititems(lambda name, item: places.append((name, None)))
        file.visititems(lambda name, item: places.extend((name, key) for key in item.attrs))
        name, key = places[int(generator.integers(0, len(places)))]
        value = _VALUES[int(generator.integers(0, len(_VALUES)))]
        if key is not None:
            del file[name].attrs[key]
            if generator.random() < 0.7:
                file[name].attrs[key] = value
            return
        kept = dict(file[name].attrs)
        del file[name]
        if generator.random() < 0.7:
            file[name] = value
            if generator.random() < 0.7:
                file[name].attrs.update(kept)


def mat_content(generator: np.random.Generator, path: Path) -> None:
    """Another value of a variable, of a cell or of a field of a struct, or one less."""
    content = {k: v for k, v in loadmat(path).items() if not k.startswith("__")}
    name = str(generator.choice(sorted(content)))
    value = np.atleast_2d(np.asarray(_VALUES[int(generator.integers(0, len(_VALUES)))]))
    inside = content[name]
    if inside.dtype.names and generator.random() < 0.8:
        field = str(generator.choice(inside.dtype.names))
        inside[0, int(generator.integers(0, inside.shape[1]))][field] = value
    elif inside.dtype == object and inside.size and generator.random() < 0.6:
        inside[0, int(generator.integers(0, inside.shape[1]))] = value
    elif generator.random() < 0.8:
        content[name] = value
    else:
        del content[name]
    path.unlink()
    savemat(path, content, appendmat=False)


def numpy_content(generator: np.random.Generator, path: Path) -> None:
    """Another array in the place of one."""
    values: list[Any] = [
        *_VALUES, np.array([[{}]], dtype=object), np.ones((3, 4), bool),
        np.zeros(3, "datetime64[s]"),
        np.zeros((600, 2), [("a", "f4")]), np.ones((600, 3), "f2"), np.ones((600, 3), ">f8"),
        np.asfortranarray(np.ones((600, 3))), np.full((600, 3), 7, "u1"),
    ]  # fmt: skip
    value = np.asarray(values[int(generator.integers(0, len(values)))])
    path.unlink()
    if path.suffix == ".npy":
        np.save(path, value, allow_pickle=True)
    else:
        name = str(generator.choice(["a", "b", "other", "../a"]))
        np.savez(path, allow_pickle=True, **{name: value})


def pickle_content(generator: np.random.Generator, content: bytes) -> bytes:
    """Something strange in the place of any part, or a key less."""
    tree = pickle.loads(content)
    change = replace_value if generator.random() < 0.7 else rename_key
    return pickle.dumps(change(generator, tree), int(generator.integers(0, 6)))


def table_content(generator: np.random.Generator, content: bytes) -> bytes:
    """What spreadsheets and scripts do to CSV."""
    lines = content.decode().splitlines()
    row = int(generator.integers(0, len(lines)))
    cells = lines[row].split(",")
    cell = int(generator.integers(0, len(cells)))
    strange = ["", "NaN", "inf", "-", "1e999", "1,5", '"', "text", "0x1f", "\0", " ", "1.2.3", "ü"]
    kind = int(generator.integers(0, 6))
    if kind == 0:
        del lines[row]
    elif kind == 1:
        lines.insert(row, lines[row])
    elif kind == 2:
        del cells[cell]
        lines[row] = ",".join(cells)
    elif kind == 3:
        lines = [line.replace(",", ";") for line in lines]
    else:
        cells[cell] = strange[int(generator.integers(0, len(strange)))]
        lines[row] = ",".join(cells)
    ending, encoding = str(generator.choice(["\n", "\r\n"])), "utf-8-sig" if kind == 5 else "utf-8"
    return (ending.join(lines) + ending).encode(encoding)


def settings_content(generator: np.random.Generator, content: bytes) -> bytes:
    """Another value in a line `Key=value` of a header, or a line less or twice."""
    lines = content.decode().splitlines()
    row = int(generator.integers(0, len(lines)))
    values = ["", "0", "-1", "nan", "1e9", "text", "gone.eeg", "../s1.eeg", "INT_16", "ASCII", "3"]
    if generator.random() < 0.2:
        del lines[row]
    elif generator.random() < 0.1:
        lines.insert(row, lines[row])
    else:
        key = lines[row].partition("=")[0]
        lines[row] = f"{key}={values[int(generator.integers(0, len(values)))]}"
    return "\n".join(lines).encode()
