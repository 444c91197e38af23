"""Where a continuous recording is cut: in windows, or at its annotations."""

import logging
import math

import numpy as np

from b2t.data.remarks import Remarks
from b2t.data.sources.base import SPLITS, SourceOptions
from b2t.data.sources.recording import Annotation, Recording, Stretch
from b2t.errors import UserError

_MOST_WINDOWS = 2**20
"""Windows of one file; more of them are a mistake in an option or in a header."""
_MOST_REPEATS = 10


def require_sensible(options: SourceOptions) -> None:
    """Refuse a window or an overlap that nothing can be cut with."""
    if not 0 < options.window < math.inf:
        raise UserError(f"--window {options.window:g}: a window lasts more than 0 seconds")
    if not 0 <= options.overlap < 1:
        raise UserError(
            f"--overlap {options.overlap:g}: the share of a window that the next one repeats lies "
            "in 0 ≤ overlap < 1"
        )


def windows(recording: Recording, options: SourceOptions, remarks: Remarks) -> list[Stretch]:
    """Cut windows; those that touch a BAD annotation are left out.

    Raises:
        UserError: windows of less than two bins, or more of them than can be meant.
    """
    length, step = _window(recording, options)
    bounds = np.round(np.cumsum((0.0, *options.fractions)) * recording.samples).astype(int)
    parts = list(zip(SPLITS, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
    count = sum(max(0, (high - low - length) // step + 1) for _, low, high in parts)
    if count > _MOST_WINDOWS:
        raise UserError(
            f"{recording.name}: --window {options.window:g} --overlap {options.overlap:g} cuts "
            f"{count} windows, more than {_MOST_WINDOWS}: lengthen --window or lower --overlap"
        )
    if length > _MOST_REPEATS * step:
        remarks.add(
            f"--overlap {options.overlap:g} repeats every sample in about {length // step} "
            "windows, and the dataset grows as much: lower --overlap if it is not meant",
            recording.name,
            "file",
        )
    for split, low, high in parts:
        if 0 < high - low < length:
            remarks.add(f"its {split} share is shorter than a window", recording.name, "file")
    cut = [
        Stretch(start, start + length, (low, high), split)
        for split, low, high in parts
        for start in range(low, high - length + 1, step)
    ]
    _say_remainder(recording, parts, (length, step), remarks)
    return _without_bad(recording, cut, remarks)


def _window(recording: Recording, options: SourceOptions) -> tuple[int, int]:
    """Return length and step of windows in samples."""
    rate = recording.sampling_rate
    samples = options.window * rate
    bins = options.window * (options.resample or rate)
    if min(samples, bins) < 2:
        raise UserError(
            f"--window {options.window:g}: at {min(rate, options.resample or rate):g} Hz "
            f"({recording.name}) it holds less than 2 bins; lengthen it"
        )
    length = round(samples)
    return length, max(1, round(length * (1 - options.overlap)))


def _say_remainder(
    recording: Recording,
    parts: list[tuple[str, int, int]],
    window: tuple[int, int],
    remarks: Remarks,
) -> None:
    """Say how much lies after the last window of each split."""
    length, step = window
    left = sum(
        high - low - ((high - low - length) // step * step + length if high - low >= length else 0)
        for _, low, high in parts
    )
    rate = recording.sampling_rate
    if left:
        remarks.add(
            "the ends of its splits fill no window and are left out",
            f"{recording.name} ({left / rate:.1f} s of {recording.samples / rate:.1f} s)",
            "file",
            logging.INFO,
        )


def _without_bad(recording: Recording, cut: list[Stretch], remarks: Remarks) -> list[Stretch]:
    bad = [
        (mark.start, mark.start + max(1, mark.length))
        for mark in recording.annotations
        if _marks_bad(mark)
    ]
    kept = [
        window
        for window in cut
        if not any(window.start < end and begin < window.stop for begin, end in bad)
    ]
    if len(kept) < len(cut):
        remarks.add(
            "windows that touch a BAD annotation are left out",
            f"{recording.name} ({len(cut) - len(kept)} of {len(cut)})",
            "file",
            logging.INFO,
        )
    return kept


def annotated(recording: Recording, options: SourceOptions, remarks: Remarks) -> list[Stretch]:
    """Cut at annotations; one without a duration lasts a window."""
    limits = (0, recording.samples)
    window = max(1, round(options.window * recording.sampling_rate))
    stretches = []
    for mark in recording.annotations:
        if _marks_bad(mark):
            continue
        stop = mark.start + (mark.length or window)
        if stop > recording.samples:
            remarks.add(
                "left out, as it ends after the recording",
                f"{recording.name}, {mark.text}",
                "annotation",
            )
            continue
        text = mark.text.strip() or None
        stretches.append(Stretch(mark.start, stop, limits, mark.split, text))
    return stretches


def _marks_bad(mark: Annotation) -> bool:
    return mark.text.upper().startswith("BAD")
