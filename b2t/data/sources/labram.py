"""HDF5 of recordings as LaBraM's pre-training reads it.

One group per recording holds ``eeg`` [channels, samples], whose attributes ``rsFreq`` and
``chOrder`` are the sampling rate in Hz and the names of the channels.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from b2t.data.remarks import Remarks
from b2t.data.sources.base import SourceOptions, require_rate
from b2t.data.sources.cutting import require_sensible, windows
from b2t.data.sources.hdf5_check import require_sound_heaps
from b2t.data.sources.parts import Part, PartsSource, choose_channels
from b2t.data.sources.reading import reading
from b2t.data.sources.recording import CutRecording, Recording
from b2t.data.sources.sessions import session_name, subject_name
from b2t.errors import UserError

NAME = "labram"
READS = "LaBraM-style HDF5 (a group per recording with eeg [channels, samples], rsFreq, chOrder)"
OPTIONS = frozenset({"window", "overlap", "channels"})
_SUFFIXES = (".hdf5", ".h5")


def find(path: Path) -> list[Path]:
    """Return the HDF5 files at ``path`` that hold such groups."""
    candidates = [path] if path.is_file() else sorted(path.rglob("*"))
    return [
        file
        for file in candidates
        if file.is_file() and file.suffix.lower() in _SUFFIXES and _groups(file)
    ]


def open_source(path: Path, files: list[Path], options: SourceOptions) -> PartsSource:
    """Open all files."""
    require_sensible(options)
    remarks = Remarks()
    opened = lru_cache(maxsize=8)(lambda file: h5py.File(file, "r"))
    parts = []
    for file in files:
        with reading(f"{file}"):
            require_sound_heaps(file)
        parts += [_open(file, key, path, opened, options, remarks) for key in _groups(file)]
    return PartsSource(NAME, path, parts, options, remarks, unit=None)


def _groups(file: Path) -> list[str]:
    """Return the names of the recordings in a file, none in a file of another kind."""
    try:
        with h5py.File(file, "r") as content:
            return sorted(
                key
                for key, group in content.items()
                if isinstance(group, h5py.Group) and isinstance(group.get("eeg"), h5py.Dataset)
            )
    except Exception:  # whatever h5py meets: the formats that ask later say what is wrong
        return []


def _open(
    file: Path, key: str, root: Path, opened: Any, options: SourceOptions, remarks: Remarks
) -> Part:
    name = f"{file}, {key}"
    with reading(name):
        dataset = opened(file)[key]["eeg"]
        if dataset.ndim != 2 or dataset.dtype.kind not in "fiu":
            raise UserError(
                f"{name}: eeg holds {dataset.dtype} of shape {list(dataset.shape)}, where numbers "
                "[channels, samples] are expected"
            )
        rate = _rate(dataset, name)
        require_rate(rate, options.resample, name)
        names = _channels(dataset, name)
    picks = choose_channels(names, options.channels, name)

    def read(start: int, stop: int) -> np.ndarray:
        with reading(name):
            return opened(file)[key]["eeg"][:, start:stop][picks].T.astype(np.float32)

    session = session_name(file, root, key)
    recording = Recording(
        file=file,
        session=session,
        subject=subject_name(Path(key), key),
        channels=[names[pick] for pick in picks],
        sampling_rate=rate,
        samples=dataset.shape[1],
        read=read,
        place=key,
    )
    return CutRecording(recording, windows, options, remarks)


def _rate(dataset: h5py.Dataset, name: str) -> float:
    value = dataset.attrs.get("rsFreq")
    try:
        return float(np.asarray(value).item())
    except (TypeError, ValueError):
        raise UserError(
            f"{name}: the attribute rsFreq is {value!r:.60}, where a sampling rate in Hz is "
            "expected"
        ) from None


def _channels(dataset: h5py.Dataset, name: str) -> list[str]:
    names = dataset.attrs.get("chOrder")
    found = [
        item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item)
        for item in (() if names is None else np.atleast_1d(names).tolist())
    ]
    if len(found) != dataset.shape[0] or len(set(found)) != len(found):
        raise UserError(
            f"{name}: the attribute chOrder names {len(found)} channels ({len(set(found))} "
            f"different), eeg has {dataset.shape[0]}: expected a name for each"
        )
    return found
