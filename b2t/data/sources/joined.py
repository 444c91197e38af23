"""Several sources as one: sessions and subjects kept apart, channels aligned by name."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from b2t.data.remarks import Remarks
from b2t.data.sources.base import Source
from b2t.data.sources.processed import recording_of
from b2t.errors import UserError


class JoinedSource:
    """Trials of several sources, one after another.

    Channels are those of all sources, in the order in which they are met; one that a source lacks
    is 0 in its trials, which is also its mean. Sessions and subjects carry the name of their
    source, so that two recordings of one name stay two.

    Attributes:
        missing: channels that a source lacks, by the name of the source.
        units: of the sources; where they differ only z-scored signals fit together.
    """

    def __init__(self, names: list[str], sources: list[Source]) -> None:
        self.format = "+".join(dict.fromkeys(source.format for source in sources))
        self.standardized = sources[0].standardized
        units = list(dict.fromkeys(source.unit for source in sources))
        self.unit = units[0] if len(units) == 1 else None
        self.units = units
        self.own_splits = all(source.own_splits for source in sources)
        self.simulated = any(source.simulated for source in sources)
        self.sampling_rate = sources[0].sampling_rate
        self.portable = all(getattr(source, "portable", False) for source in sources)
        self.remarks = Remarks()
        self.processing = getattr(sources[0], "processing", None)
        self.channels = list(dict.fromkeys(name for each in sources for name in each.channels))
        self.missing = {
            name: [channel for channel in self.channels if channel not in source.channels]
            for name, source in zip(names, sources, strict=True)
        }
        self.absent = [
            index
            for index, channel in enumerate(self.channels)
            if any(channel in lacking for lacking in self.missing.values())
            or all(channel in _silent(source) for source in sources if channel in source.channels)
        ]
        places = {channel: index for index, channel in enumerate(self.channels)}
        self._sources = sources
        self._columns = [[places[name] for name in source.channels] for source in sources]
        self._places = [
            (number, index)
            for number, source in enumerate(sources)
            for index in range(len(source.trials))
        ]
        self.trials = [
            replace(info, session=f"{name}:{info.session}", subject=f"{name}:{info.subject}")
            for name, source in zip(names, sources, strict=True)
            for info in source.trials
        ]

    def recording_of(self, index: int) -> str:
        """Name the recording of one trial, unique among the sources."""
        number, position = self._places[index]
        return f"{number}:{recording_of(self._sources[number], position)}"

    def read(self, index: int) -> np.ndarray:
        """Return the signal [T, C] of ``trials[index]``."""
        number, position = self._places[index]
        source = self._sources[number]
        signal = source.read(position)
        self.remarks.merge(source.remarks.take())
        if len(self._columns[number]) == len(self.channels) and not self.absent:
            order = np.argsort(self._columns[number])
            return signal[:, order]
        aligned = np.zeros((len(signal), len(self.channels)), signal.dtype)
        aligned[:, self._columns[number]] = signal
        return aligned


def join(paths: list[Path], sources: list[Source]) -> JoinedSource:
    """Make one source of several.

    Args:
        paths: where each came from; its last part names it.
        sources: opened.

    Raises:
        UserError: rates or normalisations differ, two paths have one name, or no channel is common
            to all.
    """
    names = [path.name.split(".")[0] for path in paths]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(
            f"two sources are both called {twice}: their sessions could not be told apart; rename "
            "one of the folders"
        )
    for path, source in zip(paths[1:], sources[1:], strict=True):
        if source.sampling_rate != sources[0].sampling_rate:
            raise UserError(
                f"{paths[0]} has sampling rate {sources[0].sampling_rate} and {path} has "
                f"{source.sampling_rate}: one dataset needs one; bring them together by "
                "--resample HZ"
            )
        if source.standardized != sources[0].standardized:
            done, raw = (paths[0], path) if sources[0].standardized else (path, paths[0])
            raise UserError(
                f"{done} is z-scored by its source and {raw} is not: prepare them apart, and name "
                "both datasets in data.path and data.more"
            )
    common = set(sources[0].channels).intersection(*(source.channels for source in sources[1:]))
    if not common:
        raise UserError(
            f"{paths[0]} and {paths[1]} have no channel of the same name "
            f"({', '.join(sources[0].channels[:4])} … and {', '.join(sources[1].channels[:4])} …): "
            "there is nothing to align by"
        )
    return JoinedSource(names, sources)


def _silent(source: Source) -> set[str]:
    """Channels of a source that are known to be 0 throughout."""
    return {source.channels[place] for place in getattr(source, "absent", ())}
