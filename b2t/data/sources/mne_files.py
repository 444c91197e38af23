"""Recordings that MNE reads: FIF, EDF, BDF and EEGLAB SET, continuous or in epochs.

Each file is one session. A continuous recording is cut into windows, for training a tokenizer
without text; its beginning, middle and end become the splits, so that no two splits share samples.
Epochs are trials as they are, with text from a column of their metadata.
"""

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from b2t.data.remarks import Remarks
from b2t.data.sources import fif_check, mat_check
from b2t.data.sources.base import SourceOptions, TrialInfo, require_rate, resampled
from b2t.data.sources.cutting import annotated, require_sensible, windows
from b2t.errors import UserError
from b2t.log import logger

NAME = "mne"
EXTENSIONS = (".fif", ".fif.gz", ".edf", ".bdf", ".set")
EVENT_COLUMN = "event"
_HARMLESS = ("naming conventions", "head radius")
"""Parts of MNE's warnings that say nothing about the signals."""
_PLAUSIBLE = {
    "eeg": ("V", 1e-8, 1e-2),
    "seeg": ("V", 1e-8, 1e-1),
    "ecog": ("V", 1e-8, 1e-1),
    "dbs": ("V", 1e-8, 1e-1),
    "mag": ("T", 1e-16, 1e-8),
    "grad": ("T/m", 1e-15, 1e-6),
}
"""Standard deviations of channels over a trial that a recording may have; wide on purpose: EEG
lies about 1e-6 to 1e-3 V, MEG about 1e-13 to 1e-11 T."""


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
        require_sensible(options)
        self.remarks = Remarks()
        opened = [_open(file, _session(file, path), options, self.remarks) for file in files]
        self._parts = _without_continuations(opened)
        self.trials: list[TrialInfo] = []
        self._places: list[tuple[_Part, int]] = []
        for part in self._parts:
            self._require_agreement(part, options)
            self.trials.extend(part.trials)
            self._places.extend((part, index) for index in range(len(part.trials)))
        _require_distinct_sessions(self._parts, path)
        self.remarks.say()
        if not self.trials:
            raise UserError(f"{path}: no trial: {self._parts[0].nothing()}")
        self.channels = self._parts[0].channels
        self.sampling_rate = options.resample or self._parts[0].sampling_rate

    def read(self, index: int) -> np.ndarray:
        """Return the signal [T, C] of one trial."""
        part, position = self._places[index]
        with _listening(part.file, self.remarks):
            return part.read(position)

    def _require_agreement(self, part: "_Part", options: SourceOptions) -> None:
        first = self._parts[0]
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
    """One opened file.

    ``continued`` names the files that it goes on in, where MNE split a long recording.
    """

    file: Path
    session: str
    continued: list[Path]
    channels: list[str]
    sampling_rate: float
    trials: list[TrialInfo]

    def read(self, index: int) -> np.ndarray:
        """Return the signal [T, C] of one trial."""
        ...

    def nothing(self) -> str:
        """Say why there may be no trial."""
        ...


class _Continuous:
    """A continuous recording cut into stretches, read from disk when asked."""

    def __init__(
        self,
        raw: Any,
        picks: list[int],
        file: Path,
        session: str,
        options: SourceOptions,
        remarks: Remarks,
    ) -> None:
        self.file = file
        self.session = session
        self.continued = [Path(name) for name in raw.filenames[1:] if name]
        self.options = options
        self.channels = [raw.ch_names[pick] for pick in picks]
        self.sampling_rate = float(raw.info["sfreq"])
        self._raw = raw
        self._picks = picks
        cut = annotated if options.annotations else windows
        self._stretches = cut(raw, file, options, remarks)
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
        self,
        epochs: Any,
        picks: list[int],
        file: Path,
        session: str,
        options: SourceOptions,
        remarks: Remarks,
    ) -> None:
        self.file = file
        self.session = session
        self.continued: list[Path] = []
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


def _open(file: Path, session: str, options: SourceOptions, remarks: Remarks) -> _Part:
    with _listening(file, remarks):
        recording, kind = _read(file, remarks)
        require_rate(float(recording.info["sfreq"]), options.resample, file)
        picks = _picks(recording, file, options)
        part = kind(recording, picks, file, session, options, remarks)
        if part.trials:
            _look_at_scale(part, recording.get_channel_types(picks), remarks)
        return part


def _read(file: Path, remarks: Remarks) -> tuple[Any, type]:
    import mne

    name = file.name.lower()
    if name.endswith((".fif", ".fif.gz")):
        fif_check.require_sound(file)
        content = mne.what(file)
        if content == "epochs":
            return _good_epochs(mne.read_epochs(file, preload=False), file, remarks), _Epochs
        if content == "unknown":
            raise ValueError("it holds no recording that MNE knows")
        if content != "raw":
            raise UserError(f"{file} holds MNE {content}, where raw data or epochs are expected")
    if name.endswith(".set"):
        mat_check.require_sound(file)
    if name.endswith(".set") and _eeglab_epochs(file):
        return mne.io.read_epochs_eeglab(file), _Epochs
    return mne.io.read_raw(file, preload=False), _Continuous


def _good_epochs(epochs: Any, file: Path, remarks: Remarks) -> Any:
    count = len(epochs.events)
    epochs.drop_bad()
    if len(epochs.events) < count:
        logger(__name__).info("%s: left out %d epochs marked bad", file, count - len(epochs.events))
    return epochs


def _look_at_scale(part: _Part, kinds: list[str], remarks: Remarks) -> None:
    """Remark on channels that vary by more or less than tissue does, judged by the first trial."""
    deviations = part.read(0).std(axis=0)
    for kind, (unit, low, high) in _PLAUSIBLE.items():
        chosen = deviations[[name == kind for name in kinds]]
        typical = float(np.median(chosen)) if chosen.size else 0.0
        if typical and not low <= typical <= high:
            remarks.add(
                f"{kind} varies by {low:.0e} to {high:.0e} {unit} at the most: is the file's unit "
                "right (microvolts taken for volts)? Z-scores by block do not depend on it, "
                "--normalize none does",
                f"{part.file} ({typical:.0e} {unit})",
                "file",
            )


def _without_continuations(parts: list[_Part]) -> list[_Part]:
    """Leave out files that MNE reads with the one before, or their trials would come twice."""
    continued = {file.resolve() for part in parts for file in part.continued}
    return [part for part in parts if part.file.resolve() not in continued]


def _require_distinct_sessions(parts: list[_Part], path: Path) -> None:
    files: dict[str, Path] = {}
    for part in parts:
        if part.session in files:
            raise UserError(
                f"{files[part.session]} and {part.file} would both be session {part.session!r}: "
                "if they are one recording, remove one of them; otherwise rename one"
            )
        files[part.session] = part.file


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
    twice = [name for name in options.channels if options.channels.count(name) > 1]
    if twice:
        raise UserError(f"--channels names {twice[0]} more than once: name each channel once")
    missing = [name for name in options.channels if name not in names]
    if missing:
        raise UserError(f"{file} has no channel {', '.join(missing)}: it has {_shown(names)}")
    return [names.index(name) for name in options.channels]


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


def _require_mne() -> None:
    try:
        import mne  # noqa: F401
    except ImportError:
        raise UserError('reading FIF, EDF, BDF and SET needs MNE: pip install "b2t[eeg]"') from None


@contextmanager
def _listening(file: Path, remarks: Remarks) -> Iterator[None]:
    """Keep MNE off the terminal: its warnings become remarks, its exceptions messages."""
    import mne

    said: list[str] = []

    def overhear(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            said.append(record.getMessage())
        return False

    level = mne.set_log_level("WARNING", return_old_level=True)
    mne.utils.logger.addFilter(overhear)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    except UserError:
        raise
    except Exception as error:  # MNE's readers raise whatever damage leads them to
        reason = next(iter(str(error).splitlines()), "no detail")[:200]
        raise UserError(
            f"{file} cannot be read as {file.suffix.lstrip('.').upper()} "
            f"({type(error).__name__}: {reason}): it may be damaged or incomplete; check that "
            "mne.io.read_raw opens it"
        ) from None
    finally:
        mne.utils.logger.removeFilter(overhear)
        mne.set_log_level(level)
    kinds = (RuntimeWarning, UserWarning)
    said += [str(warning.message) for warning in caught if issubclass(warning.category, kinds)]
    for text in said:
        if not any(harmless in text for harmless in _HARMLESS):
            text = " ".join(text.replace(str(file), file.name).split())
            remarks.add(f"MNE warns: {text[:300]}", str(file), "file")
