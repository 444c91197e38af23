"""Recordings that MNE reads: FIF, EDF, BDF and EEGLAB SET, continuous or in epochs.

Each file is one session. A continuous recording is cut into windows, for training a tokenizer
without text; its beginning, middle and end become the splits, so that no two splits share samples.
Epochs are trials as they are, with text from a column of their metadata.
"""

import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from b2t.counted import counted
from b2t.data.remarks import Remarks
from b2t.data.sources import ctf_check, fif_check, mat_check
from b2t.data.sources.base import SourceOptions, TrialInfo, require_rate
from b2t.data.sources.cutting import annotated, require_sensible, windows
from b2t.data.sources.parts import Part, PartsSource, choose_channels
from b2t.data.sources.recording import Annotation, CutRecording, Recording, WholeTrials
from b2t.errors import UserError
from b2t.log import logger

NAME = "mne"
READS = "recordings that MNE reads (FIF, EDF, BDF, GDF, EEGLAB SET, BrainVision, CTF, KIT, CNT, …)"
OPTIONS = frozenset({"window", "overlap", "annotations", "text_column", "channels"})
EXTENSIONS = (
    ".fif", ".fif.gz", ".edf", ".bdf", ".gdf", ".set", ".vhdr", ".cnt", ".con", ".sqd", ".lay",
    ".egi", ".nxe", ".cdt",
)  # fmt: skip
NAMED = (".raw",)
"""Endings that mean EGI's simple binary to whoever names such a file; in a folder they may not."""
FOLDERS = (".ds", ".mff")
"""Recordings that are folders: CTF and EGI."""
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
    if path.name.lower().endswith(FOLDERS) or path.is_file():
        return [path] if path.name.lower().endswith((*EXTENSIONS, *FOLDERS, *NAMED)) else []
    found = []
    for folder, below, names in os.walk(path):
        below[:] = sorted(below)
        inner = [name for name in below if name.lower().endswith(FOLDERS)]
        files = [name for name in names if name.lower().endswith(EXTENSIONS)]
        found += [Path(folder) / name for name in (*inner, *files)]
        below[:] = [name for name in below if name not in inner]
    return sorted(found)


def open_source(path: Path, files: list[Path], options: SourceOptions) -> "MNESource":
    """Open all recordings."""
    named = [(file, _session(file, path)) for file in files]
    return MNESource(NAME, path, named, options, _read)


Read = Callable[[Path, Remarks], tuple[Any, Callable[..., Part]]]
"""Opens a file: MNE's object, and what makes a part of it."""


class MNESource(PartsSource):
    """Trials of one or several recordings with the same channels, in SI units (V, T).

    Args:
        format: name of the format.
        path: what the user named.
        files: recordings, each with the name of its session.
        options: how to cut them.
        read: opens one.
    """

    def __init__(
        self,
        format: str,
        path: Path,
        files: list[tuple[Path, str]],
        options: SourceOptions,
        read: Read,
    ) -> None:
        _require_mne()
        require_sensible(options)
        remarks = Remarks()
        parts = [_open(file, session, options, remarks, read) for file, session in files]
        super().__init__(format, path, parts, options, remarks, unit="SI (V, T)")

    def read(self, index: int) -> np.ndarray:
        """Return the signal [T, C] of one trial."""
        with _listening(self.file_of(index), self.remarks):
            return super().read(index)

    def read_around(self, index: int, context_s: float) -> tuple[np.ndarray, int, int]:
        """Return a trial with what lies around it; see `CutRecording.read_around`."""
        with _listening(self.file_of(index), self.remarks):
            return super().read_around(index, context_s)


def continuous(
    raw: Any, picks: list[int], file: Path, session: str, options: SourceOptions, remarks: Remarks
) -> Part:
    """Cut a raw object of MNE."""
    recording = Recording(
        file=file,
        session=session,
        subject=_subject(raw.info, file, session),
        channels=[raw.ch_names[pick] for pick in picks],
        sampling_rate=float(raw.info["sfreq"]),
        samples=raw.n_times,
        read=lambda start, stop: raw.get_data(picks, start, stop).T,
        annotations=list(_annotations(raw)),
        continued=[Path(name) for name in raw.filenames[1:] if name],
    )
    return CutRecording(recording, annotated if options.annotations else windows, options, remarks)


def _annotations(raw: Any) -> Iterator[Annotation]:
    rate = float(raw.info["sfreq"])
    annotations = raw.annotations
    # Onsets count from the measurement's date where there is one, samples from the first sample.
    offset = raw.first_time if annotations.orig_time is not None else 0.0
    for onset, duration, description in zip(
        annotations.onset, annotations.duration, annotations.description, strict=True
    ):
        if not (math.isfinite(onset) and math.isfinite(duration)):
            raise UserError(
                f"{raw.filenames[0]}: annotation {description!r} begins at {onset} s and lasts "
                f"{duration} s, where numbers are expected: remove or repair it"
            )
        start = max(0, round((float(onset) - offset) * rate))
        length = max(1, round(float(duration) * rate)) if duration else 0
        yield Annotation(start, length, str(description))


def _epochs(
    epochs: Any,
    picks: list[int],
    file: Path,
    session: str,
    options: SourceOptions,
    remarks: Remarks,
) -> Part:
    subject = _subject(epochs.info, file, session)
    trials = [
        TrialInfo(
            name=f"{file}, epoch {index}",
            session=session,
            subject=subject,
            block=0,
            trial=index,
            text=text,
        )
        for index, text in enumerate(_texts(epochs, file, options))
    ]
    return WholeTrials(
        file=file,
        session=session,
        channels=[epochs.ch_names[pick] for pick in picks],
        sampling_rate=float(epochs.info["sfreq"]),
        trials=trials,
        load=lambda index: epochs.get_data(picks, item=[index], copy=True)[0].T,
        resample=options.resample,
        lack=f"{file} holds no epoch that is not marked bad",
    )


def _open(file: Path, session: str, options: SourceOptions, remarks: Remarks, read: Read) -> Part:
    with _listening(file, remarks):
        recording, kind = read(file, remarks)
        require_rate(float(recording.info["sfreq"]), options.resample, file)
        picks = _picks(recording, file, options)
        part = kind(recording, picks, file, session, options, remarks)
        if part.trials:
            _look_at_scale(part, recording.get_channel_types(picks), remarks)
        return part


def _read(file: Path, remarks: Remarks) -> tuple[Any, Callable[..., Part]]:
    import mne

    name = file.name.lower()
    if name.endswith(".ds"):
        ctf_check.require_sound(file)
    if name.endswith((".fif", ".fif.gz")):
        fif_check.require_sound(file)
        content = mne.what(file)
        if content == "epochs":
            return _good_epochs(mne.read_epochs(file, preload=False), file), _epochs
        if content == "unknown":
            raise ValueError("it holds no recording that MNE knows")
        if content != "raw":
            raise UserError(f"{file} holds MNE {content}, where raw data or epochs are expected")
    if name.endswith((".egi", ".raw")):  # which mne.io.read_raw does not know
        return mne.io.read_raw_egi(file, preload=False), continuous
    if name.endswith(".set"):
        mat_check.require_sound(file)
    if name.endswith(".set") and _eeglab_epochs(file):
        return mne.io.read_epochs_eeglab(file), _epochs
    return mne.io.read_raw(file, preload=False), continuous


def _good_epochs(epochs: Any, file: Path) -> Any:
    count = len(epochs.events)
    epochs.drop_bad()
    if len(epochs.events) < count:
        logger(__name__).info(
            "%s: left out %s marked bad", file, counted(count - len(epochs.events), "epoch")
        )
    return epochs


def _look_at_scale(part: Part, kinds: list[str], remarks: Remarks) -> None:
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
    return choose_channels(names, options.channels, file)


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
    name = re.sub(r"(?:[_-](?:raw|epo|eeg|meg))?\.(?:fif\.gz|[a-z]{2,4})$", "", name, flags=re.I)
    return name.replace("/", "_").replace("\\", "_")


def _require_mne() -> None:
    try:
        import mne  # noqa: F401
    except ImportError:
        raise UserError('reading FIF, EDF, BDF or SET needs MNE: pip install "b2t[eeg]"') from None


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
        # What is printed is not for users: mffpy tells of every file that it does without.
        with warnings.catch_warnings(record=True) as caught, redirect_stdout(StringIO()):
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
