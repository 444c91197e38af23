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
from b2t.data.sources.base import SPLITS, SourceOptions, TrialInfo, resampled
from b2t.errors import UserError

NAME = "t15"
SAMPLING_RATE = 50.0
_AREAS = ("ventral6v", "area4", "55b", "dorsal6v")
_FEATURES = ("crossings", "power")


def find(path: Path) -> list[Path]:
    """Return the release's files below ``path``, or the one file that ``path`` is."""
    if path.is_file():
        return [path] if h5py.is_hdf5(path) and path.suffix in (".hdf5", ".h5") else []
    files = [file for split in SPLITS for file in path.glob(f"**/data_{split}.hdf5")]
    return sorted(files, key=lambda file: (file.parent.name, SPLITS.index(_split(file))))


def open_source(path: Path, files: list[Path], options: SourceOptions) -> "T15Source":
    """Open the release."""
    return T15Source(path, files, options)


class T15Source:
    """Trials of the release. Only names and labels are held; signals are read one at a time."""

    format = NAME
    standardized = True
    own_splits = True

    def __init__(self, path: Path, files: list[Path], options: SourceOptions) -> None:
        if options.channels or options.text_column or options.annotations:
            raise UserError(
                f"{path} is a T15 release: --channels, --text-column and --annotations are for "
                "recordings that MNE reads"
            )
        self.sampling_rate = options.resample or SAMPLING_RATE
        self.simulated = False
        self.trials: list[TrialInfo] = []
        self._places: list[tuple[Path, str]] = []
        self._open: tuple[Path, h5py.File] | None = None
        widths: dict[int, str] = {}
        for file in tqdm(files, desc="reading labels", unit="file", disable=None):
            self._list(file, widths)
        if not self.trials:
            raise UserError(
                f"{path}: no trial in {len(files)} HDF5 files: expected groups trial_0000 …"
            )
        self.channels = channel_names(next(iter(widths)))

    def read(self, index: int) -> np.ndarray:
        """Return the signal [T, C] of one trial."""
        file, key = self._places[index]
        group = self._file(file)[key]
        features = group["input_features"]
        bins = int(group.attrs.get("n_time_steps", len(features)))
        if bins > len(features):
            raise UserError(
                f"{file}, {key}: n_time_steps is {bins}, but input_features holds {len(features)} "
                "bins: the file is damaged or cut short; copy it again"
            )
        if not bins:
            return np.zeros((0, features.shape[1]), np.float32)
        return resampled(
            lambda start, stop: features[start:stop].astype(np.float32),
            0,
            bins,
            (0, bins),
            (SAMPLING_RATE, self.sampling_rate),
        )

    def _list(self, path: Path, widths: dict[int, str]) -> None:
        file = self._file(path)
        self.simulated |= bool(file.attrs.get("simulated", False))
        for key in sorted(name for name in file if name.startswith("trial_")):
            group = file[key]
            self.simulated |= bool(group.attrs.get("simulated", False))
            self.trials.append(_trial(path, key, group))
            self._places.append((path, key))
            widths.setdefault(int(group["input_features"].shape[1]), f"{path}, {key}")
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
            except OSError as error:
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


def _trial(path: Path, key: str, group: h5py.Group) -> TrialInfo:
    if "input_features" not in group or group["input_features"].ndim != 2:
        raise UserError(
            f"{path}, {key}: expected a dataset input_features [bins, channels], found "
            f"{sorted(group)}: is this a Brain-to-Text '25 file?"
        )
    session = _text(group.attrs.get("session", path.parent.name))
    split = _split(path)
    return TrialInfo(
        name=f"{path}, {key}",
        session=session,
        subject=session.split(".")[0],
        block=int(group.attrs.get("block_num", 0)),
        trial=int(group.attrs.get("trial_num", key.removeprefix("trial_"))),
        text=_transcription(group),
        phonemes=_phonemes(path, key, group),
        split=split if split in SPLITS else None,
    )


def _transcription(group: h5py.Group) -> str | None:
    """Return the sentence; None in the release's test split, which has no labels."""
    if "transcription" in group:
        codes = np.asarray(group["transcription"]).astype(np.int64)
        text = "".join(map(chr, codes[: _first_zero(codes)])).strip()
    else:
        text = _text(group.attrs.get("sentence_label", "")).strip()
    return text or None


def _phonemes(path: Path, key: str, group: h5py.Group) -> tuple[int, ...] | None:
    if "seq_class_ids" not in group:
        return None
    ids = np.asarray(group["seq_class_ids"]).astype(np.int64)
    ids = ids[: int(group.attrs.get("seq_len", _first_zero(ids)))]
    if ids.size and (ids.min() < 1 or ids.max() >= len(PHONEMES)):
        raise UserError(
            f"{path}, {key}: seq_class_ids holds {ids.min()} to {ids.max()} within seq_len "
            f"{ids.size}; expected classes 1 to {len(PHONEMES) - 1}"
        )
    return tuple(ids.tolist()) or None


def _first_zero(values: np.ndarray) -> int:
    zeros = np.flatnonzero(values == 0)
    return int(zeros[0]) if zeros.size else len(values)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
