"""Single rows of a dataset, read from its Arrow memory."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from b2t.data.trials import signal_of, storage


class TrialReader:
    """Reads single rows of a dataset from its Arrow memory, without what `datasets` does around.

    Args:
        dataset: trials; its rows may be a selection.
    """

    def __init__(self, dataset: Dataset) -> None:
        table = dataset.data
        chosen = dataset._indices
        self._chosen = None if chosen is None else memoryview(chosen.column(0).to_numpy())
        self._facts = {name: _values(table.column(name)) for name in _SHORT}
        sizes = [len(chunk) for chunk in table.column("signal").chunks]
        self._starts = [0, *np.cumsum(sizes).tolist()]
        self._columns = [
            _cut(table.column(name), sizes, self._starts) for name in ("text", "phonemes", "signal")
        ]
        self._chunks: list[_Chunk | None] = [None] * len(sizes)

    def __len__(self) -> int:
        return self._starts[-1] if self._chosen is None else len(self._chosen)

    def row(self, index: int) -> dict[str, Any]:
        """Return what training needs of a row beside its signal, by the names of `COLUMNS`."""
        place, chunk, inner = self._place(index)
        row = {name: values[place] for name, values in self._facts.items()}
        row["text"], row["phonemes"] = chunk.texts[inner].as_py(), chunk.phonemes[inner]
        return row

    def signal(self, index: int) -> np.ndarray:
        """Return the signal of a row, float32 [T, C], read-only where it lies.

        Raises:
            ValueError: bins of different channels.
        """
        _, chunk, inner = self._place(index)
        return chunk.signal(inner)

    def _place(self, index: int) -> tuple[int, "_Chunk", int]:
        """Return the row of the table, the chunk it lies in, and its place there."""
        if not 0 <= index < len(self):
            raise IndexError(f"no row {index}")
        place = index if self._chosen is None else self._chosen[index]
        number = bisect_right(self._starts, place) - 1
        chunk = self._chunks[number]
        if chunk is None:
            chunk = _Chunk(*(chunks[number] for chunks in self._columns))
            self._chunks[number] = chunk
        return place, chunk, place - self._starts[number]


def _cut(column: pa.ChunkedArray, sizes: list[int], starts: list[int]) -> list[pa.Array]:
    """Cut a column where the signals' chunks begin: one that was added or replaced lies otherwise.

    Args:
        column: of as many rows as ``sizes`` add up to.
        sizes: rows of each chunk.
        starts: rows before each chunk.
    """
    if [len(chunk) for chunk in column.chunks] == sizes:
        return [storage(chunk) for chunk in column.chunks]
    return [storage(column.slice(start, size)) for start, size in zip(starts, sizes, strict=False)]


_SHORT = ("session", "block", "trial", "sampling_rate")


class _Chunk:
    """Rows that lie together, as NumPy sees them: what takes Arrow 50 µs a trial takes 3."""

    def __init__(self, texts: pa.Array, phonemes: pa.Array, trials: pa.Array) -> None:
        self.texts = texts
        self.phonemes = _Lists(phonemes)
        self._trials = trials
        self._matrix = _matrix(trials)
        if self._matrix is not None:
            self._edges = memoryview(trials.offsets.to_numpy())

    def signal(self, inner: int) -> np.ndarray:
        if self._matrix is None:  # a row of these is odd; this one may be another
            return signal_of(self._trials.slice(inner, 1))
        first = self._edges[0]
        start, end = self._edges[inner] - first, self._edges[inner + 1] - first
        return np.asarray(self._matrix[start:end], dtype=np.float32)


class _Lists:
    """Short lists of integers, None where there is none."""

    def __init__(self, lists: pa.Array) -> None:
        self._lists = lists
        self._flat: np.ndarray | None = None
        if isinstance(lists, pa.ListArray) and not lists.null_count and not _holes(lists.values):
            self._flat = lists.values.to_numpy()
            self._edges = memoryview(lists.offsets.to_numpy())

    def __getitem__(self, inner: int) -> Sequence[int] | np.ndarray | None:
        if self._flat is None:
            return self._lists[inner].as_py()
        return self._flat[self._edges[inner] : self._edges[inner + 1]]


class _Names:
    """Strings that repeat, each held once."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        encoded = column.dictionary_encode().unify_dictionaries().combine_chunks()
        self._names = encoded.dictionary.to_pylist()
        self._places = memoryview(encoded.indices.to_numpy())

    def __getitem__(self, inner: int) -> str:
        return self._names[self._places[inner]]


def _values(column: pa.ChunkedArray) -> Any:
    """Values by row, as Python's own numbers and strings."""
    kind, whole = column.type, not column.null_count and len(column)
    if whole and pa.types.is_string(kind):
        return _Names(column)
    if whole and (pa.types.is_integer(kind) or pa.types.is_float64(kind)):
        return memoryview(column.to_numpy())
    return column.to_pylist()


def _matrix(trials: pa.Array) -> np.ndarray | None:
    """All bins of all trials [bins, C] where they lie, None unless each has the same channels."""
    if not isinstance(trials, pa.ListArray) or trials.null_count or not len(trials):
        return None
    first, last = trials.offsets[0].as_py(), trials.offsets[-1].as_py()
    bins = trials.values.slice(first, last - first)
    if not len(bins) or bins.null_count:
        return None
    if isinstance(bins, pa.FixedSizeListArray):
        channels, flat = bins.type.list_size, bins.flatten()
    elif isinstance(bins, pa.ListArray):
        edges = bins.offsets.to_numpy()
        channels = int(edges[1] - edges[0])
        if not (edges[1:] - edges[:-1] == channels).all():
            return None
        flat = bins.values.slice(int(edges[0]), int(edges[-1] - edges[0]))
    else:
        return None
    if not channels or _holes(flat):
        return None
    return flat.to_numpy().reshape(-1, channels)


def _holes(flat: pa.Array) -> bool:
    """Whether these are no plain numbers that NumPy can see where they lie."""
    numbers = pa.types.is_integer(flat.type) or pa.types.is_floating(flat.type)
    return bool(flat.null_count) or not numbers
