"""A source whose signals are re-referenced and filtered as they are read."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from b2t.data.sources.base import Source
from b2t.errors import UserError
from b2t.signal_processing import Processing, ProcessingOptions


class ProcessedSource:
    """Trials of a source after `b2t.signal_processing`.

    Windows of a continuous recording are filtered with what lies around them in their split, so
    that neighbours fit together; whole trials are filtered alone, and their ends are less exact.

    Args:
        source: opened.
        options: what is done; bad channels that it lacks are passed over.
    """

    def __init__(self, source: Source, options: ProcessingOptions) -> None:
        self._source = source
        self.processing = options.model_dump(mode="json")
        self.format = source.format
        self.channels = source.channels
        self.sampling_rate = source.sampling_rate
        self.standardized = source.standardized
        self.unit = source.unit
        self.own_splits = source.own_splits
        self.simulated = source.simulated
        self.trials = source.trials
        self.remarks = source.remarks
        self.portable = getattr(source, "portable", False)
        self._process = Processing(options, source.channels, source.sampling_rate)
        bad = set(options.bad_channels)
        self.absent = [place for place, name in enumerate(source.channels) if name in bad]

    def read(self, index: int) -> np.ndarray:
        """Return the signal [T, C] of ``trials[index]``."""
        context = self._process.context_s
        around = getattr(self._source, "read_around", None)
        if context and around is not None:
            signal, first, bins = around(index, context)
            return self._process(signal)[first : first + bins]
        signal = self._source.read(index)
        if context and len(signal) < context * self.sampling_rate:
            self.remarks.add(
                f"shorter than the {context:g} s that the filters remember: its ends are not exact",
                self.trials[index].name,
                level=logging.INFO,
            )
        return self._process(signal)

    def recording_of(self, index: int) -> str:
        """Name the recording of one trial."""
        return recording_of(self._source, index)


def recording_of(source: Source, index: int) -> str:
    """Name the recording of one trial: its file where the source tells, or its block."""
    asked = getattr(source, "recording_of", None)
    if asked is not None:
        return str(asked(index))
    file = getattr(source, "file_of", None)
    if file is not None:
        return f"{source.trials[index].session}/{Path(file(index)).name}"
    info = source.trials[index]
    return f"{info.session}/{info.block}"


def processed(paths: Sequence[Path], sources: list[Source], options: ProcessingOptions) -> list:
    """Return sources that process their signals as ``options`` say, themselves where nothing is.

    Raises:
        UserError: a bad channel that no source has.
    """
    known = {name for source in sources for name in source.channels}
    strange = [name for name in options.bad_channels if name not in known]
    if strange:
        raise UserError(
            f"--bad-channels: {paths[0]} has no channel {strange[0]}; it has "
            f"{', '.join(sources[0].channels[:8])}{' …' if len(sources[0].channels) > 8 else ''}"
        )
    if not options.does_something:
        return sources
    return [ProcessedSource(source, options) for source in sources]
