"""Checksums of prepared data: one for each trial, and one for the record beside them.

`b2t prepare` writes `checksums.npz`: an array uint64 [rows] for each split, and the digest of
`b2t.json`. A trial's checksum covers its signal and all that is known of it, so that a damaged one
is named, and a few can be compared without reading all.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from b2t.data.trials import COLUMNS, read_signal, row_id, signal_digest
from b2t.errors import UserError

FILE = "checksums.npz"
_RECORD_KEY = "b2t.json"
_AGAIN = "copy the folder again, or prepare the data again"


def row_checksum(row: Mapping[str, Any], signal: bytes) -> int:
    """Return 64 bits of BLAKE2b over a row's columns and the `signal_digest` of its signal."""
    digest = hashlib.blake2b(digest_size=8)
    phonemes = row["phonemes"]
    header = [
        *(row[name] for name in ("session", "subject", "split", "text")),
        *(int(row[name]) for name in ("block", "trial")),
        float(row["sampling_rate"]),
        None if phonemes is None else [int(phoneme) for phoneme in phonemes],
    ]
    digest.update(json.dumps(header).encode())
    digest.update(signal)
    return int.from_bytes(digest.digest(), "little")


def save(folder: Path, checksums: Mapping[str, list[int]], record: str) -> None:
    """Write the checksums of every split's rows, and that of the text of `b2t.json`."""
    arrays: dict[str, np.ndarray] = {
        split: np.asarray(sums, np.uint64) for split, sums in checksums.items()
    }
    arrays[_RECORD_KEY] = _digest(record)
    np.savez(folder / FILE, **arrays)  # type: ignore[arg-type]  # its stub has one keyword alone


def load(folder: Path) -> dict[str, np.ndarray] | None:
    """Return the arrays of `checksums.npz`, None where data were prepared without it.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # numpy passes on what zip, zlib and its own parser meet
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {str(error).splitlines()[:1]}): {_AGAIN}"
        ) from None


def require_record(folder: Path, text: str, expected: bool) -> None:
    """Refuse a `b2t.json` that is not the one written with the data.

    Args:
        folder: the prepared folder.
        text: what `b2t.json` holds now.
        expected: whether it says that there are checksums.

    Raises:
        UserError: it was changed, or the checksums are missing or damaged.
    """
    sums = load(folder)
    if sums is None:
        if expected:
            raise UserError(f"{folder / FILE} is missing: {_AGAIN}")
        return
    if not np.array_equal(sums.get(_RECORD_KEY, ()), _digest(text)):
        raise UserError(
            f"{folder / _RECORD_KEY} is missing, or has another checksum than when it was written: "
            f"{_AGAIN}"
        )


def compare(
    folder: Path, splits: Mapping[str, Dataset], rows: Iterable[tuple[str, int]], seconds: float
) -> int | None:
    """Compare rows with the checksums written when they were prepared.

    Args:
        folder: the prepared folder.
        splits: its splits.
        rows: (split, index) of the rows to compare.
        seconds: give up after so long.

    Returns:
        Rows compared, None where there are no checksums.

    Raises:
        UserError: names the first trial that is not what was prepared.
    """
    sums = load(folder)
    if sums is None:
        return None
    for split, dataset in splits.items():
        if len(sums.get(split, ())) != len(dataset):
            raise UserError(
                f"{folder}, {split}: {len(dataset)} rows, and {FILE} is of "
                f"{len(sums.get(split, ()))}: {_AGAIN}"
            )
    tables = {split: dataset.with_format("arrow") for split, dataset in splits.items()}
    deadline = time.monotonic() + seconds
    compared = 0
    for split, index in rows:
        if compared and time.monotonic() > deadline:
            break
        table = tables[split][index]
        row = {name: table[name][0].as_py() for name in COLUMNS if name != "signal"}
        if row_checksum(row, signal_digest(read_signal(table))) != int(sums[split][index]):
            raise UserError(
                f"trial {row_id(row)} ({folder}, {split}, row {index}) has another checksum than "
                f"when it was prepared: the disk or a copy damaged it; {_AGAIN}"
            )
        compared += 1
    return compared


def sampled_rows(
    splits: Mapping[str, Dataset], limit: int, seed: tuple[int, ...]
) -> list[tuple[str, int]]:
    """Draw ``limit`` rows of all splits together, in random order."""
    everything = [(split, len(dataset)) for split, dataset in splits.items()]
    total = sum(count for _, count in everything)
    chosen = np.random.default_rng(seed).permutation(total)[:limit]
    starts = np.cumsum([0, *(count for _, count in everything)])
    parts = np.searchsorted(starts, chosen, side="right") - 1
    return [
        (everything[part][0], int(place - starts[part]))
        for place, part in zip(chosen, parts, strict=True)
    ]


def _digest(text: str) -> np.ndarray:
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), np.uint8)
