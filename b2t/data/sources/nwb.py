"""Neurodata Without Borders, single files and DANDI folders, read by PyNWB.

The signal is a time series [samples, channels] (``--signal NAME``), or the spikes of the units
counted in bins (``--signal units --bin-ms 20``). A trials table cuts it, with text from
``--text-column`` and splits from a column ``split``; without one it is cut in windows.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from b2t.data.remarks import Remarks
from b2t.data.sources.base import SPLITS, SourceOptions, require_rate
from b2t.data.sources.cutting import annotated, require_sensible, windows
from b2t.data.sources.parts import Part, PartsSource, choose_channels
from b2t.data.sources.reading import reading
from b2t.data.sources.recording import Annotation, CutRecording, Recording
from b2t.data.sources.sessions import session_name, subject_name
from b2t.errors import UserError

NAME = "nwb"
READS = "NWB files and DANDI folders (.nwb; --signal NAME, or units --bin-ms 20)"
OPTIONS = frozenset(
    {"window", "overlap", "annotations", "text_column", "channels", "signal", "bin_ms"}
)
UNITS = "units"


def find(path: Path) -> list[Path]:
    """Return the NWB files at ``path``."""
    candidates = [path] if path.is_file() else sorted(path.rglob("*.nwb"))
    return [file for file in candidates if file.is_file() and file.suffix.lower() == ".nwb"]


def open_source(path: Path, files: list[Path], options: SourceOptions) -> PartsSource:
    """Open all files."""
    try:
        from pynwb import NWBHDF5IO
    except ImportError:
        raise UserError('reading NWB needs PyNWB: pip install "b2t[nwb]"') from None
    require_sensible(options)
    if not 0 < options.bin_ms < float("inf"):
        raise UserError(f"--bin-ms {options.bin_ms:g}: a bin lasts more than 0 ms")
    remarks = Remarks()
    parts = []
    for file in files:
        with reading(file, "NWB"):
            content = NWBHDF5IO(str(file), "r", load_namespaces=True).read()
            parts.append(_open(content, file, path, options, remarks))
    return PartsSource(NAME, path, parts, options, remarks, own_splits=_have_splits(parts))


def _have_splits(parts: list[Part]) -> bool:
    infos = [info for part in parts for info in part.trials]
    return bool(infos) and all(info.split is not None for info in infos)


def _open(content: Any, file: Path, root: Path, options: SourceOptions, remarks: Remarks) -> Part:
    signals = _signals(content)
    name = options.signal or _likely_signal(content, signals, file)
    if name == UNITS and content.units is not None:
        rate, start, samples, names, read = _binned(content.units, options.bin_ms)
    elif name in signals:
        rate, start, samples, names, read = _series(signals[name], f"{file}, {name}")
    else:
        raise UserError(f"{file} has no signal {name}: {_choices(content, signals)}")
    require_rate(rate, options.resample, file)
    picks = choose_channels(names, options.channels, file)
    session = session_name(file, root)
    marks = _trials(content, file, options, start, rate)
    recording = Recording(
        file=file,
        session=session,
        subject=str(getattr(content.subject, "subject_id", None) or subject_name(file, session)),
        channels=[names[pick] for pick in picks],
        sampling_rate=rate,
        samples=samples,
        read=lambda first, last: read(first, last)[:, picks],
        annotations=marks,
    )
    return CutRecording(recording, annotated if marks else windows, options, remarks)


def _signals(content: Any) -> dict[str, Any]:
    """Return the series of two dimensions by name, wherever they lie."""
    from pynwb import TimeSeries

    return {
        item.name: item
        for item in content.objects.values()
        if isinstance(item, TimeSeries) and getattr(item.data, "ndim", np.ndim(item.data)) == 2
    }


def _likely_signal(content: Any, signals: dict[str, Any], file: Path) -> str:
    if len(signals) == 1:
        return next(iter(signals))
    if not signals and content.units is not None:
        return UNITS
    raise UserError(f"{file}: which signal? {_choices(content, signals)}")


def _choices(content: Any, signals: dict[str, Any]) -> str:
    names = [*signals, *([UNITS] if content.units is not None else [])]
    if not names:
        return "it holds no time series of two dimensions and no units"
    return f"--signal takes one of {', '.join(names)}"


def _series(series: Any, place: str) -> tuple[float, float, int, list[str], Any]:
    """Return rate in Hz, start in s, samples, channel names and a reader of a time series."""
    samples, channels = series.data.shape
    if series.rate is not None:
        rate, start = float(series.rate), float(series.starting_time or 0.0)
    else:
        times = np.asarray(series.timestamps[:], dtype=np.float64)
        steps = np.diff(times)
        if len(times) < 2 or not np.median(steps) > 0:
            raise UserError(f"{place} has no rate, and timestamps that do not rise")
        rate, start = round(1 / float(np.median(steps)), 6), float(times[0])
        if steps.max() > 1.5 / rate or steps.min() < 0.5 / rate:
            raise UserError(
                f"{place}: its timestamps are not regular (steps of {steps.min():g} to "
                f"{steps.max():g} s): split it at the gaps, or write it with a rate"
            )
    scale, offset = float(series.conversion), float(getattr(series, "offset", 0.0) or 0.0)

    def read(first: int, last: int) -> np.ndarray:
        return np.asarray(series.data[first:last], dtype=np.float64) * scale + offset

    return rate, start, samples, _electrode_names(series, channels), read


def _electrode_names(series: Any, channels: int) -> list[str]:
    region = getattr(series, "electrodes", None)
    if region is not None and "channel_name" in region.table.colnames:
        names = [str(region.table["channel_name"][row]) for row in region.data[:]]
        if len(names) == channels == len(set(names)):
            return names
    return [f"channel{index}" for index in range(channels)]


def _binned(units: Any, bin_ms: float) -> tuple[float, float, int, list[str], Any]:
    """Return rate, start, bins, names of units and a reader of their spike counts per bin."""
    times = [np.sort(np.asarray(units["spike_times"][row])) for row in range(len(units.id))]
    rate = 1000.0 / bin_ms
    last = max((float(spikes[-1]) for spikes in times if spikes.size), default=0.0)
    bins = int(last * rate) + 1

    def read(first: int, stop: int) -> np.ndarray:
        edges = np.arange(first, stop + 1) / rate
        return np.stack([np.diff(np.searchsorted(spikes, edges)) for spikes in times], 1).astype(
            float
        )

    return rate, 0.0, bins, [f"unit{row}" for row in np.asarray(units.id[:])], read


def _trials(
    content: Any, file: Path, options: SourceOptions, start: float, rate: float
) -> list[Annotation]:
    """Return the trials as stretches of samples."""
    table = content.trials
    if table is None or not len(table):
        if options.text_column or options.annotations:
            raise UserError(f"{file} has no trials table, where --text-column is looked for")
        return []
    column = options.text_column
    if column is not None and column not in table.colnames:
        raise UserError(
            f"{file} has no column {column!r} of trials: --text-column takes one of "
            f"{', '.join(table.colnames)}"
        )
    split = partial(_split, table, file) if "split" in table.colnames else (lambda row: None)
    marks = []
    for row in range(len(table)):
        begin, end = float(table["start_time"][row]), float(table["stop_time"][row])
        if not (np.isfinite(begin) and end > begin):
            raise UserError(f"{file}, trial {row}: it lasts from {begin} s to {end} s")
        first = max(0, round((begin - start) * rate))
        text = "" if column is None else str(table[column][row]).strip()
        marks.append(Annotation(first, max(1, round((end - begin) * rate)), text, split(row)))
    return marks


def _split(table: Any, file: Path, row: int) -> str:
    value = str(table["split"][row])
    if value not in SPLITS:
        raise UserError(
            f"{file}, trial {row}: its split is {value!r}, expected one of {', '.join(SPLITS)}"
        )
    return value
