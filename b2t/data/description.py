"""A YAML file in place of a dataset: where rows of another form are, and what columns mean."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import lru_cache
from glob import escape, glob
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets import Dataset, IterableDataset, load_dataset
from datasets.distributed import split_dataset_by_node
from pydantic import Field

from b2t.data.sources.base import SPLITS
from b2t.data.trials import trial_features
from b2t.errors import UserError
from b2t.options import Options, Positive, PositiveInt, checked

_KINDS = {".parquet": "parquet", ".tar": "webdataset", ".jsonl": "json", ".json": "json"}
_OURS = ("signal", "text", "phonemes", "session", "subject", "block", "trial", "sampling_rate")
SUFFIXES = (".yaml", ".yml")


class DatasetDescription(Options):
    """What a YAML file that is given as a dataset holds."""

    path: str
    """Hugging Face id, or a glob of parquet, JSON-lines or WebDataset (.tar) files, relative to the
    YAML file."""
    name: str | None = None
    """Configuration of a Hugging Face dataset that has several."""
    splits: dict[str, str] = Field(default={})
    """Our splits (train, val, test) and what they are called there: a split, or a glob of files."""
    columns: dict[str, str] = Field(default={})
    """Our columns and what they are called there; `a.b` is column b within a."""
    sampling_rate: Positive | None = None
    """In Hz, where no column says it."""
    session: str = "0"
    """Session of all rows, where no column says it."""
    sessions: list[str] = Field(default=[])
    """All sessions of a stream, which only its first rows tell otherwise."""
    channels_first: bool = False
    """Signals are [channels][bins]."""
    streaming: bool = False
    """Read rows as training needs them, instead of copying all to this disk."""
    window: PositiveInt = 256
    """Rows of a stream that are shuffled and sorted by length together, per rank; as many of its
    first ones stand for the dataset wherever all of it would be looked at."""

    @property
    def kind(self) -> str | None:
        """Loader of its files; None for a Hugging Face id."""
        return _KINDS.get(Path(self.path).suffix)


@lru_cache(maxsize=8)
def describe(path: str) -> DatasetDescription:
    """Read a description.

    Raises:
        UserError: it is no YAML, or names what is not known.
    """
    try:
        given = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(given, dict) or "path" not in given:
        raise UserError(
            f"{path}: expected a description of a dataset with the key path; see docs/DATA.md"
        )
    unknown = sorted(set(given) - set(DatasetDescription.model_fields))
    strange = sorted(set(given.get("columns") or {}) - set(_OURS))
    if unknown or strange:
        what, known = (
            (unknown[0], DatasetDescription.model_fields)
            if unknown
            else (f"columns.{strange[0]}", _OURS)
        )
        raise UserError(f"{path}: unknown key {what}; expected some of {', '.join(known)}")
    return checked(DatasetDescription, given, path)


def is_stream(path: str) -> bool:
    """Whether a dataset is described as one that is read while it is trained on."""
    return Path(path).suffix in SUFFIXES and Path(path).is_file() and describe(path).streaming


def described_splits(path: str) -> dict[str, Dataset]:
    """Load what a description says, in the columns of prepared data; of a stream its first rows.

    Raises:
        UserError: nothing there, or rows of another form.
    """
    found = describe(path)
    splits = {}
    for split in _splits(found, path):
        rows = _rows(path, found, split)
        if found.streaming:
            rows = list(islice(rows, found.window))  # type: ignore[assignment]
            splits[split] = _in_memory(rows, path, split)  # type: ignore[arg-type]
            continue
        first = next(rows, None)
        if first is None:
            raise UserError(f"{path}: its {split} split holds no row")
        splits[split] = Dataset.from_generator(
            _again,
            gen_kwargs={"path": path, "text": found.model_dump_json(), "split": split},
            features=trial_features(first["signal"].shape[1]),
            fingerprint=_mark(path, found, split),
        )
    return splits


def _in_memory(rows: list[dict[str, Any]], path: str, split: str) -> Dataset:
    if not rows:
        raise UserError(f"{path}: its {split} split holds no row")
    channels = {row["signal"].shape[1] for row in rows}
    if len(channels) > 1:
        raise UserError(f"{path}, {split}: trials have {min(channels)} to {max(channels)} channels")
    return Dataset.from_list(rows, features=trial_features(channels.pop()))


def stream(path: str, split: str, rank: int = 0, world: int = 1) -> IterableDataset:
    """Open a split as a stream of the rows that belong to a rank, as they are called there."""
    return split_dataset_by_node(_raw(path, describe(path), split, streaming=True), rank, world)


def row_of(raw: dict[str, Any], number: int, split: str, path: str) -> dict[str, Any]:
    """Bring a row into our columns: the signal [T, C] float32, and what else is known.

    Args:
        raw: as it is called there.
        number: of the row, where no column counts trials.
        split: it belongs to.
        path: of the description.

    Raises:
        UserError: a column that is not there, or a signal of another form.
    """
    found = describe(path)
    place = f"{path}, {split}, row {number}"
    named = {ours: _column(raw, found.columns.get(ours, ours), place, ours in found.columns)
             for ours in _OURS}  # fmt: skip
    if named["signal"] is None:
        raise UserError(
            f"{place}: no column {found.columns.get('signal', 'signal')} (found: "
            f"{', '.join(raw)}); name it with columns: {{signal: NAME}}"
        )
    try:
        signal = np.asarray(named["signal"], dtype=np.float32)
    except (ValueError, TypeError):
        signal = np.zeros(0, np.float32)
    if signal.ndim != 2:
        raise UserError(f"{place}: its signal is no table [bins][channels] of numbers")
    rate = named["sampling_rate"] or found.sampling_rate
    if rate is None:
        raise UserError(f"{path}: no column sampling_rate; give it as sampling_rate: HZ")
    session = named["session"]
    return {
        "signal": signal.T if found.channels_first else signal,
        "text": named["text"],
        "phonemes": named["phonemes"],
        "session": found.session if session is None else str(session),
        "subject": str(named["subject"] or ""),
        "block": _number(named["block"] or 0, int, f"{place}: block"),
        "trial": number
        if named["trial"] is None
        else _number(named["trial"], int, f"{place}: trial"),
        "sampling_rate": _number(rate, float, f"{place}: sampling_rate"),
        "split": split,
    }


def _number(value: Any, kind: type, name: str) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name} is {str(value)[:60]!r}, where a number is expected") from None


def _column(raw: dict[str, Any], name: str, place: str, asked: bool) -> Any:
    value: Any = raw
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            if asked:
                raise UserError(f"{place}: no column {name} (found: {', '.join(raw)})")
            return None
        value = value[part]
    return value


def _again(path: str, text: str, split: str) -> Iterator[dict[str, Any]]:
    yield from _rows(path, DatasetDescription.model_validate_json(text), split)


def _rows(path: str, found: DatasetDescription, split: str) -> Iterator[dict[str, Any]]:
    for number, raw in enumerate(_raw(path, found, split, streaming=True)):
        yield row_of(raw, number, split, path)


def _raw(path: str, found: DatasetDescription, split: str, *, streaming: bool) -> Any:
    there = found.splits.get(split, "validation" if split == "val" else split)
    try:
        if found.kind is None:
            return load_dataset(found.path, found.name, split=there, streaming=streaming)
        files = [escape(file) for file in _files(path, found, split)]  # datasets looks again
        return load_dataset(found.kind, data_files={split: files}, split=split, streaming=streaming)
    except UserError:
        raise
    except Exception as error:  # datasets passes on whatever network, files and pyarrow raise
        reason = next(iter(str(error).splitlines()), "no detail")[:200]
        raise UserError(
            f"{path}: {found.path} cannot be loaded ({type(error).__name__}: {reason})"
        ) from None


def _splits(found: DatasetDescription, path: str) -> list[str]:
    strange = sorted(set(found.splits) - set(SPLITS))
    if strange:
        raise UserError(f"{path}: splits names {strange[0]}; expected {', '.join(SPLITS)}")
    if found.splits:
        return [split for split in SPLITS if split in found.splits]
    if found.kind is None:
        return ["train", "val"]
    return [split for split in SPLITS if _files(path, found, split)]


def _files(path: str, found: DatasetDescription, split: str) -> list[str]:
    """Return the files of a split: those of its own glob, or whose names begin with it."""
    if split in found.splits:
        return _glob(path, found.splits[split])
    names = {"val": ("val", "valid", "validation", "dev")}.get(split, (split,))
    files = _glob(path, found.path)
    return [file for file in files if re.split(r"[-_.]", Path(file).name)[0] in names]


def _glob(path: str, pattern: str) -> list[str]:
    # The folder's own name may hold brackets, which are no pattern.
    place = os.path.join(escape(str(Path(path).parent)), os.path.expanduser(pattern))
    files = sorted(glob(place, recursive=True))
    if not files:
        raise UserError(f"{path}: {pattern}: no such file beside it")
    return files


def _mark(path: str, found: DatasetDescription, split: str) -> str:
    """Name what datasets keeps of a split, so that changed files are read again."""
    from datasets.fingerprint import Hasher

    files = _files(path, found, split) if found.kind else []
    stamps = [(file, Path(file).stat().st_mtime_ns, Path(file).stat().st_size) for file in files]
    return str(Hasher.hash([found.model_dump(mode="json"), split, stamps]))
