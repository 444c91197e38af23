"""Recordings that MNE reads: FIF, EDF, BDF and EEGLAB SET, continuous or in epochs.

Each file is one session. A continuous recording is cut into windows, for training a tokenizer
without text; its beginning, middle and end become the splits, so that no two splits share samples.
Epochs are trials as they are, with text from a column of their metadata.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from b2t.data.remarks import Remarks
from b2t.data.sources.base import SPLITS, SourceOptions, TrialInfo, resampled
from b2t.errors import UserError
from b2t.log import logger

NAME = "mne"
EXTENSIONS = (".fif", ".fif.gz", ".edf", ".bdf", ".set")
EVENT_COLUMN = "event"


def find(path: Path) -> list[Path]:
    """Return the recordings at ``path``: the file itself, or all below the folder."""
    candidates = [path] if path.is_file() else sorted(path.rglob("*"))
    return [
        file for file in candidates if file.is_file() and file.name.lower().endswith(EXTENSIONS)
    ]


def open_source(path: Path, files: list[Path], options: SourceOptions) -> "MNESource":
    """Open all recordings."""
    return MNESource(path, files, options)


class MNESource:
    """Trials of one or several recordings with the same channels, in SI units (V, T)."""

    format = NAME
    standardized = False
    unit: str | None = "SI (V, T)"
    own_splits = False
    simulated = False

    def __init__(self, path: Path, files: list[Path], options: SourceOptions) -> None:
        _require_mne()
        _require_sensible(options)
        self.remarks = Remarks()
        self._parts: list[_Part] = []
        self.trials: list[TrialInfo] = []
        self._places: list[tuple[_Part, int]] = []
        for file in files:
            part = _open(file, _session(file, path), options)
            self._require_agreement(part, options)
            self._parts.append(part)
            self.trials.extend(part.trials)
            self._places.extend((part, index) for index in range(len(part.trials)))
        if not self.trials:
            raise UserError(f"{path}: no trial: {self._parts[0].nothing()}")
        self.channels = self._parts[0].channels
        self.sampling_rate = options.resample or self._parts[0].sampling_rate

    def read(self, index: int) -> np.ndarray:
        """Return the signal [T, C] of one trial."""
        part, position = self._places[index]
        with _quiet_mne():
            return part.read(position)

    def _require_agreement(self, part: "_Part", options: SourceOptions) -> None:
        first = self._parts[0] if self._parts else part
        if part.channels != first.channels:
            raise UserError(
                f"{first.file} has {_shown(first.channels)} and {part.file} has "
                f"{_shown(part.channels)}: one dataset needs the same channels in the same order; "
                "name common ones with --channels A,B,…"
            )
        if part.sampling_rate != first.sampling_rate and not options.resample:
            raise UserError(
                f"{first.file} is sampled at {first.sampling_rate:g} Hz and {part.file} at "
                f"{part.sampling_rate:g} Hz: bring them to one rate with --resample HZ"
            )


class _Part(Protocol):
    """One opened file."""

    file: Path
    channels: list[str]
    sampling_rate: float
    trials: list[TrialInfo]

    def read(self, index: int) -> np.ndarray:
        """Return the signal [T, C] of one trial."""
        ...

    def nothing(self) -> str:
        """Say why there may be no trial."""
        ...


@dataclass(frozen=True)
class _Stretch:
    """Samples [start, stop) of a recording; its resampling may read within ``limits``."""

    start: int
    stop: int
    limits: tuple[int, int]
    split: str | None = None
    text: str | None = None


class _Continuous:
    """A continuous recording cut into stretches, read from disk when asked."""

    def __init__(
        self, raw: Any, picks: list[int], file: Path, session: str, options: SourceOptions
    ) -> None:
        self.file = file
        self.options = options
        self.channels = [raw.ch_names[pick] for pick in picks]
        self.sampling_rate = float(raw.info["sfreq"])
        self._raw = raw
        self._picks = picks
        self._stretches = (
            _annotated(raw, options) if options.annotations else _windows(raw, options)
        )
        self.trials = [
            TrialInfo(
                name=f"{file}, {stretch.start / self.sampling_rate:g} s",
                session=session,
                subject=_subject(raw.info, file, session),
                block=0,
                trial=index,
                text=stretch.text,
                split=stretch.split,
            )
            for index, stretch in enumerate(self._stretches)
        ]

    def read(self, index: int) -> np.ndarray:
        stretch = self._stretches[index]
        return resampled(
            lambda start, stop: self._raw.get_data(self._picks, start, stop).T,
            stretch.start,
            stretch.stop,
            stretch.limits,
            (self.sampling_rate, self.options.resample or self.sampling_rate),
        )

    def nothing(self) -> str:
        if self.options.annotations:
            return f"{self.file} has no annotations; leave out --annotations to cut windows"
        seconds = self._raw.n_times / self.sampling_rate
        return (
            f"{self.file} lasts {seconds:.1f} s, of which the splits take a part each, and a "
            f"window lasts {self.options.window:g} s; shorten --window"
        )


class _Epochs:
    """Epochs, each a trial."""

    def __init__(
        self, epochs: Any, picks: list[int], file: Path, session: str, options: SourceOptions
    ) -> None:
        self.file = file
        self.options = options
        self.channels = [epochs.ch_names[pick] for pick in picks]
        self.sampling_rate = float(epochs.info["sfreq"])
        self._epochs = epochs
        self._picks = picks
        texts = _texts(epochs, file, options)
        self.trials = [
            TrialInfo(
                name=f"{file}, epoch {index}",
                session=session,
                subject=_subject(epochs.info, file, session),
                block=0,
                trial=index,
                text=text,
            )
            for index, text in enumerate(texts)
        ]

    def read(self, index: int) -> np.ndarray:
        signal = self._epochs.get_data(self._picks, item=[index], copy=True)[0].T
        return resampled(
            lambda start, stop: signal[start:stop],
            0,
            len(signal),
            (0, len(signal)),
            (self.sampling_rate, self.options.resample or self.sampling_rate),
        )

    def nothing(self) -> str:
        return f"{self.file} holds no epoch that is not marked bad"


def _open(file: Path, session: str, options: SourceOptions) -> _Part:
    try:
        with _quiet_mne():
            recording, kind = _read(file)
            picks = _picks(recording, file, options)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AssertionError) as error:
        reason = next(iter(str(error).splitlines()), "no detail")
        raise UserError(
            f"{file} cannot be read as {file.suffix.lstrip('.').upper()} "
            f"({type(error).__name__}: {reason}): it may be damaged or incomplete; check that "
            "mne.io.read_raw opens it"
        ) from None
    return kind(recording, picks, file, session, options)


def _read(file: Path) -> tuple[Any, type]:
    import mne

    name = file.name.lower()
    if name.endswith((".fif", ".fif.gz")):
        content = mne.what(file)
        if content == "epochs":
            epochs = mne.read_epochs(file, preload=False)
            return epochs.drop_bad(), _Epochs
        if content != "raw":
            raise UserError(f"{file} holds MNE {content}, where raw data or epochs are expected")
    if name.endswith(".set") and _eeglab_epochs(file):
        return mne.io.read_epochs_eeglab(file), _Epochs
    return mne.io.read_raw(file, preload=False), _Continuous


def _eeglab_epochs(file: Path) -> bool:
    import mne

    try:
        mne.io.read_raw_eeglab(file, preload=False)
    except TypeError as error:
        return "trials" in str(error)
    return False


def _picks(recording: Any, file: Path, options: SourceOptions) -> list[int]:
    """Choose what was recorded from the subject: no triggers, clocks or channels marked bad."""
    import mne

    names = list(recording.ch_names)
    if options.channels is None:
        kinds = {"eeg": True, "meg": True, "seeg": True, "ecog": True, "dbs": True}
        picks = mne.pick_types(recording.info, **kinds, ref_meg=False, exclude="bads").tolist()
        if not picks:
            found = ", ".join(sorted(set(recording.get_channel_types())))
            raise UserError(
                f"{file} has no EEG, MEG or intracranial channel (its channels: {found}): name "
                "those to read with --channels A,B,…"
            )
        return picks
    missing = [name for name in options.channels if name not in names]
    if missing:
        raise UserError(f"{file} has no channel {', '.join(missing)}: it has {_shown(names)}")
    return [names.index(name) for name in options.channels]


def _windows(raw: Any, options: SourceOptions) -> list[_Stretch]:
    rate = float(raw.info["sfreq"])
    length = max(1, round(options.window * rate))
    step = max(1, round(length * (1 - options.overlap)))
    bounds = np.round(np.cumsum((0.0, *options.fractions)) * raw.n_times).astype(int)
    bad = _bad_stretches(raw)
    windows = [
        _Stretch(start, start + length, (int(low), int(high)), split)
        for split, low, high in zip(SPLITS, bounds[:-1], bounds[1:], strict=True)
        for start in range(int(low), int(high) - length + 1, step)
    ]
    kept = [
        window
        for window in windows
        if not any(window.start < end and begin < window.stop for begin, end in bad)
    ]
    if len(kept) < len(windows):
        logger(__name__).info(
            "%s: left out %d windows that touch a BAD annotation",
            raw.filenames[0],
            len(windows) - len(kept),
        )
    return kept


def _annotated(raw: Any, options: SourceOptions) -> list[_Stretch]:
    """Cut at annotations; one without a duration lasts a window."""
    limits = (0, raw.n_times)
    stretches = []
    for start, duration, description in _annotations(raw):
        length = round((duration or options.window) * float(raw.info["sfreq"]))
        if description.upper().startswith("BAD") or start + length > raw.n_times:
            continue
        stretches.append(
            _Stretch(start, start + max(1, length), limits, text=description.strip() or None)
        )
    return stretches


def _bad_stretches(raw: Any) -> list[tuple[int, int]]:
    rate = float(raw.info["sfreq"])
    return [
        (start, start + max(1, round(duration * rate)))
        for start, duration, description in _annotations(raw)
        if description.upper().startswith("BAD")
    ]


def _annotations(raw: Any) -> Iterator[tuple[int, float, str]]:
    annotations = raw.annotations
    # Onsets count from the measurement's date where there is one, samples from the first sample.
    offset = raw.first_time if annotations.orig_time is not None else 0.0
    for onset, duration, description in zip(
        annotations.onset, annotations.duration, annotations.description, strict=True
    ):
        start = round((float(onset) - offset) * float(raw.info["sfreq"]))
        yield max(0, start), float(duration), str(description)


def _texts(epochs: Any, file: Path, options: SourceOptions) -> list[str | None]:
    columns = (
        {} if epochs.metadata is None else {name: epochs.metadata[name] for name in epochs.metadata}
    )
    if options.text_column is None:
        if columns:
            logger(__name__).info(
                "%s: without text; --text-column takes one of %s", file.name, ", ".join(columns)
            )
        return [None] * len(epochs)
    if options.text_column == EVENT_COLUMN and EVENT_COLUMN not in columns:
        names = {code: name for name, code in epochs.event_id.items()}
        return [names[code] for code in epochs.events[:, 2]]
    if options.text_column not in columns:
        raise UserError(
            f"{file} has no metadata column {options.text_column!r}: --text-column takes "
            f"{', '.join([*columns, EVENT_COLUMN])} ({EVENT_COLUMN} = the name of the event)"
        )
    values = columns[options.text_column]
    return [
        None if missing or not str(value).strip() else str(value).strip()
        for value, missing in zip(values, values.isna(), strict=True)
    ]


def _subject(info: Any, file: Path, session: str) -> str:
    named = re.search(r"(?:^|[/_\\-])(sub(?:ject)?-?[A-Za-z0-9]+)", str(file))
    recorded = (info.get("subject_info") or {}).get("his_id")
    return str(recorded or (named.group(1) if named else session))


def _session(file: Path, root: Path) -> str:
    """Name a session by its file, below ``root``, without extension and MNE's suffix."""
    name = str(file.relative_to(root)) if root.is_dir() else file.name
    name = re.sub(
        r"(?:[_-](?:raw|epo|eeg|meg))?\.(?:fif\.gz|fif|edf|bdf|set)$", "", name, flags=re.I
    )
    return name.replace("/", "_").replace("\\", "_")


def _shown(channels: Sequence[str]) -> str:
    names = ", ".join(channels[:8]) + (" …" if len(channels) > 8 else "")
    return f"{len(channels)} channels ({names})"


def _require_sensible(options: SourceOptions) -> None:
    if options.window <= 0:
        raise UserError(f"--window {options.window:g}: a window lasts more than 0 seconds")
    if not 0 <= options.overlap < 1:
        raise UserError(
            f"--overlap {options.overlap:g}: the share of a window that the next one repeats lies "
            "in 0 ≤ overlap < 1"
        )


def _require_mne() -> None:
    try:
        import mne  # noqa: F401
    except ImportError:
        raise UserError('reading FIF, EDF, BDF and SET needs MNE: pip install "b2t[eeg]"') from None


@contextmanager
def _quiet_mne() -> Iterator[None]:
    import mne

    level = mne.set_log_level("ERROR", return_old_level=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        mne.set_log_level(level)
