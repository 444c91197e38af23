"""One trial as a row of an Arrow table: its columns, its name, its signal, its fingerprint."""

import hashlib
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import Array2D, Dataset, Features, List, Value

from b2t.errors import UserError

COLUMNS = (
    "signal",
    "text",
    "phonemes",
    "session",
    "subject",
    "block",
    "trial",
    "sampling_rate",
    "split",
)

_LARGEST = 1e18


def trial_features(channels: int, dtype: str = "float32") -> Features:
    """Return the column types of a prepared dataset.

    Args:
        channels: C.
        dtype: of the stored signals; they are read as float32.
    """
    return Features(
        {
            "signal": Array2D((None, channels), dtype),
            "text": Value("string"),
            "phonemes": List(Value("int32")),
            "session": Value("string"),
            "subject": Value("string"),
            "block": Value("int64"),
            "trial": Value("int64"),
            "sampling_rate": Value("float64"),
            "split": Value("string"),
        }
    )


def row_id(row: dict[str, Any]) -> str:
    """Name a row as ``session/block/trial``."""
    return f"{row['session']}/{row['block']}/{row['trial']}"


def values_of(dataset: Dataset, name: str) -> list[Any]:
    """Return the values of a column in order, without reading signals.

    `Dataset.unique` writes a copy of the rows beside the user's data where they were selected.
    """
    values = dataset.select_columns([name]).with_format("arrow")[:][name]
    return values.to_pylist()


def row_ids(dataset: Dataset) -> list[str]:
    """Name every row of ``dataset``, without reading signals."""
    columns = (
        values_of(dataset, "session"),
        values_of(dataset, "block"),
        values_of(dataset, "trial"),
    )
    return [
        row_id({"session": session, "block": block, "trial": trial})
        for session, block, trial in zip(*columns, strict=True)
    ]


def signal_lengths(dataset: Dataset) -> np.ndarray:
    """Return the number of time bins of every row, int64 [rows], from list offsets alone."""
    chunks = [storage(chunk) for chunk in dataset.data.column("signal").chunks]
    counts = [pc.fill_null(pc.list_value_length(chunk), 0).to_numpy() for chunk in chunks]
    lengths = np.concatenate([np.zeros(0, np.int64), *counts]).astype(np.int64)
    if dataset._indices is None:
        return lengths
    return lengths[dataset._indices.column(0).to_numpy()]


def read_signal(row: pa.Table) -> np.ndarray:
    """Return the signal of a one-row Arrow table, float32 [T, C] ([0, 0] for an empty trial)."""
    return signal_of(storage(row.column("signal")))


def signal_of(trial: pa.Array) -> np.ndarray:
    """Return the signal of an Arrow list of one trial, float32 [T, C] ([0, 0] for an empty one).

    Raises:
        ValueError: bins of different channels.
    """
    bins = _items(trial)
    if isinstance(bins, pa.FixedSizeListArray):
        channels = bins.type.list_size
    else:
        channels = _common_width(bins)
    values = np.asarray(_items(bins).to_numpy(zero_copy_only=False), dtype=np.float32)
    return values.reshape(-1, channels) if channels else np.zeros((0, 0), np.float32)


def require_bins(signal: np.ndarray, name: str) -> None:
    """Refuse a signal [T, C] without a value.

    Raises:
        UserError: names the trial as ``name``.
    """
    if not signal.size:
        raise UserError(
            f"trial {name} has no time bins: remove it, or leave out such trials with "
            "`b2t prepare --skip-bad-trials`"
        )


def require_finite(signal: np.ndarray, name: str) -> None:
    """Refuse a signal [T, C] that would poison training.

    Raises:
        UserError: no time bins, or NaN, infinity or a value whose square overflows; the message
            names the trial as ``name``.
    """
    require_bins(signal, name)
    # Every trial of training comes here: a sum of squares reads it once and copies nothing.
    flat = signal.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        if flat @ flat < _LARGEST**2:
            return
    largest = np.abs(signal).max()
    if largest < _LARGEST:
        return
    if np.isfinite(largest):
        time, channel = np.argwhere(np.abs(signal) == largest)[0]
        raise UserError(
            f"trial {name} holds {signal[time, channel]:g} at bin {time}, channel {channel}, whose "
            f"square overflows float32; values below {_LARGEST:g} are expected: repair or remove "
            "the trial, or leave out such trials with `b2t prepare --skip-bad-trials`"
        )
    time, channel = np.argwhere(~np.isfinite(signal))[0]
    raise UserError(
        f"trial {name} holds {signal[time, channel]} at bin {time}, channel {channel}, where "
        "finite values are expected: repair or remove the trial, or leave out such trials with "
        "`b2t prepare --skip-bad-trials`"
    )


def typical_rms(dataset: Dataset, limit: int = 32) -> float | None:
    """Return the root mean square of a typical trial, in the unit of the signals.

    Args:
        dataset: trials.
        limit: trials to read, spread evenly over the sessions; the result is their median.

    Returns:
        None where no trial has a finite one above 0.
    """
    rows = dataset.with_format("arrow")
    powers = [
        np.mean(np.square(read_signal(rows[index]), dtype=np.float64))
        for index in spread_over_sessions(dataset, limit)
    ]
    usable = [power for power in powers if np.isfinite(power) and power > 0]
    return float(np.sqrt(np.median(usable))) if usable else None


def spread_over_sessions(dataset: Dataset, limit: int) -> list[int]:
    """Choose ``limit`` rows, spread evenly over the sessions and over each session's rows.

    Sessions give equally many, give or take one; short ones give all that they have. Where fewer
    rows are chosen than there are sessions, every so many sessions give one.

    Args:
        dataset: trials; signals are not read.
        limit: rows to choose; all of them where there are no more.

    Returns:
        Row indices, ascending, always the same.
    """
    if limit >= len(dataset):
        return list(range(len(dataset)))
    sessions: dict[str, list[int]] = {}
    for row, session in enumerate(values_of(dataset, "session")):
        sessions.setdefault(session, []).append(row)
    groups = list(sessions.values())
    shares = _even_shares(np.array([len(rows) for rows in groups]), limit)
    return sorted(
        rows[place]
        for rows, share in zip(groups, shares, strict=True)
        for place in _evenly_spaced(len(rows), share)
    )


def _even_shares(sizes: np.ndarray, total: int) -> list[int]:
    """Deal ``total`` to groups of these ``sizes`` as evenly as the smaller ones allow."""
    shares = np.zeros_like(sizes)
    while total:
        open_ = np.flatnonzero(shares < sizes)
        if total < len(open_):
            shares[open_[_evenly_spaced(len(open_), total)]] += 1
            break
        each = min(total // len(open_), int((sizes - shares)[open_].min()))
        shares[open_] += each
        total -= each * len(open_)
    return shares.tolist()


def _evenly_spaced(count: int, chosen: int) -> np.ndarray:
    """Return the middles of ``chosen`` equal stretches of ``count`` places."""
    return (2 * np.arange(chosen) + 1) * count // (2 * max(1, chosen))


def signal_digest(signal: np.ndarray) -> bytes:
    """Return 128 bits of XXH3 over a signal [T, C] as float32, and over its shape.

    It tells signals apart and finds damage at the speed of memory; it is no guard against someone
    who means to deceive.
    """
    digest = xxhash.xxh3_128(np.ascontiguousarray(signal, dtype="<f4").data)
    digest.update(str(signal.shape).encode())
    return digest.digest()


class Fingerprint:
    """A hash of trials' content: the same after every preparation of the same data."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, row: dict[str, Any], digest: bytes) -> None:
        """Add one row: its columns, and the `signal_digest` of its signal."""
        phonemes = row["phonemes"]
        header = [
            row_id(row),
            row["text"],
            None if phonemes is None else [int(phoneme) for phoneme in phonemes],
            float(row["sampling_rate"]),
        ]
        self._hash.update(json.dumps(header).encode())
        self._hash.update(digest)

    def hexdigest(self) -> str:
        """Return the hash of everything added so far."""
        return self._hash.hexdigest()


def _items(lists: pa.Array) -> pa.Array:
    """Return what `flatten` does, from the offsets alone where it may: it takes 20 µs a trial."""
    if not isinstance(lists, pa.ListArray) or not len(lists) or lists.null_count:
        return lists.flatten()
    first, last = lists.offsets[0].as_py(), lists.offsets[-1].as_py()
    return lists.values.slice(first, last - first)


def _common_width(bins: pa.ListArray) -> int:
    if not len(bins) or bins.null_count:
        widths = np.asarray(pc.fill_null(pc.list_value_length(bins), 0))
    else:
        edges = bins.offsets.to_numpy()
        widths = edges[1:] - edges[:-1]
    least, most = (int(widths.min()), int(widths.max())) if len(widths) else (0, 0)
    if least != most:
        raise ValueError(f"time bins have between {least} and {most} channels")
    return most


def storage(array: pa.Array) -> pa.Array:
    """Return what an extension type lies in, in one piece."""
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks == 1 else pa.concat_arrays(array.chunks)
    return array.storage if isinstance(array, pa.ExtensionArray) else array
