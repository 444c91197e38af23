"""Arrow files of trials: written once, by any process, and joined to a dataset where they lie."""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, Features

from b2t.data.trials import trial_features

_BATCH_BYTES = 1 << 20
"""Signals that a record batch gathers. A longer trial is one of its own and is not copied."""


class ShardWriter:
    """Writes trials to one Arrow file, as `datasets` reads it.

    Args:
        path: of the file. It is whole, and has that name, once `close` returns.
        channels: C.
        dtype: of the stored signals.
        beside: a thread that writes one batch while the next is gathered; None writes here.
    """

    def __init__(
        self, path: Path, channels: int, dtype: str, beside: Executor | None = None
    ) -> None:
        self.path = path
        self._temporary = path.with_name(f"{path.name}.tmp")
        self._channels = channels
        self._dtype = dtype
        self._schema = _as_stored(trial_features(channels, dtype).arrow_schema)
        self._file = pa.OSFile(str(self._temporary), "wb")
        self._stream = pa.ipc.new_stream(self._file, self._schema)
        self._rows: list[Mapping[str, Any]] = []
        self._signals: list[np.ndarray] = []
        self._bytes = 0
        self._beside = beside
        self._under_way: Future[None] | None = None

    def write(self, row: Mapping[str, Any], signal: np.ndarray) -> None:
        """Add a trial: its columns, and its signal [T, C], contiguous and of the stored dtype."""
        self._rows.append(row)
        self._signals.append(signal)
        self._bytes += signal.nbytes
        if self._bytes >= _BATCH_BYTES:
            self._flush()

    def close(self) -> None:
        """Write what is left, and give the file its name."""
        self._flush()
        self._wait()
        self._stream.close()
        self._file.close()
        os.replace(self._temporary, self.path)

    def _flush(self) -> None:
        if not self._rows:
            return
        columns = {
            field.name: self._signal_column()
            if field.name == "signal"
            else pa.array([row[field.name] for row in self._rows], field.type)
            for field in self._schema
        }
        batch = pa.record_batch(list(columns.values()), schema=self._schema)
        self._wait()
        if self._beside is None:
            self._stream.write_batch(batch)
        else:
            self._under_way = self._beside.submit(self._stream.write_batch, batch)
        self._rows, self._signals, self._bytes = [], [], 0

    def _wait(self) -> None:
        """Wait for what is being written: one batch at a time, so that memory has a bound."""
        if self._under_way is not None:
            self._under_way.result()
            self._under_way = None

    def _signal_column(self) -> pa.Array:
        """Return lists [T][C] around the memory that the signals lie in."""
        flat = [signal.reshape(-1) for signal in self._signals]
        values = pa.array(flat[0] if len(flat) == 1 else np.concatenate(flat))
        ends = np.cumsum([0, *(len(signal) for signal in self._signals)], dtype=np.int32)
        edges = np.arange(ends[-1] + 1, dtype=np.int32) * np.int32(self._channels)
        bins = pa.ListArray.from_arrays(pa.array(edges), values)
        return pa.ListArray.from_arrays(pa.array(ends), bins)


def _as_stored(schema: pa.Schema) -> pa.Schema:
    """Return a schema of the same bytes in a file, without types that are objects of Python.

    Arrow calls back into Python for each extension type of each batch.
    """
    fields = []
    for field in schema:
        if isinstance(field.type, pa.ExtensionType):
            marks = {
                b"ARROW:extension:name": field.type.extension_name.encode(),
                b"ARROW:extension:metadata": field.type.__arrow_ext_serialize__(),
            }
            field = pa.field(field.name, field.type.storage_type, field.nullable, marks)
        fields.append(field)
    return pa.schema(fields, schema.metadata)


def without(shard: Path, rows: Sequence[int]) -> Path:
    """Write the ``rows`` of a file, in their order, into another one beside it."""
    place = shard.with_suffix(".kept.arrow")
    with pa.memory_map(str(shard)) as source, pa.OSFile(str(place), "wb") as file:
        table = pa.ipc.open_stream(source).read_all()
        with pa.ipc.new_stream(file, table.schema) as stream:
            for row in rows:
                stream.write_table(table.slice(row, 1))
    return place


def join_shards(
    folder: Path, features: Features, shards: Mapping[str, Sequence[Path]], marks: Mapping[str, str]
) -> None:
    """Make a folder that `datasets.load_from_disk` reads, of files that are not copied.

    Args:
        folder: does not exist yet; on the disk of the files.
        features: of all files.
        shards: the files of each split, in order.
        marks: what `datasets` knows each split's content by.
    """
    empty = Dataset(features.arrow_schema.empty_table())
    DatasetDict(dict.fromkeys(shards, empty)).save_to_disk(str(folder))
    for split, files in shards.items():
        names = [f"data-{number:05d}-of-{len(files):05d}.arrow" for number in range(len(files))]
        for file, name in zip(files, names, strict=True):
            _link(file, folder / split / name)
        place = folder / split / "state.json"
        state = json.loads(place.read_text("utf-8"))
        state["_data_files"] = [{"filename": name} for name in names]
        state["_fingerprint"] = marks[split]
        place.write_text(json.dumps(state, indent=2, sort_keys=True), "utf-8")


def _link(file: Path, place: Path) -> None:
    try:
        os.link(file, place)
    except OSError:
        # A disk without hard links: a call that is killed from here on writes this chunk again.
        os.replace(file, place)
