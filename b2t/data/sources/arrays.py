"""Bare arrays of numbers: a continuous recording of two dimensions, or trials of three."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from b2t.data.remarks import Remarks
from b2t.data.sources.base import SourceOptions, TrialInfo, require_plausible_size
from b2t.data.sources.cutting import windows
from b2t.data.sources.parts import Part, choose_channels
from b2t.data.sources.recording import CutRecording, Recording, WholeTrials
from b2t.data.sources.sessions import subject_name
from b2t.errors import UserError


@dataclass(frozen=True)
class Array:
    """An array in a file.

    Attributes:
        file: where it lies.
        place: its name in the file, empty where it is alone.
        session: its session's name.
        shape: [T, C] or [trials, T, C]; with channels first [C, T] or [trials, C, T].
        rate: its sampling rate in Hz.
        load: returns the whole array, which may be mapped from disk.
        channels: C names, None numbers them.
    """

    file: Path
    place: str
    session: str
    shape: tuple[int, ...]
    rate: float
    load: Callable[[], np.ndarray]
    channels: list[str] | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.file}, {self.place}" if self.place else f"{self.file}"


def open_array(array: Array, options: SourceOptions, remarks: Remarks) -> Part:
    """Cut a continuous array in windows, or take the trials of one of three dimensions.

    Raises:
        UserError: another number of dimensions, or names that do not fit the channels.
    """
    if len(array.shape) not in (2, 3) or not all(array.shape):
        raise UserError(
            f"{array.name} has shape {list(array.shape)}, where [bins, channels] or [trials, bins, "
            "channels] is expected"
        )
    bins, channels = _sizes(array, options, remarks)
    names = array.channels or [f"channel{index}" for index in range(channels)]
    if len(names) != channels:
        raise UserError(
            f"{array.name} has {channels} channels and {len(names)} names of channels: with "
            "channels first, give --layout channels-first"
        )
    picks = choose_channels(names, options.channels, array.name)
    chosen = [names[pick] for pick in picks]

    def oriented(values: np.ndarray) -> np.ndarray:
        turned = values.T if options.layout == "channels-first" else values
        return np.asarray(turned[:, picks], dtype=np.float32)

    if len(array.shape) == 3:
        require_plausible_size(bins, channels, array.name)
        return WholeTrials(
            file=array.file,
            session=array.session,
            channels=chosen,
            sampling_rate=array.rate,
            trials=_trials(array),
            load=lambda index: oriented(array.load()[index]),
            resample=options.resample,
            lack=f"{array.name} holds no trial",
        )
    recording = Recording(
        file=array.file,
        session=array.session,
        subject=subject_name(array.file, array.session),
        channels=chosen,
        sampling_rate=array.rate,
        samples=bins,
        read=lambda start, stop: oriented(_between(array.load(), start, stop, options)),
        place=array.place,
    )
    return CutRecording(recording, windows, options, remarks)


def _between(values: np.ndarray, start: int, stop: int, options: SourceOptions) -> np.ndarray:
    return values[:, start:stop] if options.layout == "channels-first" else values[start:stop]


def _sizes(array: Array, options: SourceOptions, remarks: Remarks) -> tuple[int, int]:
    """Return bins and channels; remark where they look exchanged."""
    bins, channels = array.shape[-2:]
    if options.layout == "channels-first":
        return channels, bins
    if options.layout is None and channels > bins:
        remarks.add(
            f"is taken as {bins} bins × {channels} channels: if channels come first, give "
            "--layout channels-first; --layout time-first confirms it",
            array.name,
            "file",
        )
    return bins, channels


def _trials(array: Array) -> list[TrialInfo]:
    return [
        TrialInfo(
            name=f"{array.name}, trial {index}",
            session=array.session,
            subject=subject_name(array.file, array.session),
            block=0,
            trial=index,
        )
        for index in range(array.shape[0])
    ]
