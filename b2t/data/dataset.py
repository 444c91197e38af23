"""Datasets as training reads them: a prepared folder, parquet files, or a Hugging Face dataset."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from glob import escape, glob, has_magic
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from b2t.data.description import SUFFIXES, describe, described_splits
from b2t.data.examine import examine, first_line, remark_on_doubles
from b2t.data.record import read_record, trusted_record
from b2t.data.sources import FORMATS
from b2t.data.sources.base import SPLITS
from b2t.data.trials import (
    COLUMNS,
    read_signal,
    signal_lengths,
    values_of,
)
from b2t.errors import UserError
from b2t.signal_spec import Z_SCORE

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_TIMEOUT_SECONDS = 5.0
_SPLIT_NAMES = {"validation": "val", "valid": "val", "dev": "val"}


@dataclass(frozen=True)
class DatasetInfo:
    """What a dataset holds.

    Attributes:
        channels: number of channels C.
        sampling_rate: in Hz.
        sessions: sessions with training trials, sorted: those a model can learn to adapt to.
        simulated: the signals come from `b2t simulate`.
        has_text: some trial has a text.
        has_phonemes: some trial has phonemes.
        splits: number of rows by split.
        fingerprint: hash of the content, the same whenever the same data is prepared again.
        channel_names: C names, where the dataset carries them.
        z_scored: the signals are z-scored; False where this is not known.
        unit: `z-score`, or the unit of the recordings; None where this is not known.
        processing: `ProcessingOptions` that the signals went through; None where not known.
        normalization: what they were z-scored within; None where this is not known.
    """

    channels: int
    sampling_rate: float
    sessions: list[str]
    simulated: bool
    has_text: bool
    has_phonemes: bool
    splits: dict[str, int]
    fingerprint: str
    channel_names: list[str] | None = None
    z_scored: bool = False
    unit: str | None = None
    processing: dict[str, Any] | None = None
    normalization: str | None = None


@dataclass(frozen=True)
class Opened:
    """A dataset's splits, loaded once, and what is known of them."""

    splits: dict[str, Dataset]
    info: DatasetInfo


def load_trials(path: str | Path, split: str) -> Dataset:
    """Return one split, checked.

    Args:
        path: a folder written by `b2t prepare`, a glob of parquet files, a Hugging Face id, or a
            YAML file that describes one of these.
        split: ``train``, ``val`` or ``test``.

    Raises:
        UserError: nothing there, another layout, a missing column or split, an empty split, and,
            in data that `b2t prepare` has not checked, NaN, empty trials or unequal channels.
    """
    splits = opened(path).splits
    if split not in splits:
        raise UserError(
            f"{path} has no {split} split: it has {', '.join(splits)}; prepare it again with a "
            "share for it (--split), or choose another split"
        )
    return splits[split]


def dataset_info(path: str | Path) -> DatasetInfo:
    """Describe a dataset. Errors as in `load_trials`."""
    return opened(path).info


def opened(path: str | Path) -> Opened:
    """Open a dataset, checked; it stays open. Errors as in `load_trials`."""
    place = os.path.expanduser(path)
    return _open(place, _stamp(Path(place)))


@dataclass(frozen=True)
class Unexamined:
    """Splits whose columns are right and whose values nobody has looked at.

    Attributes:
        splits: rows by split.
        record: what `b2t prepare` wrote beside them, empty where it did not or is out of date.
        channels: C.
        sampling_rate: in Hz.
    """

    splits: dict[str, Dataset]
    record: dict[str, Any]
    channels: int
    sampling_rate: float


def unexamined(path: str | Path) -> Unexamined:
    """Open a dataset whose trials may be bad, to find out which.

    Raises:
        UserError: as in `load_trials`, but for what single trials hold.
    """
    place = os.path.expanduser(path)
    splits = _checked(place)
    first = next(iter(splits.values()))
    return Unexamined(
        splits,
        trusted_record(Path(place), splits),
        channels=read_signal(first.with_format("arrow")[0]).shape[1],
        sampling_rate=_sampling_rate(splits, place),
    )


def _checked(path: str) -> dict[str, Dataset]:
    splits = _load(path)
    _require_columns(splits, path)
    _require_valid(splits, path)
    _require_rows(splits, path)
    return splits


def _stamp(path: Path) -> tuple[float, ...]:
    """Return what changes when a folder or file is written again, so that no stale copy is used."""
    patterns = ("*.json", "*.npz", "*/state.json", "*/*.arrow")
    below = [file for pattern in patterns for file in sorted(path.glob(pattern))]
    files = (
        [path, *below]
        if path.is_dir()
        else [Path(file) for file in sorted(glob(str(path), recursive=True))]
    )
    return tuple(part for file in files for part in (file.stat().st_mtime_ns, file.stat().st_size))


@lru_cache(maxsize=8)
def _open(path: str, stamp: tuple[float, ...]) -> Opened:
    splits = _checked(path)
    record = trusted_record(Path(path), splits)
    fingerprint = record["fingerprint"] if record else examine(splits, path)
    if record:
        remark_on_doubles(splits, path)
    first = next(iter(splits.values()))
    info = DatasetInfo(
        channels=read_signal(first.with_format("arrow")[0]).shape[1],
        sampling_rate=_sampling_rate(splits, path),
        sessions=_described_sessions(path)
        or sorted({*values_of(splits.get("train", first), "session")}),
        simulated=bool((record or read_record(Path(path))).get("simulated", False)),
        has_text=any(_has_values(dataset, "text") for dataset in splits.values()),
        has_phonemes=any(_has_values(dataset, "phonemes") for dataset in splits.values()),
        splits={split: len(dataset) for split, dataset in splits.items()},
        fingerprint=fingerprint,
        channel_names=record.get("channels"),
        z_scored=bool(record.get("z_scored", False)),
        unit=record.get("unit") or (Z_SCORE if record.get("z_scored") else None),
        processing=(record["processing"] or {}) if "processing" in record else None,
        normalization=record.get("normalization"),
    )
    return Opened(splits, info)


def _described_sessions(path: str) -> list[str]:
    """Return the sessions that a description names: the first rows of a stream may lack some."""
    return sorted(describe(path).sessions) if Path(path).suffix in SUFFIXES else []


def _load(path: str) -> dict[str, Dataset]:
    place = Path(path).expanduser()
    if place.suffix in SUFFIXES and place.is_file():
        return described_splits(path)
    if place.is_dir():
        return _load_folder(place)
    if has_magic(path) or path.endswith(".parquet"):
        return _load_parquet(path)
    if place.exists():
        raise UserError(_unprepared(place))
    if _HUB_ID.fullmatch(path):
        return _load_hub(path)
    raise UserError(
        f"{path}: no such folder. Expected a folder written by `b2t prepare`, a glob of parquet "
        "files ('data/*.parquet') or a Hugging Face dataset id ('user/name')"
    )


def _load_folder(path: Path) -> dict[str, Dataset]:
    if (path / "state.json").exists():
        raise UserError(
            f"{path} holds one split saved on its own, where a folder with dataset_dict.json and "
            f"one folder per split is expected: did you mean {path.parent}?"
        )
    if not (path / "dataset_dict.json").exists():
        raise UserError(_unprepared(path))
    try:
        _require_data_files(path)
        loaded = load_from_disk(str(path))
    except UserError:
        raise
    except Exception as error:  # datasets passes on whatever damaged JSON and Arrow lead to
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {first_line(error)}): a file is "
            "missing or damaged; prepare it again"
        ) from None
    return _named(loaded, str(path))


def _require_data_files(path: Path) -> None:
    """Refuse a split of no rows: datasets saves it without files and cannot load it again."""
    for split in json.loads((path / "dataset_dict.json").read_text())["splits"]:
        if not json.loads((path / split / "state.json").read_text())["_data_files"]:
            raise UserError(_empty(path, split))


def _empty(path: Path | str, split: str) -> str:
    return f"{path}: the {split} split is empty: prepare it again, or remove it"


def _unprepared(path: Path) -> str:
    formats = [module.NAME for module in FORMATS if module.find(path)]
    if formats:
        return f"{path} holds recordings ({formats[0]}) not yet prepared: b2t prepare {path} OUT"
    parquet = path.is_dir() and any(path.glob("*.parquet"))
    hint = f"; its parquet files are read as '{path}/*.parquet'" if parquet else ""
    return (
        f"{path} is not a dataset: expected a folder written by `b2t prepare`, with "
        f"dataset_dict.json and one folder per split{hint}"
    )


def _load_parquet(pattern: str) -> dict[str, Dataset]:
    files = sorted(glob(os.path.expanduser(pattern), recursive=True))
    if not files:
        raise UserError(f"{pattern}: no such parquet file")
    by_split: dict[str, list[str]] = {}
    for file in files:
        name = re.split(r"[-_.]", Path(file).name)[0]
        by_split.setdefault(_SPLIT_NAMES.get(name, name), []).append(file)
    others = sorted(set(by_split) - set(SPLITS))
    if others and len(others) < len(by_split):
        raise UserError(
            f"{pattern}: some file names begin with a split and others do not "
            f"({Path(by_split[others[0]][0]).name}): begin all with train, val or test, or none"
        )
    if others:
        by_split = {"train": files}
    # `datasets` looks for files once more, and a name may hold brackets.
    named = {split: [escape(file) for file in files] for split, files in by_split.items()}
    try:
        loaded = load_dataset("parquet", data_files=named)
    except Exception as error:  # datasets wraps whatever pyarrow and the cache raise
        cause = error.__cause__ or error
        raise UserError(
            f"{pattern} cannot be read as parquet ({type(cause).__name__}: {first_line(cause)})"
        ) from None
    if len(loaded) == 1 and "split" in loaded["train"].column_names:
        return _by_column(loaded["train"], pattern)
    return _named(loaded, pattern)


def _by_column(dataset: Dataset, pattern: str) -> dict[str, Dataset]:
    given = values_of(dataset, "split")
    names = np.asarray([_SPLIT_NAMES.get(str(name), str(name)) for name in given])
    others = sorted(set(names.tolist()) - set(SPLITS))
    if others:
        raise UserError(
            f"{pattern}: column split holds {', '.join(others[:5])} "
            f"({int(np.isin(names, others).sum())} rows), expected train, val or test"
        )
    found = [split for split in SPLITS if split in names]
    return {split: dataset.select(np.flatnonzero(names == split)) for split in found}


def _load_hub(name: str) -> dict[str, Dataset]:
    from huggingface_hub import constants

    nothing = f"{name} is neither a folder here nor"
    if not constants.HF_HUB_OFFLINE:
        _require_on_hub(name, nothing)
    try:
        loaded = load_dataset(name)
    except Exception as error:  # datasets raises many kinds here, each a reason not to go on
        raise UserError(
            f"{nothing} a Hugging Face dataset that can be loaded"
            f"{' offline (HF_HUB_OFFLINE is set)' if constants.HF_HUB_OFFLINE else ''} "
            f"({type(error).__name__}: {first_line(error)})"
        ) from None
    return _named(loaded, name)


def _require_on_hub(name: str, nothing: str) -> None:
    """Ask the Hub once, briefly: load_dataset would retry for minutes without a network."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().dataset_info(name, timeout=_HUB_TIMEOUT_SECONDS)
    except RepositoryNotFoundError:
        raise UserError(
            f"{nothing} a Hugging Face dataset that you can read: check the spelling, or log in "
            "with `hf auth login` if it is private"
        ) from None
    except Exception as error:  # the HTTP library, and so its errors, change between releases
        raise UserError(
            f"{nothing} can the Hugging Face Hub be reached ({type(error).__name__}): check the "
            "path or the network; HF_HUB_OFFLINE=1 uses a copy downloaded before"
        ) from None


def _named(loaded: Any, path: str) -> dict[str, Dataset]:
    if not isinstance(loaded, DatasetDict):
        loaded = {"train": loaded}
    found: dict[str, Dataset] = {}
    origin: dict[str, str] = {}
    for name, dataset in loaded.items():
        split = _SPLIT_NAMES.get(name, name)
        if split in found:
            raise UserError(
                f"{path}: splits {origin[split]} and {name} are both read as {split}: join them, "
                "or rename one"
            )
        found[split], origin[split] = dataset, name
    order = [split for split in SPLITS if split in found]
    return {split: found[split] for split in [*order, *sorted(set(found) - set(order))]}


def _require_columns(splits: dict[str, Dataset], path: str) -> None:
    for split, dataset in splits.items():
        missing = [name for name in COLUMNS if name not in dataset.column_names and name != "split"]
        if missing:
            raise UserError(
                f"{path}, {split}: no column {', '.join(missing)} (found: "
                f"{', '.join(dataset.column_names)}); expected {', '.join(COLUMNS)}, as "
                "`b2t prepare` writes them"
            )


def _require_valid(splits: dict[str, Dataset], path: str) -> None:
    """Refuse columns of another type, and offsets that Arrow would follow beyond the file."""
    for split, dataset in splits.items():
        schema = dataset.features.arrow_schema
        for name, (fits, expected) in _TYPES.items():
            found = schema.field(name).type
            if not (fits(found) or (pa.types.is_null(found) and name in _MAY_BE_NULL)):
                raise UserError(
                    f"{path}, {split}: column {name} holds {found}, expected {expected}"
                )
        try:
            dataset.data.table.validate(full=True)
        except pa.ArrowException as error:
            raise UserError(
                f"{path}, {split}: its Arrow data are damaged ({first_line(error)}): copy them "
                "again, or prepare the data again"
            ) from None


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _is_classes(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return lists and (pa.types.is_integer(kind.value_type) or pa.types.is_null(kind.value_type))


_TYPES: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "text": (_is_text, "text"),
    "phonemes": (_is_classes, "lists of whole numbers"),
    "session": (_is_text, "text"),
    "subject": (_is_text, "text"),
    "block": (pa.types.is_integer, "whole numbers"),
    "trial": (pa.types.is_integer, "whole numbers"),
    "sampling_rate": (_is_number, "numbers"),
}
_MAY_BE_NULL = ("text", "phonemes", "subject")


def _require_rows(splits: dict[str, Dataset], path: str) -> None:
    if not splits:
        raise UserError(f"{path}: no split named train, val or test")
    for split, dataset in splits.items():
        if not len(dataset):
            raise UserError(_empty(path, split))


def _sampling_rate(splits: dict[str, Dataset], path: str) -> float:
    rates = {rate for dataset in splits.values() for rate in values_of(dataset, "sampling_rate")}
    impossible = [rate for rate in rates if rate is None or not 0 < rate < float("inf")]
    if impossible:
        raise UserError(
            f"{path}: sampling_rate is {impossible[0]}, expected a number of Hz above 0"
        )
    if len(rates) != 1:
        raise UserError(
            f"{path} mixes sampling rates ({', '.join(f'{rate:g} Hz' for rate in sorted(rates))}): "
            "prepare it again with --resample HZ"
        )
    return float(rates.pop())


def _has_values(dataset: Dataset, column: str) -> bool:
    values = dataset.data.column(column)
    return pc.count(values, mode="only_valid").as_py() > 0 and bool(len(dataset))


def durations(dataset: Dataset) -> np.ndarray:
    """Return the duration of every trial in seconds, [rows]."""
    rates = dataset.with_format("arrow").select_columns(["sampling_rate"])[:]["sampling_rate"]
    return signal_lengths(dataset) / rates.to_numpy()
