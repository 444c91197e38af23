"""The pickle that the field's phoneme decoder of Brain-to-Text '24 trains on.

It holds ``{"train", "test", "competition"}``, each a list of days, each day a dictionary with
``sentenceDat`` (trials [T, 256]), ``transcriptions``, ``phonemes`` [500], ``phoneLens`` and
``timeSeriesLens``. A pickle can run any code when it is loaded: this one is read by an unpickler
that builds arrays, lists, dictionaries, numbers and text and refuses everything else.
"""

import mmap
import pickle
import pickletools
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from b2t.data.phonemes import PHONEMES
from b2t.data.remarks import Remarks
from b2t.data.sources.base import SourceOptions, TrialInfo, require_plausible_size, require_rate
from b2t.data.sources.parts import PartsSource, choose_channels
from b2t.data.sources.reading import reading
from b2t.data.sources.recording import WholeTrials
from b2t.errors import UserError

NAME = "pickle"
READS = "the pickle of the '24 phoneme decoder (.pkl, .pickle; nothing in it is run)"
OPTIONS = frozenset({"channels"})
SAMPLING_RATE = 50.0
SPLIT_NAMES = {"train": "train", "test": "val", "competition": "test"}
_SUFFIXES = (".pkl", ".pickle", ".p")
_LARGEST_DTYPE = 1024
_REMEMBERING = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}


def find(path: Path) -> list[Path]:
    """Return the pickles at ``path``."""
    candidates = [path] if path.is_file() else sorted(path.rglob("*"))
    return [file for file in candidates if file.is_file() and file.suffix.lower() in _SUFFIXES]


def open_source(path: Path, files: list[Path], options: SourceOptions) -> PartsSource:
    """Open the pickle."""
    require_rate(SAMPLING_RATE, options.resample, path)
    remarks = Remarks()
    latest = lru_cache(maxsize=1)(load)
    parts = [
        _day(file, split, number, latest, options)
        for file in files
        for split, days in latest(file).items()
        for number in range(len(days))
    ]
    if not parts:
        raise UserError(f"{files[0]} holds no day in {', '.join(SPLIT_NAMES)}")
    return PartsSource(NAME, path, parts, options, remarks, own_splits=True, standardized=True)


class _Unpickler(pickle.Unpickler):
    """Builds arrays and plain values; a name of anything else ends the reading."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the few callables that arrays are pickled with."""
        found = _ALLOWED.get((module.replace("numpy._core", "numpy.core"), name))
        if found is None:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which could run code; only arrays, lists, "
                "dictionaries, numbers and text are read"
            )
        return found


def _dtype(*arguments: Any) -> np.dtype:
    """Return a type of numbers or text; one of Python objects could hold anything."""
    kind = np.dtype(*arguments)
    if kind.hasobject or kind.itemsize > _LARGEST_DTYPE:
        raise pickle.UnpicklingError(f"it holds an array of {kind}")
    return kind


def _reconstruct(kind: type, shape: Any, code: Any) -> np.ndarray:
    """Return the empty array that unpickling then fills."""
    return np.ndarray.__new__(np.ndarray, (0,), np.dtype("b"))


def _scalar(kind: np.dtype, content: bytes) -> Any:
    """Return one number."""
    return np.frombuffer(content, dtype=_dtype(kind), count=1)[0]


def _frombuffer(content: Any, kind: np.dtype, shape: Any, order: str) -> np.ndarray:
    """Return the array that newer protocols write as one buffer."""
    return np.frombuffer(content, dtype=_dtype(kind)).reshape(shape, order=order)  # type: ignore[call-overload]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Return the bytes that old protocols write as text."""
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("_codecs", "encode"): _encode,
}


def _require_sound(content: Any) -> None:
    """Refuse sizes and places beyond the file, for which unpickling would take memory first."""
    places = 0
    for operation, argument, _ in pickletools.genops(content):
        if operation.name in _REMEMBERING:
            if argument is not None and argument > places:
                raise pickle.UnpicklingError(f"it remembers {places} things, and a {argument}th")
            places += 1


def load(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the days of each split.

    Raises:
        UserError: the pickle is damaged, asks for something else than data, or has another layout.
    """
    with (
        reading(file, "a pickle of data"),
        file.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        _require_sound(mapped)
        mapped.seek(0)
        content = _Unpickler(mapped).load()
    if not isinstance(content, dict) or not set(SPLIT_NAMES) & set(content):
        found = (
            ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        )
        raise UserError(
            f"{file} holds {found[:200]}: expected a dictionary with train, test and competition"
        )
    days: dict[str, list[dict[str, Any]]] = {}
    for split in SPLIT_NAMES:
        value = content.get(split, [])
        if not isinstance(value, list) or not all(isinstance(day, dict) for day in value):
            raise UserError(f"{file}, {split}: expected a list of days, a dictionary each")
        days[split] = value
    return days


def _day(file: Path, split: str, number: int, latest: Any, options: SourceOptions) -> WholeTrials:
    place = f"{file}, {split}, day {number}"
    day = latest(file)[split][number]
    trials = _column(day, "sentenceDat", place)
    texts = _column(day, "transcriptions", place, len(trials))
    classes = _column(day, "phonemes", place, len(trials))
    lengths = _column(day, "phoneLens", place, len(trials))
    session = f"day{number:02d}"
    infos = [
        TrialInfo(
            name=f"{place}, trial {index}",
            session=session,
            subject="t12",
            block=0,
            trial=index,
            text=_text(texts[index]) if texts else None,
            phonemes=_phonemes(classes, lengths, index, f"{place}, trial {index}"),
            split=SPLIT_NAMES[split],
        )
        for index in range(len(trials))
    ]
    columns = _trial(trials, 0, place).shape[1] if trials else 0
    names = [f"channel{index}" for index in range(columns)]
    picks = choose_channels(names, options.channels, place)
    return WholeTrials(
        file=file,
        session=f"{split}/{session}",
        channels=[names[pick] for pick in picks],
        sampling_rate=SAMPLING_RATE,
        trials=infos,
        load=lambda index: _trial(latest(file)[split][number]["sentenceDat"], index, place)[
            :, picks
        ],
        resample=options.resample,
        lack=f"{place} holds no trial",
    )


def _column(day: dict[str, Any], name: str, place: str, expected: int | None = None) -> list[Any]:
    value = day.get(name, [])
    if not isinstance(value, (list, np.ndarray)):
        raise UserError(f"{place}, {name} is {type(value).__name__}, where a list is expected")
    if expected is not None and len(value) and len(value) != expected:
        raise UserError(
            f"{place}: {expected} trials in sentenceDat and {len(value)} in {name}: expected the "
            "same number"
        )
    return list(value)


def _trial(trials: list[Any], index: int, place: str) -> np.ndarray:
    signal = np.asarray(trials[index])
    name = f"{place}, trial {index}"
    if signal.ndim != 2 or signal.dtype.kind not in "fiu":
        raise UserError(
            f"{name} holds {signal.dtype} of shape {list(signal.shape)}, where numbers "
            "[bins, channels] are expected"
        )
    require_plausible_size(signal.shape[0], signal.shape[1], name)
    return signal.astype(np.float32)


def _text(value: Any) -> str | None:
    if isinstance(value, np.ndarray):
        value = "".join(map(str, value.flatten().tolist()))
    return str(value).strip() or None


def _phonemes(
    classes: list[Any], lengths: list[Any], index: int, name: str
) -> tuple[int, ...] | None:
    if not classes:
        return None
    labels = np.asarray(classes[index]).flatten()
    length = int(lengths[index]) if lengths else int(np.count_nonzero(labels))
    labels = labels[:length]
    outside = (
        labels[(labels < 1) | (labels >= len(PHONEMES))] if labels.dtype.kind in "iu" else labels
    )
    if outside.size:
        raise UserError(
            f"{name}: phonemes holds {outside[0]}, where classes 1 to {len(PHONEMES) - 1} are "
            "expected"
        )
    return tuple(int(label) for label in labels) or None
