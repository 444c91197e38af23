"""Where a continuous recording is cut: in windows, or at its annotations."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from b2t.data.remarks import Remarks
from b2t.data.sources.base import SPLITS, SourceOptions
from b2t.errors import UserError

_MOST_WINDOWS = 2**20
"""Windows of one file; more of them are a mistake in an option or in a header."""
_MOST_REPEATS = 10


@dataclass(frozen=True)
class Stretch:
    """Samples [start, stop) of a recording; its resampling may read within ``limits``."""

    start: int
    stop: int
    limits: tuple[int, int]
    split: str | None = None
    text: str | None = None


def require_sensible(options: SourceOptions) -> None:
    """Refuse a window or an overlap that nothing can be cut with."""
    if not 0 < options.window < math.inf:
        raise UserError(f"--window {options.window:g}: a window lasts more than 0 seconds")
    if not 0 <= options.overlap < 1:
        raise UserError(
            f"--overlap {options.overlap:g}: the share of a window that the next one repeats lies "
            "in 0 ≤ overlap < 1"
        )


def windows(raw: Any, file: Path, options: SourceOptions, remarks: Remarks) -> list[Stretch]:
    """Cut windows; those that touch a BAD annotation are left out.

    Raises:
        UserError: windows of less than two bins, or more of them than can be meant.
    """
    length, step = _window(raw, file, options)
    bounds = np.round(np.cumsum((0.0, *options.fractions)) * raw.n_times).astype(int)
    parts = list(zip(SPLITS, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
    count = sum(max(0, (high - low - length) // step + 1) for _, low, high in parts)
    if count > _MOST_WINDOWS:
        raise UserError(
            f"{file}: --window {options.window:g} --overlap {options.overlap:g} cuts {count} "
            f"windows, more than {_MOST_WINDOWS}: lengthen --window or lower --overlap"
        )
    if length > _MOST_REPEATS * step:
        remarks.add(
            f"--overlap {options.overlap:g} repeats every sample in about {length // step} "
            "windows, and the dataset grows as much: lower --overlap if it is not meant",
            str(file),
            "file",
        )
    for split, low, high in parts:
        if 0 < high - low < length:
            remarks.add(f"its {split} share is shorter than a window", str(file), "file")
    cut = [
        Stretch(start, start + length, (low, high), split)
        for split, low, high in parts
        for start in range(low, high - length + 1, step)
    ]
    _say_remainder(raw, file, parts, (length, step), remarks)
    return _without_bad(raw, file, cut, remarks)


def _window(raw: Any, file: Path, options: SourceOptions) -> tuple[int, int]:
    """Return length and step of windows in samples."""
    rate = float(raw.info["sfreq"])
    samples = options.window * rate
    bins = options.window * (options.resample or rate)
    if min(samples, bins) < 2:
        raise UserError(
            f"--window {options.window:g}: at {min(rate, options.resample or rate):g} Hz ({file}) "
            "it holds less than 2 bins; lengthen it"
        )
    length = round(samples)
    return length, max(1, round(length * (1 - options.overlap)))


def _say_remainder(
    raw: Any,
    file: Path,
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
    rate = float(raw.info["sfreq"])
    if left:
        remarks.add(
            "the ends of its splits fill no window and are left out",
            f"{file} ({left / rate:.1f} s of {raw.n_times / rate:.1f} s)",
            "file",
            logging.INFO,
        )


def _without_bad(raw: Any, file: Path, cut: list[Stretch], remarks: Remarks) -> list[Stretch]:
    bad = [
        (start, start + length)
        for start, length, description in _annotations(raw)
        if _marks_bad(description)
    ]
    kept = [
        window
        for window in cut
        if not any(window.start < end and begin < window.stop for begin, end in bad)
    ]
    if len(kept) < len(cut):
        remarks.add(
            "windows that touch a BAD annotation are left out",
            f"{file} ({len(cut) - len(kept)} of {len(cut)})",
            "file",
            logging.INFO,
        )
    return kept


def annotated(raw: Any, file: Path, options: SourceOptions, remarks: Remarks) -> list[Stretch]:
    """Cut at annotations; one without a duration lasts a window."""
    limits = (0, raw.n_times)
    window = max(1, round(options.window * float(raw.info["sfreq"])))
    stretches = []
    for start, length, description in _annotations(raw, window):
        if _marks_bad(description):
            continue
        if start + length > raw.n_times:
            remarks.add(
                "left out, as it ends after the recording", f"{file}, {description}", "annotation"
            )
            continue
        text = description.strip() or None
        stretches.append(Stretch(start, start + length, limits, text=text))
    return stretches


def _marks_bad(description: str) -> bool:
    return description.upper().startswith("BAD")


def _annotations(raw: Any, window: int = 1) -> Iterator[tuple[int, int, str]]:
    """Yield start and length in samples and the description; no duration means ``window``."""
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
        length = max(1, round(float(duration) * rate)) if duration else window
        yield start, length, str(description)
