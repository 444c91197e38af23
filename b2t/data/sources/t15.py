"""Brain-to-Text '25 (participant T15): HDF5, one file per session and split.

The layout is that of the public release: ``hdf5_data_final/t15.YYYY.MM.DD/data_train.hdf5`` holds
groups ``trial_0000`` … with ``input_features`` [T, 512], ``seq_class_ids`` and ``transcription``.
"""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
from tqdm import tqdm

from b2t.data.phonemes import PHONEMES
from b2t.data.remarks import Remarks
from b2t.data.sources.base import (
    SPLITS,
    SourceOptions,
    TrialInfo,
    require_plausible_size,
    require_rate,
    resampled,
)
from b2t.data.sources.hdf5_check import require_sound_heaps
from b2t.data.sources.reading import reading
from b2t.errors import UserError

NAME = "t15"
READS = "Brain-to-Text '25 HDF5 (…/t15.YYYY.MM.DD/data_train.hdf5)"
OPTIONS: frozenset[str] = frozenset()
SAMPLING_RATE = 50.0
_AREAS = ("ventral6v", "area4", "55b", "dorsal6v")
_FEATURES = ("crossings", "power")
_SUFFIXES = (".hdf5", ".h5")
_PADDING_LOOK = 64
"""Bins after n_time_steps that are looked at."""
_MOST_LABELS = 100_000


def find(path: Path) -> list[Path]:
    """Return the release's files below ``path``, or the one file that ``path`` is."""
    if path.is_file():
        return [path] if h5py.is_hdf5(path) and path.suffix in _SUFFIXES else []
    files = [file for split in SPLITS for file in path.glob(f"**/data_{split}.hdf5")]
    return sorted(files, key=lambda file: (file.parent.name, SPLITS.index(_split(file))))


def open_source(path: Path, files: list[Path], options: SourceOptions) -> "T15Source":
    """Open the release."""
    return T15Source(path, files, options)


class T15Source:
    """Trials of the release. Only names and labels are held; signals are read one at a time."""

    format = NAME
    standardized = True
    unit: str | None = None
    own_splits = True

    def __init__(self, path: Path, files: list[Path], options: SourceOptions) -> None:
        require_rate(SAMPLING_RATE, options.resample, path)
        self.sampling_rate = options.resample or SAMPLING_RATE
        self.simulated = False
        self.trials: list[TrialInfo] = []
        self.remarks = Remarks()
        self._places: list[tuple[Path, str]] = []
        self._open: tuple[Path, h5py.File] | None = None
        widths: dict[int, str] = {}
        self._name_unread(path, files)
        for file in tqdm(files, desc="reading labels", unit="file", disable=None):
            with reading(f"{file}"):
                require_sound_heaps(file)
                self._list(file, widths)
        self.remarks.say()
        if not self.trials:
            raise UserError(
                f"{path}: no trial in {len(files)} HDF5 files: expected groups trial_0000 …"
            )
        self.channels = channel_names(next(iter(widths)))

    def read(self, index: int) -> np.ndarray:
        """Return the signal [T, C] of one trial."""
        file, key = self._places[index]
        name = f"{file}, {key}"
        with reading(name):
            group = self._file(file)[key]
            features = group["input_features"]
            bins = _bins(group, len(features), name)
            require_plausible_size(bins, features.shape[1], name)
            if not bins:
                return np.zeros((0, features.shape[1]), np.float32)
            if bins < len(features):
                self._look_at_padding(features, bins, name)
            return resampled(
                lambda start, stop: _float32(features[start:stop]),
                0,
                bins,
                (0, bins),
                (SAMPLING_RATE, self.sampling_rate),
            )

    def _look_at_padding(self, features: h5py.Dataset, bins: int, name: str) -> None:
        rest = features[bins : bins + _PADDING_LOOK]
        if rest.any():
            self.remarks.add(
                "bins after n_time_steps hold values; they were left out as padding. If they "
                "belong to the trial, n_time_steps is too small",
                name,
            )

    def _name_unread(self, path: Path, files: list[Path]) -> None:
        """Say which HDF5 files below ``path`` are no part of a release by their names."""
        if path.is_file():
            return
        for other in sorted(set(path.rglob("*")) - set(files)):
            if other.suffix.lower() in _SUFFIXES and other.is_file():
                self.remarks.add(
                    "not read; a release's files are named data_train.hdf5, data_val.hdf5 and "
                    "data_test.hdf5",
                    str(other),
                    "HDF5 file",
                )

    def _list(self, path: Path, widths: dict[int, str]) -> None:
        file = self._file(path)
        self.simulated |= bool(file.attrs.get("simulated", False))
        keys = sorted(name for name in file if name.startswith("trial_"))
        for key in sorted(set(file) - set(keys)):
            self.remarks.add("not read; trials are named trial_0000 …", f"{path}, {key}", "group")
        if not keys:
            self.remarks.add("holds no trial_0000 …: is the download complete?", str(path), "file")
        for key in keys:
            with reading(f"{path}, {key}"):
                group = file[key]
                trial = _trial(path, key, group)
                self.simulated |= bool(group.attrs.get("simulated", False))
                channels = int(group["input_features"].shape[1])
            self.trials.append(trial)
            self._places.append((path, key))
            widths.setdefault(channels, trial.name)
            if len(widths) > 1:
                (one, at_one), (other, at_other) = widths.items()
                raise UserError(
                    f"{at_one} has {one} channels and {at_other} has {other}: one dataset needs "
                    "the same channels throughout; prepare them apart"
                )

    def _file(self, path: Path) -> h5py.File:
        if self._open is None or self._open[0] != path:
            if self._open is not None:
                self._open[1].close()
            try:
                self._open = (path, h5py.File(path, "r"))
            except (OSError, RuntimeError) as error:
                self._open = None
                raise UserError(
                    f"{path} cannot be read as HDF5 ({error}): the download may be incomplete; "
                    "fetch it again"
                ) from None
        return self._open[1]


def channel_names(channels: int) -> list[str]:
    """Name channels by feature, area and electrode where their number is the release's 512."""
    if channels != 512:
        return [f"channel{index}" for index in range(channels)]
    return [
        f"{feature}-{area}-{electrode}"
        for feature in _FEATURES
        for area in _AREAS
        for electrode in range(64)
    ]


def _split(file: Path) -> str:
    return file.stem.removeprefix("data_")


def _trial(path: Path, key: str, group: Any) -> TrialInfo:
    name = f"{path}, {key}"
    features: Any = group.get("input_features") if isinstance(group, h5py.Group) else None
    if not _is_table(features):
        found = sorted(group) if isinstance(group, h5py.Group) else "no group"
        raise UserError(
            f"{name}: expected a dataset input_features [bins, channels], found {found}: is this "
            "a Brain-to-Text '25 file?"
        )
    if features.dtype.kind not in "fiu":
        raise UserError(
            f"{name}: input_features holds {features.dtype}, where real numbers are expected: "
            "store the signal as float32"
        )
    _bins(group, len(features), name)
    session = _text(group.attrs.get("session", path.parent.name), f"{name}, session")
    split = _split(path)
    number = key.removeprefix("trial_")
    return TrialInfo(
        name=name,
        session=session,
        subject=session.split(".")[0],
        block=_whole(group.attrs.get("block_num", 0), f"{name}: block_num"),
        trial=_whole(group.attrs.get("trial_num", number), f"{name}: trial_num"),
        text=_transcription(group, name),
        phonemes=_phonemes(group, name),
        split=split if split in SPLITS else None,
    )


def _is_table(value: Any) -> bool:
    return isinstance(value, h5py.Dataset) and value.ndim == 2 and value.shape[1] > 0


def _bins(group: h5py.Group, held: int, name: str) -> int:
    bins = _whole(group.attrs.get("n_time_steps", held), f"{name}: n_time_steps")
    if not 0 <= bins <= held:
        raise UserError(
            f"{name}: n_time_steps is {bins}, but input_features holds {held} bins: the file is "
            "damaged or cut short; copy it again"
        )
    return bins


def _float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # what becomes infinite is refused with its place
        return values.astype(np.float32, copy=False)


def _whole(value: Any, name: str) -> int:
    """Read a whole number from an attribute, which may be a float or an array of one."""
    try:
        number = float(np.asarray(value).item())
        if number == int(number) and abs(number) < 2**53:
            return int(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise UserError(f"{name} is {str(value)[:60]!r}, where a whole number is expected")


def _transcription(group: h5py.Group, name: str) -> str | None:
    """Return the sentence; None in the release's test split, which has no labels."""
    if "transcription" in group:
        codes = _labels(group, "transcription", name)
        codes = codes[: _first_zero(codes)]
        strange = codes[(codes < 0) | (codes > 0x10FFFF) | ((codes >= 0xD800) & (codes < 0xE000))]
        if strange.size:
            raise UserError(
                f"{name}: transcription holds {strange[0]}, where codes of characters are expected"
            )
        text = "".join(map(chr, codes)).strip()
    else:
        text = _text(group.attrs.get("sentence_label", ""), f"{name}, sentence_label").strip()
    return text or None


def _phonemes(group: h5py.Group, name: str) -> tuple[int, ...] | None:
    if "seq_class_ids" not in group:
        return None
    ids = _labels(group, "seq_class_ids", name)
    length = _whole(group.attrs.get("seq_len", _first_zero(ids)), f"{name}: seq_len")
    if not 0 <= length <= len(ids):
        raise UserError(
            f"{name}: seq_len is {length}, but seq_class_ids holds {len(ids)} labels: the file is "
            "damaged or cut short; copy it again"
        )
    ids = ids[:length]
    if ids.size and (ids.min() < 1 or ids.max() >= len(PHONEMES)):
        raise UserError(
            f"{name}: seq_class_ids holds {ids.min()} to {ids.max()} within seq_len {ids.size}; "
            f"expected classes 1 to {len(PHONEMES) - 1}"
        )
    return tuple(ids.tolist()) or None


def _labels(group: h5py.Group, key: str, name: str) -> np.ndarray:
    """Return whole numbers [L] of a dataset of labels."""
    labels = group[key]
    fits = isinstance(labels, h5py.Dataset) and labels.ndim == 1 and labels.size <= _MOST_LABELS
    if not fits or labels.dtype.kind not in "iu":
        shape = getattr(labels, "shape", "no")
        raise UserError(
            f"{name}: {key} holds {getattr(labels, 'dtype', 'a group')} of shape {shape}, where "
            f"up to {_MOST_LABELS} whole numbers are expected"
        )
    return np.asarray(labels).astype(np.int64)


def _first_zero(values: np.ndarray) -> int:
    zeros = np.flatnonzero(values == 0)
    return int(zeros[0]) if zeros.size else len(values)


def _text(value: Any, name: str) -> str:
    value = value.decode() if isinstance(value, bytes) else value
    if not isinstance(value, str):
        raise UserError(f"{name} is {str(value)[:60]!r}, where text is expected")
    return value
