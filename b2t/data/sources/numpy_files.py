"""NumPy arrays, with a JSONL of texts or without.

With JSONL, each line names one trial: ``{"file": "a.npy", "text": "…"}``, for arrays of an ``.npz``
with ``"key"``, and, as you like, ``session``, ``subject``, ``block``, ``trial``, ``phonemes``,
``split`` and ``channels``. Without, an array [T, C] is a continuous recording and one of three
dimensions holds trials.
"""

import json
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from b2t.data.phonemes import PHONEMES
from b2t.data.remarks import Remarks
from b2t.data.sources.arrays import Array, open_array
from b2t.data.sources.base import SourceOptions, TrialInfo, rate_in_hertz, require_rate
from b2t.data.sources.cutting import require_sensible
from b2t.data.sources.parts import Part, PartsSource, choose_channels
from b2t.data.sources.reading import reading
from b2t.data.sources.recording import WholeTrials
from b2t.data.sources.sessions import session_name
from b2t.errors import UserError
from b2t.options import Options

NAME = "numpy"
READS = "NumPy arrays (.npy, .npz; --rate HZ), with a .jsonl of texts or without"
OPTIONS = frozenset({"window", "overlap", "channels", "rate", "layout"})
_KIND = (
    "a NumPy array",
    "it is damaged, cut short, or holds Python objects; save numbers with np.save",
)

_Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class Line(Options):
    """One line of the JSONL."""

    file: str
    """Array file, beside the JSONL or below its folder."""
    key: str | None = None
    """Name of the array in an `.npz`."""
    text: str | None = None
    """The sentence."""
    session: str | None = None
    """Recording day; null means the array's folder, or `session`."""
    subject: str | None = None
    """Whose recording it is; null means the session."""
    block: _Int64 = 0
    """Block within the session."""
    trial: _Int64 | None = None
    """Number within the block; null counts the lines."""
    phonemes: list[int] | None = None
    """Classes 1 to 40 (`b2t.data.phonemes`)."""
    split: Literal["train", "val", "test"] | None = None
    """Which split it belongs to; null shares trials out."""


def find(path: Path) -> list[Path]:
    """Return the JSONL at ``path``, or, where there is none, the arrays."""
    candidates = [path] if path.is_file() else sorted(path.rglob("*"))
    files = [file for file in candidates if file.is_file()]
    arrays = [file for file in files if file.suffix.lower() in (".npy", ".npz")]
    lists = [file for file in files if file.suffix.lower() == ".jsonl"]
    return lists if lists and (arrays or path.is_file()) else arrays


def open_source(path: Path, files: list[Path], options: SourceOptions) -> PartsSource:
    """Open all arrays."""
    require_sensible(options)
    if options.rate is None:
        raise UserError(
            f"{files[0]}: arrays do not say their sampling rate: give it with --rate HZ"
        )
    rate = rate_in_hertz(options.rate)
    require_rate(rate, options.resample, files[0])
    remarks = Remarks()
    load = lru_cache(maxsize=1)(_array)
    listed = files[0].suffix.lower() == ".jsonl"
    parts: list[Part] = []
    for file in files:
        if listed:
            parts.append(_listed(file, rate, load, options))
        else:
            parts += _alone(file, path, rate, load, options, remarks)
    own = any(info.split for part in parts for info in part.trials)
    return PartsSource(NAME, path, parts, options, remarks, own_splits=own and listed)


_Load = Callable[[Path, str | None], np.ndarray]


def _alone(
    file: Path, root: Path, rate: float, load: _Load, options: SourceOptions, remarks: Remarks
) -> list[Part]:
    keys = _keys(file)
    parts = []
    for key in keys:
        name = session_name(file, root, key if len(keys) > 1 else None)
        shape = load(file, key).shape
        array = Array(file, key or "", name, shape, rate, partial(load, file, key))
        parts.append(open_array(array, options, remarks))
    return parts


def _listed(file: Path, rate: float, load: _Load, options: SourceOptions) -> Part:
    lines = _lines(file)
    places = [(file.parent / line.file, line.key) for _, line in lines]
    trials, channels = [], 0
    for index, ((number, line), (place, key)) in enumerate(zip(lines, places, strict=True)):
        name = f"{file}, line {number}"
        if not place.is_file():
            raise UserError(f"{name}: {place} is not there")
        shape = load(place, key).shape
        if len(shape) != 2:
            raise UserError(
                f"{name}: {place} has shape {list(shape)}, where a trial [bins, channels] is "
                "expected"
            )
        count = shape[0] if options.layout == "channels-first" else shape[1]
        channels = channels or count
        if count != channels:
            raise UserError(
                f"{name}: {place} has {count} channels, the trials before it {channels}: one "
                "dataset needs the same channels throughout"
            )
        trials.append(_trial(name, line, index, place))
    names = [f"channel{index}" for index in range(channels)]
    picks = choose_channels(names, options.channels, file)

    def trial(index: int) -> np.ndarray:
        values = load(*places[index])
        turned = values.T if options.layout == "channels-first" else values
        return np.asarray(turned[:, picks], dtype=np.float32)

    return WholeTrials(
        file=file,
        session=f"{file}",
        channels=[names[pick] for pick in picks],
        sampling_rate=rate,
        trials=trials,
        load=trial,
        resample=options.resample,
        lack=f"{file} has no line",
    )


def _trial(name: str, line: Line, index: int, place: Path) -> TrialInfo:
    outside = [label for label in line.phonemes or () if not 0 < label < len(PHONEMES)]
    if outside:
        raise UserError(
            f"{name}: phonemes holds {outside[0]}, where classes 1 to {len(PHONEMES) - 1} are "
            "expected"
        )
    session = line.session or (place.parent.name or "session")
    return TrialInfo(
        name=name,
        session=session,
        subject=line.subject or session,
        block=line.block,
        trial=index if line.trial is None else line.trial,
        text=(line.text or "").strip() or None,
        phonemes=tuple(line.phonemes) if line.phonemes else None,
        split=line.split,
    )


def _lines(file: Path) -> list[tuple[int, Line]]:
    try:
        # Not `splitlines`: a text may hold U+2028, which ends no line of JSON.
        texts = file.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 ({error.reason} at byte {error.start})") from None
    lines = []
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            lines.append((number, Line(**_object(text))))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise UserError(
                f"{file}, line {number}: {key}: {first['msg']} (found {first['input']!r:.60}); "
                f"expected {', '.join(Line.model_fields)}"
            ) from None
        except ValueError as error:
            raise UserError(f"{file}, line {number} is no JSON object ({error})") from None
    return lines


def _object(text: str) -> dict[str, Any]:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"found {type(content).__name__}")
    return content


def _keys(file: Path) -> list[str | None]:
    if file.suffix.lower() == ".npy":
        return [None]
    with reading(file, *_KIND), np.load(file, allow_pickle=False) as archive:
        return list(archive.files)


def _array(file: Path, key: str | None) -> np.ndarray:
    """Return one array, mapped from disk where it lies alone in its file."""
    with reading(file, *_KIND):
        if key is None and file.suffix.lower() == ".npy":
            values = np.load(file, mmap_mode="r", allow_pickle=False)
        else:
            with np.load(file, allow_pickle=False) as archive:
                names = archive.files
                if key is None and len(names) == 1:
                    key = names[0]
                if key not in names:
                    raise UserError(f"{file} has no array {key}: it has {', '.join(names)}")
                values = archive[key]
    if values.dtype.kind not in "fiu":
        raise UserError(f"{file} holds {values.dtype}, where real numbers are expected")
    return values
