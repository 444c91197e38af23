"""Bins as they are recorded, brought into the form of the training signals while they come."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from b2t.data.prepare.blocks import ALL, read_statistics
from b2t.errors import UserError
from b2t.running_statistics import RunningStatistics
from b2t.signal_processing import Processing, ProcessingOptions
from b2t.signal_spec import Z_SCORE

if TYPE_CHECKING:
    from b2t.model.configuration import BrainToTextConfig


class RawBins:
    """References, filters and z-scores bins of one session as they come.

    Args:
        config: of the model, which says what was done to its training signals.
        forget_s: time constant of the running mean and deviation, in seconds.
        start: a prepared folder whose statistics they start from; None starts from nothing.
        session: of the bins; one that the folder does not know starts from all of its training.

    Raises:
        UserError: the model does not say what was done, or it cannot be done as bins come.
    """

    def __init__(
        self,
        config: "BrainToTextConfig",
        forget_s: float,
        start: Path | None = None,
        session: str | None = None,
    ) -> None:
        known = config.signal or {}
        if known.get("normalization") is None:
            raise UserError(
                "--raw: the model does not say what was done to its training signals (prepared by "
                "an earlier version, or elsewhere): send bins as they were trained on"
            )
        names = known.get("channel_names") or [str(place) for place in range(config.channels)]
        options = ProcessingOptions(**(known.get("processing") or {}))
        self._stream = Processing(options, names, config.sampling_rate).stream()
        self._running = None
        if known["normalization"] != "none":
            mean, deviation = _start(start, session, config.channels)
            bins = forget_s * config.sampling_rate
            self._running = RunningStatistics(
                config.channels, bins, mean=mean, deviation=deviation, weight=bins
            )
        elif known.get("unit") == Z_SCORE:
            raise UserError(
                "--raw: the training signals were z-scored by their source, and how is not known: "
                "send bins z-scored in the same way"
            )

    def __call__(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield blocks [n, C] float32 in the form of the training; bins of NaN stay as they are."""
        for block in blocks:
            found = np.array(block, np.float32)
            real = ~np.isnan(found).all(axis=1)
            bins = self._stream.push(found[real])
            found[real] = bins if self._running is None else self._running.push(bins)
            yield found


def _start(
    folder: Path | None, session: str | None, channels: int
) -> tuple[np.ndarray | None, np.ndarray | None]:
    if folder is None:
        return None, None
    scales = read_statistics(folder)
    mean, deviation = scales.get(session or ALL, scales[ALL])
    if len(mean) != channels:
        raise UserError(
            f"--start-from {folder}: its statistics are of {len(mean)} channels, the model reads "
            f"{channels}"
        )
    return mean, deviation
