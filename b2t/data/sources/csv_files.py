"""Tables of numbers: CSV and TSV, as they are, gzipped, or in ZIP archives.

The first row names the columns. A column of times (``Time:256Hz``, ``time``, ``timestamp``) gives
the sampling rate; a column ``Epoch`` or ``Trial`` cuts the table into trials; the other columns of
numbers are channels.
"""

import io
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from b2t.data.remarks import Remarks
from b2t.data.sources.base import SourceOptions, TrialInfo, rate_in_hertz, require_rate
from b2t.data.sources.cutting import annotated, require_sensible, windows
from b2t.data.sources.parts import Part, PartsSource, choose_channels
from b2t.data.sources.reading import reading
from b2t.data.sources.recording import Annotation, CutRecording, Recording, WholeTrials
from b2t.data.sources.sessions import session_name
from b2t.errors import UserError

NAME = "csv"
READS = "CSV or TSV tables, also gzipped or in ZIP (a row per sample, a column per channel)"
OPTIONS = frozenset({"window", "overlap", "annotations", "text_column", "channels", "rate"})
_TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
_LARGEST = 2**33
"""Bytes that one table of an archive may unpack to."""
_UNITS = r"(ms(?:ecs?)?|milli(?:second)?s?|us(?:ecs?)?|µs|micro(?:second)?s?)"
_TIME = re.compile(rf"(time|timestamp|seconds?|t)(\b|_({_UNITS}|s|secs?|seconds?)$)", re.I)
_UNIT = re.compile(rf"[\s_(\[,/]{_UNITS}\b", re.I)
"""Of a column of times that are no seconds, after its name: `time_ms`, `Time (µs)`."""
_PER_SECOND = {"m": 1e3, "u": 1e6, "µ": 1e6}
_EPOCH = re.compile(r"(epoch|trial)(_?(id|number|index))?$", re.I)
_COUNTER = re.compile(r"(sample|index|counter|marker|unnamed.*|)(_?(id|number|index))?$", re.I)
_HERTZ = re.compile(r"([0-9.]+)\s*Hz", re.I)


@dataclass(frozen=True)
class _Place:
    """One table: a file, or a member of an archive."""

    file: Path
    member: str | None = None

    def __str__(self) -> str:
        return f"{self.file}, {self.member}" if self.member else f"{self.file}"


def find(path: Path) -> list[Path]:
    """Return the tables and archives of tables at ``path``."""
    candidates = [path] if path.is_file() else sorted(path.rglob("*"))
    return [
        file
        for file in candidates
        if file.is_file()
        and (file.name.lower().endswith(_TABLES) or (_is_zip(file) and _members(file)))
    ]


def open_source(path: Path, files: list[Path], options: SourceOptions) -> PartsSource:
    """Open all tables."""
    require_sensible(options)
    remarks = Remarks()
    places = [
        _Place(file, member)
        for file in files
        for member in (_members(file) if _is_zip(file) else [None])
    ]
    latest = lru_cache(maxsize=1)(_signal)  # trials are read table by table
    parts = [_open(place, places, path, latest, options, remarks) for place in places]
    return PartsSource(NAME, path, parts, options, remarks)


def _is_zip(file: Path) -> bool:
    return file.suffix.lower() == ".zip"


def _members(file: Path) -> list[str]:
    with reading(file, "ZIP"), zipfile.ZipFile(file) as archive:
        names = [
            item.filename
            for item in archive.infolist()
            if item.filename.lower().endswith(_TABLES) and "__MACOSX" not in item.filename
        ]
    return sorted(names)


_Load = Callable[[_Place, tuple[str, ...]], np.ndarray]


def _open(
    place: _Place,
    places: list[_Place],
    root: Path,
    load: _Load,
    options: SourceOptions,
    remarks: Remarks,
) -> Part:
    table = _table(place)
    columns = _numeric(table)
    time = next((name for name in columns if _TIME.match(name)), None)
    epoch = next((name for name in table.column_names if _EPOCH.match(name)), None)
    text = options.text_column
    if text is not None and text not in table.column_names:
        raise UserError(
            f"{place} has no column {text!r}: --text-column takes one of "
            f"{', '.join(table.column_names)}"
        )
    signals = [
        name for name in columns if name not in (time, epoch, text) and not _COUNTER.fullmatch(name)
    ]
    if not signals:
        raise UserError(
            f"{place}: no column of numbers that could be a channel (its columns: "
            f"{', '.join(table.column_names)})"
        )
    chosen = [signals[index] for index in choose_channels(signals, options.channels, str(place))]
    rate = _rate(place, table, time, options)
    require_rate(rate, options.resample, str(place))
    alone = sum(other.file == place.file for other in places) == 1
    session = session_name(place.file, root, None if alone else place.member)
    cut = _runs(table, epoch) if epoch else None
    if cut is None:
        if time is not None:
            _look_for_gaps(place, table, time, remarks)
        return _continuous(place, session, chosen, rate, table, load, options, remarks)
    trials = [
        TrialInfo(
            name=f"{place}, {epoch} {index}",
            session=session,
            subject=session,
            block=0,
            trial=index,
            text=_label(table, text, start),
        )
        for index, (start, _) in enumerate(cut)
    ]
    return WholeTrials(
        file=place.file,
        session=session,
        channels=chosen,
        sampling_rate=rate,
        trials=trials,
        load=lambda index: load(place, tuple(chosen))[slice(*cut[index])],
        resample=options.resample,
        lack=f"{place} has no row",
    )


def _continuous(
    place: _Place,
    session: str,
    channels: list[str],
    rate: float,
    table: pa.Table,
    load: _Load,
    options: SourceOptions,
    remarks: Remarks,
) -> Part:
    text = options.text_column
    marks = []
    if text is not None:
        marks = [
            Annotation(start, stop - start, _label(table, text, start) or "")
            for start, stop in _runs(table, text)
        ]
    recording = Recording(
        file=place.file,
        session=session,
        subject=session,
        channels=channels,
        sampling_rate=rate,
        samples=len(table),
        read=lambda start, stop: load(place, tuple(channels))[start:stop],
        annotations=[mark for mark in marks if mark.text],
        place=place.member or "",
    )
    by_text = options.annotations or text is not None
    return CutRecording(recording, annotated if by_text else windows, options, remarks)


def _signal(place: _Place, channels: tuple[str, ...]) -> np.ndarray:
    """Return the channels [T, C] of one table."""
    table = _table(place)
    columns = [
        table.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False) for name in channels
    ]
    return np.stack(columns, 1).astype(np.float32)


def _table(place: _Place) -> pa.Table:
    """Read a table.

    Raises:
        UserError: it is no table, or larger than can be meant.
    """
    name = (place.member or place.file.name).lower()
    separator = "\t" if ".tsv" in name else ","
    remedy = "expected a first row of column names, then rows of numbers"
    with reading(str(place), "a table", remedy):
        content: object = str(place.file)
        if place.member is not None:
            with zipfile.ZipFile(place.file) as archive:
                if archive.getinfo(place.member).file_size > _LARGEST:
                    raise UserError(f"{place} unpacks to more than {_LARGEST // 2**30} GiB")
                content = io.BytesIO(archive.read(place.member))
        table = csv.read_csv(content, parse_options=csv.ParseOptions(delimiter=separator))
        names = table.column_names  # decoded here
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{place} names column {twice[0]!r} twice: rename one of them")
    if not len(table):
        raise UserError(f"{place} has column names and no row")
    return table


def _numeric(table: pa.Table) -> list[str]:
    return [
        field.name
        for field in table.schema
        if pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
    ]


def _rate(place: _Place, table: pa.Table, time: str | None, options: SourceOptions) -> float:
    if options.rate is not None:
        return rate_in_hertz(options.rate)
    if time is not None:
        if named := _HERTZ.search(time):
            return float(named[1])
        steps = np.diff(table.column(time).cast(pa.float64()).to_numpy())
        steps = steps[np.isfinite(steps) & (steps > 0)]
        unit = _UNIT.search(time)
        second = _PER_SECOND[unit[1].lower()[0]] if unit else 1.0
        if steps.size:
            return float(round(second / float(np.median(steps)), 6))
    raise UserError(
        f"{place} does not say its sampling rate (no column of times in seconds among "
        f"{', '.join(table.column_names[:8])} …): give it with --rate HZ"
    )


def _look_for_gaps(place: _Place, table: pa.Table, time: str, remarks: Remarks) -> None:
    """Say where times jump: rows of a recording are taken as evenly spaced."""
    steps = np.diff(table.column(time).cast(pa.float64()).to_numpy())
    usual = np.median(steps[steps > 0]) if (steps > 0).any() else np.inf
    jumps = np.flatnonzero(~(np.abs(steps) < 10 * usual) | (steps < 0))
    if len(jumps):
        remarks.add(
            f"times jump {len(jumps)} times, first after row {jumps[0] + 1}; rows are taken as "
            "evenly spaced: cut the table there, or give it a column Epoch",
            str(place),
            "table",
        )


def _runs(table: pa.Table, column: str) -> list[tuple[int, int]]:
    """Return the stretches [start, stop) of rows with one value in ``column``."""
    values = pc.fill_null(table.column(column).cast(pa.string()), "").to_numpy(zero_copy_only=False)
    bounds = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)]
    return list(pairwise(bounds))


def _label(table: pa.Table, column: str | None, row: int) -> str | None:
    if column is None:
        return None
    value = table.column(column)[row].as_py()
    return (str(value).strip() or None) if value is not None else None
