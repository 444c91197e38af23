"""One source of several files or recordings: the same channels and rate, sessions kept apart."""

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from b2t.data.remarks import Remarks
from b2t.data.sources.base import SourceOptions, TrialInfo
from b2t.errors import UserError


class Part(Protocol):
    """One opened file or recording."""

    @property
    def file(self) -> Path:
        """Where it lies."""
        ...

    @property
    def session(self) -> str:
        """Name that no other part may have."""
        ...

    @property
    def continued(self) -> list[Path]:
        """Files that it goes on in, where a long recording was split."""
        ...

    @property
    def channels(self) -> list[str]:
        """C names."""
        ...

    @property
    def sampling_rate(self) -> float:
        """As recorded, in Hz."""
        ...

    @property
    def trials(self) -> list[TrialInfo]:
        """What is known of each trial."""
        ...

    def read(self, index: int) -> np.ndarray:
        """Return the signal [T, C] of one trial."""
        ...

    def nothing(self) -> str:
        """Say why there may be no trial."""
        ...


class PartsSource:
    """Trials of one or several parts.

    Args:
        format: the format's name.
        path: what the user named.
        parts: the opened files, at least one.
        options: as given on the command line.
        remarks: what opening them met.
        unit: of the signals, None where it is not known.
        standardized: they are z-scored already.
        own_splits: trials bring their split.

    Raises:
        UserError: parts that do not fit together, or hold no trial.
    """

    simulated = False

    def __init__(
        self,
        format: str,
        path: Path,
        parts: Sequence[Part],
        options: SourceOptions,
        remarks: Remarks,
        *,
        unit: str | None = None,
        standardized: bool = False,
        own_splits: bool = False,
    ) -> None:
        self.format = format
        self.unit = unit
        self.standardized = standardized
        self.own_splits = own_splits
        self.remarks = remarks
        self.parts = _without_continuations(parts)
        for part in self.parts:
            _require_agreement(self.parts[0], part, options)
        _require_distinct_sessions(self.parts)
        self.trials = [info for part in self.parts for info in part.trials]
        self._places = [(part, i) for part in self.parts for i in range(len(part.trials))]
        remarks.say()
        if not self.trials:
            raise UserError(f"{path}: no trial: {self.parts[0].nothing()}")
        self.channels = self.parts[0].channels
        self.sampling_rate = options.resample or self.parts[0].sampling_rate

    def read(self, index: int) -> np.ndarray:
        """Return the signal [T, C] of one trial."""
        part, position = self._places[index]
        return part.read(position)

    def read_around(self, index: int, context_s: float) -> tuple[np.ndarray, int, int]:
        """Return a trial with what lies around it; see `CutRecording.read_around`."""
        part, position = self._places[index]
        around = getattr(part, "read_around", None)
        if around is None:
            signal = part.read(position)
            return signal, 0, len(signal)
        return around(position, context_s)

    def file_of(self, index: int) -> Path:
        """Return the file of one trial."""
        return self._places[index][0].file


def choose_channels(
    names: Sequence[str], wanted: tuple[str, ...] | None, place: str | Path
) -> list[int]:
    """Return the places of the channels to read, all of them where none are ``wanted``.

    Args:
        names: C names.
        wanted: names, or patterns such as ``F*`` that stand for all channels that match.
        place: where they are, for messages.

    Raises:
        UserError: a channel that is not there, or is named twice.
    """
    if wanted is None:
        return list(range(len(names)))
    every = list(names)
    found = {name: [name] if name in every else fnmatch.filter(every, name) for name in wanted}
    missing = [name for name, matches in found.items() if not matches]
    if missing:
        raise UserError(f"{place} has no channel {', '.join(missing)}: it has {shown(names)}")
    chosen = [name for pattern in wanted for name in found[pattern]]
    twice = [name for name in chosen if chosen.count(name) > 1]
    if twice:
        raise UserError(f"--channels names {twice[0]} more than once: name each channel once")
    return [every.index(name) for name in chosen]


def shown(channels: Sequence[str]) -> str:
    """Say how many channels there are, and the first of them."""
    names = ", ".join(channels[:8]) + (" …" if len(channels) > 8 else "")
    return f"{len(channels)} channels ({names})"


def _require_agreement(first: Part, part: Part, options: SourceOptions) -> None:
    if part.channels != first.channels:
        raise UserError(
            f"{first.file} has {shown(first.channels)} and {part.file} has "
            f"{shown(part.channels)}: one dataset needs the same channels in the same order; "
            "name common ones with --channels A,B,…"
        )
    if part.sampling_rate != first.sampling_rate and not options.resample:
        raise UserError(
            f"{first.file} is sampled at {first.sampling_rate:g} Hz and {part.file} at "
            f"{part.sampling_rate:g} Hz: bring them to one rate with --resample HZ"
        )


def _without_continuations(parts: Sequence[Part]) -> list[Part]:
    """Leave out files that are read with the one before, or their trials would come twice."""
    continued = {file.resolve() for part in parts for file in part.continued}
    return [part for part in parts if part.file.resolve() not in continued]


def _require_distinct_sessions(parts: list[Part]) -> None:
    files: dict[str, Path] = {}
    for part in parts:
        if part.session in files:
            raise UserError(
                f"{files[part.session]} and {part.file} would both be session {part.session!r}: "
                "if they are one recording, remove one of them; otherwise rename one"
            )
        files[part.session] = part.file
