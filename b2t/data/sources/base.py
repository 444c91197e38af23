"""What every source of trials offers, whatever its file format."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import numpy as np
import scipy  # its parts load as they are met: `scipy.signal` takes a second

from b2t.data.remarks import Remarks
from b2t.errors import UserError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class SourceOptions:
    """How to read a source.

    Attributes:
        window: length of the windows that continuous recordings are cut into, in seconds.
        overlap: share of a window that the next one repeats, 0 ≤ overlap < 1.
        annotations: cut at annotations, whose descriptions become texts, instead of in windows.
        text_column: column of the epochs' metadata that holds the text.
        channels: names to read, in this order; None = all recorded channels.
        resample: sampling rate of the result in Hz; None = as recorded.
        fractions: shares of train, val and test where the source has no splits of its own.
        signal: name of the signal in files that hold several things.
        rate: sampling rate of files that do not say theirs: Hz, or the name of a variable.
        layout: ``time-first`` signals are [T, C], ``channels-first`` ones [C, T]; None takes what
            the format says.
        bin_ms: width of the bins that spikes are counted in, in ms.
        level: what a trial of ZuCo is: the band features of its ``words``, or the EEG of a
            ``sentences``.
    """

    window: float = 2.0
    overlap: float = 0.0
    annotations: bool = False
    text_column: str | None = None
    channels: tuple[str, ...] | None = None
    resample: float | None = None
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    signal: str | None = None
    rate: str | None = None
    layout: str | None = None
    bin_ms: float = 20.0
    level: str = "words"


@dataclass(frozen=True)
class TrialInfo:
    """Everything about a trial but its signal.

    ``name`` says where it lies, for messages. ``split`` None: still to be assigned.
    """

    name: str
    session: str
    subject: str
    block: int
    trial: int
    text: str | None = None
    phonemes: tuple[int, ...] | None = None
    split: str | None = None


class Source(Protocol):
    """Trials of one recording, release or folder.

    Attributes:
        format: the format's name.
        channels: channel names, the same for every trial.
        sampling_rate: in Hz, after any resampling.
        standardized: the signals are z-scored per block already.
        unit: of the signals as recorded, for example V; None where it is not known.
        own_splits: the release says which trial belongs to which split.
        simulated: the signals come from a simulation.
        trials: what is known before any signal is read.
        remarks: what reading met that may be a mistake.

    A source may also have ``portable``, true where it is small and travels to other processes by
    pickle; others are opened there again.
    """

    format: str
    channels: list[str]
    sampling_rate: float
    standardized: bool
    unit: str | None
    own_splits: bool
    simulated: bool
    trials: list[TrialInfo]
    remarks: Remarks

    def read(self, index: int) -> np.ndarray:
        """Return the signal [T, C] of ``trials[index]``."""
        ...


class SourceFormat(Protocol):
    """A module that reads one format.

    Attributes:
        NAME: what ``--source`` and messages call it.
        READS: what it reads, in a few words.
        OPTIONS: fields of `SourceOptions` that mean something to it, beside the resampling and
            the shares of the splits.
    """

    NAME: str
    READS: str
    OPTIONS: frozenset[str]

    def find(self, path: Path) -> list[Path]:
        """Return the files of this format at ``path`` (a file or a folder), or nothing."""
        ...

    def open_source(self, path: Path, files: list[Path], options: SourceOptions) -> Source:
        """Open the files that ``find`` returned."""
        ...


_LARGEST_TRIAL = 2**28
"""Values T × C; more is a damaged header, and 1 GiB as float32."""
_HIGHEST = 1e9
"""Hz; no recording is sampled so often."""
_RATIOS = (1e-2, 1e1)
"""Least and most that `--resample` changes a sampling rate by."""


def require_plausible_size(bins: int, channels: int, name: str) -> None:
    """Refuse a trial [T, C] whose header claims more than can be meant, before it is read.

    Raises:
        UserError: names the trial as ``name``.
    """
    if bins * channels > _LARGEST_TRIAL:
        raise UserError(
            f"{name}: claims {bins} bins × {channels} channels, where a trial holds at most "
            f"{_LARGEST_TRIAL} values: the file is damaged, or must be cut into shorter trials"
        )


def rate_in_hertz(given: str) -> float:
    """Read the sampling rate that the user gives with ``--rate``.

    Raises:
        UserError: it is no number above 0.
    """
    try:
        rate = float(given)
    except ValueError:
        rate = 0.0
    if not 0 < rate < _HIGHEST:
        raise UserError(f"--rate {given}: a number of Hz above 0 is expected")
    return rate


def require_rate(recorded: float, wanted: float | None, file: str | Path) -> None:
    """Refuse sampling rates in Hz that cannot be read, or not be reached from one another.

    Raises:
        UserError: names ``file``.
    """
    if not 0 < recorded < _HIGHEST:
        raise UserError(
            f"{file}: its sampling rate is {recorded:g} Hz, where a number above 0 is expected: "
            "the header is damaged; copy the file again"
        )
    if wanted is None:
        return
    low, high = (ratio * recorded for ratio in _RATIOS)
    if not low <= wanted <= high:
        raise UserError(
            f"--resample {wanted:g}: {file} is sampled at {recorded:g} Hz; expected a rate "
            f"between {low:g} and {high:g} Hz"
        )


def resampled(
    read: Callable[[int, int], np.ndarray],
    start: int,
    stop: int,
    limits: tuple[int, int],
    rates: tuple[float, float],
) -> np.ndarray:
    """Resample the samples [start, stop) of a longer recording, free of edge effects.

    Args:
        read: returns samples [T, C] between two positions.
        start: first sample.
        stop: the one after the last.
        limits: samples outside this range are never read, so that splits stay apart.
        rates: recorded and wanted sampling rate in Hz.

    Returns:
        [T', C] with T' = T × wanted / recorded, rounded.
    """
    recorded, wanted = rates
    if wanted == recorded:
        return read(start, stop)
    ratio = Fraction(wanted / recorded).limit_denominator(1000)
    up, down = ratio.numerator, ratio.denominator
    # The context holds the filter of resample_poly, in steps that keep both time grids aligned.
    context = -(-10 * max(up, down) // (up * down)) * down
    before = min(context, (start - limits[0]) // down * down)
    signal = read(start - before, min(stop + context, limits[1]))
    whole = scipy.signal.resample_poly(signal, up, down, axis=0, padtype="line")
    first = before * up // down
    return whole[first : first + max(1, round((stop - start) * up / down))]
