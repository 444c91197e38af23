"""Brain-to-Text '25 (participant T15): HDF5, one file per session and split.

The layout is that of the public release: ``hdf5_data_final/t15.YYYY.MM.DD/data_train.hdf5`` holds
groups ``trial_0000`` … with ``input_features`` [T, 512], ``seq_class_ids`` and ``transcription``.
"""

from pathlib import Path
from typing import Any, NamedTuple

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
from b2t.data.sources.hdf5_values import (
    NUMBERS,
    PlainFile,
    attribute,
    is_of,
    member,
    place_of_float32,
)
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


class _Place(NamedTuple):
    """Where a signal [bins, channels] lies; ``start`` is its first byte, where that is enough."""

    file: Path
    key: str
    bins: int
    held: int
    channels: int
    start: int | None


class T15Source:
    """Trials of the release. Only names and labels are held; signals are read one at a time."""

    format = NAME
    portable = True
    standardized = True
    unit: str | None = None
    own_splits = True

    def __init__(self, path: Path, files: list[Path], options: SourceOptions) -> None:
        require_rate(SAMPLING_RATE, options.resample, path)
        self.sampling_rate = options.resample or SAMPLING_RATE
        self.simulated = False
        self.trials: list[TrialInfo] = []
        self.remarks = Remarks()
        self._places: list[_Place] = []
        self._open: tuple[Path, h5py.File] | None = None
        self._plain: PlainFile | None = None
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

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files behind: another process opens its own."""
        return {**self.__dict__, "_open": None, "_plain": None}

    def read(self, index: int) -> np.ndarray:
        """Return the signal [T, C] of one trial."""
        place = self._places[index]
        name = f"{place.file}, {place.key}"
        with reading(name):
            require_plausible_size(place.bins, place.channels, name)
            if not place.bins:
                return np.zeros((0, place.channels), np.float32)
            if place.bins < place.held:
                self._look_at_padding(place, name)
            return resampled(
                lambda start, stop: self._values(place, start, stop),
                0,
                place.bins,
                (0, place.bins),
                (SAMPLING_RATE, self.sampling_rate),
            )

    def _values(self, place: _Place, start: int, stop: int) -> np.ndarray:
        """Return the bins [start, stop) of a trial, float32 [T, C]."""
        if place.start is None:
            return _float32(self._file(place.file)[place.key]["input_features"][start:stop])
        if self._plain is None or self._plain.path != place.file:
            if self._plain is not None:
                self._plain.close()
            self._plain = PlainFile(place.file)
        first = place.start + 4 * start * place.channels
        return self._plain.read(first, stop - start, place.channels)

    def _look_at_padding(self, place: _Place, name: str) -> None:
        rest = self._values(place, place.bins, min(place.held, place.bins + _PADDING_LOOK))
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
                trial, place = _trial(path, key, group)
                self.simulated |= bool(attribute(group, "simulated", False))
            self.trials.append(trial)
            self._places.append(place)
            channels = place.channels
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


def _trial(path: Path, key: str, group: Any) -> tuple[TrialInfo, _Place]:
    name = f"{path}, {key}"
    features: Any = member(group, "input_features") if isinstance(group, h5py.Group) else None
    held, channels = features.shape if _is_table(features) else (0, 0)
    if features is None or not channels:
        found = sorted(group) if isinstance(group, h5py.Group) else "no group"
        raise UserError(
            f"{name}: expected a dataset input_features [bins, channels], found {found}: is this "
            "a Brain-to-Text '25 file?"
        )
    if not is_of(features, NUMBERS):
        raise UserError(
            f"{name}: input_features holds {features.dtype}, where real numbers are expected: "
            "store the signal as float32"
        )
    session = _text(attribute(group, "session", path.parent.name), f"{name}, session")
    split = _split(path)
    number = key.removeprefix("trial_")
    start = place_of_float32(features, (held, channels))
    place = _Place(path, key, _bins(group, held, name), held, channels, start)
    return TrialInfo(
        name=name,
        session=session,
        subject=session.split(".")[0],
        block=_whole(attribute(group, "block_num", 0), f"{name}: block_num"),
        trial=_whole(attribute(group, "trial_num", number), f"{name}: trial_num"),
        text=_transcription(group, name),
        phonemes=_phonemes(group, name),
        split=split if split in SPLITS else None,
    ), place


def _is_table(found: Any) -> bool:
    return isinstance(found, h5py.h5d.DatasetID) and len(found.shape) == 2


def _bins(group: h5py.Group, held: int, name: str) -> int:
    bins = _whole(attribute(group, "n_time_steps", held), f"{name}: n_time_steps")
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
    found = member(group, "transcription")
    if found is not None:
        codes = _labels(found, "transcription", name)
        codes = codes[: _first_zero(codes)]
        strange = codes[(codes < 0) | (codes > 0x10FFFF) | ((codes >= 0xD800) & (codes < 0xE000))]
        if strange.size:
            raise UserError(
                f"{name}: transcription holds {strange[0]}, where codes of characters are expected"
            )
        text = "".join(map(chr, codes)).strip()
    else:
        text = _text(attribute(group, "sentence_label", ""), f"{name}, sentence_label").strip()
    return text or None


def _phonemes(group: h5py.Group, name: str) -> tuple[int, ...] | None:
    found = member(group, "seq_class_ids")
    if found is None:
        return None
    ids = _labels(found, "seq_class_ids", name)
    length = _whole(attribute(group, "seq_len", _first_zero(ids)), f"{name}: seq_len")
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


def _labels(found: Any, key: str, name: str) -> np.ndarray:
    """Return whole numbers [L] of a dataset of labels."""
    shape: Any = found.shape if isinstance(found, h5py.h5d.DatasetID) else "no"
    if len(shape) != 1 or shape[0] > _MOST_LABELS or not is_of(found, (h5py.h5t.INTEGER,)):
        raise UserError(
            f"{name}: {key} holds {getattr(found, 'dtype', 'a group')} of shape {shape}, where "
            f"up to {_MOST_LABELS} whole numbers are expected"
        )
    labels = np.empty(shape, np.int64)
    if labels.size:
        found.read(h5py.h5s.ALL, h5py.h5s.ALL, labels)
    return labels


def _first_zero(values: np.ndarray) -> int:
    zeros = np.flatnonzero(values == 0)
    return int(zeros[0]) if zeros.size else len(values)


def _text(value: Any, name: str) -> str:
    value = value.decode() if isinstance(value, bytes) else value
    if not isinstance(value, str):
        raise UserError(f"{name} is {str(value)[:60]!r}, where text is expected")
    return value
