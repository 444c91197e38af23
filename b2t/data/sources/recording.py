"""A continuous recording of any format, and its trials."""

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np

from b2t.data.remarks import Remarks
from b2t.data.sources.base import SourceOptions, TrialInfo, resampled


@dataclass(frozen=True)
class Annotation:
    """Samples from ``start`` on that carry a text; ``length`` 0 means that it has no duration."""

    start: int
    length: int
    text: str
    split: str | None = None


@dataclass(frozen=True)
class Recording:
    """One stretch of samples without a gap.

    Attributes:
        file: where it lies; with ``place``, for messages.
        session: its session's name, unique in a source.
        subject: whose it is.
        channels: C names.
        sampling_rate: in Hz.
        samples: how many there are.
        read: returns the samples [start, stop) as [T, C].
        annotations: marked stretches, in order.
        continued: files that it goes on in, where a long recording was split.
        place: where in the file it lies, such as a group's name; empty for the whole file.
    """

    file: Path
    session: str
    subject: str
    channels: list[str]
    sampling_rate: float
    samples: int
    read: Callable[[int, int], np.ndarray]
    annotations: list[Annotation] = field(default_factory=list)
    continued: list[Path] = field(default_factory=list)
    place: str = ""

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.file}, {self.place}" if self.place else f"{self.file}"


@dataclass(frozen=True)
class Stretch:
    """Samples [start, stop) of a recording; its resampling may read within ``limits``."""

    start: int
    stop: int
    limits: tuple[int, int]
    split: str | None = None
    text: str | None = None


Cut = Callable[[Recording, SourceOptions, Remarks], list[Stretch]]


class CutRecording:
    """A recording cut into trials, read from disk when asked.

    Args:
        recording: what is cut.
        cut: chooses the stretches.
        options: window, resampling and the rest.
        remarks: collects what may be a mistake.
    """

    def __init__(
        self, recording: Recording, cut: Cut, options: SourceOptions, remarks: Remarks
    ) -> None:
        self.file = recording.file
        self.session = recording.session
        self.continued = recording.continued
        self.channels = recording.channels
        self.sampling_rate = recording.sampling_rate
        self._recording = recording
        self._options = options
        self._stretches = cut(recording, options, remarks)
        self.trials = [
            TrialInfo(
                name=f"{recording.name}, {stretch.start / self.sampling_rate:g} s",
                session=recording.session,
                subject=recording.subject,
                block=0,
                trial=index,
                text=stretch.text,
                split=stretch.split,
            )
            for index, stretch in enumerate(self._stretches)
        ]

    def read(self, index: int) -> np.ndarray:
        """Return the signal [T, C] of one trial."""
        return self.read_around(index, 0.0)[0]

    def read_around(self, index: int, context_s: float) -> tuple[np.ndarray, int, int]:
        """Return a trial with what lies around it in its split: [T', C], its first bin, its bins.

        Args:
            index: of the trial.
            context_s: seconds on either side; less where the split ends.
        """
        stretch = self._stretches[index]
        rates = (self.sampling_rate, self._options.resample or self.sampling_rate)
        ratio = Fraction(rates[1] / rates[0]).limit_denominator(1000)
        up, down = ratio.numerator, ratio.denominator
        # Steps of `down` samples keep the grid of the resampled trial.
        wanted = -(-round(context_s * self.sampling_rate) // down) * down
        before = min(wanted, max(0, stretch.start - stretch.limits[0]) // down * down)
        stop = max(stretch.stop, min(stretch.stop + wanted, stretch.limits[1]))
        signal = resampled(
            self._recording.read, stretch.start - before, stop, stretch.limits, rates
        )
        bins = max(1, round((stretch.stop - stretch.start) * up / down))
        first = before // down * up
        return signal, first, min(bins, len(signal) - first)

    def nothing(self) -> str:
        """Say why there may be no trial."""
        if self._options.annotations:
            return f"{self.file} has no annotations; leave out --annotations to cut windows"
        seconds = self._recording.samples / self.sampling_rate
        return (
            f"{self.file} lasts {seconds:.1f} s, of which the splits take a part each, and a "
            f"window lasts {self._options.window:g} s; shorten --window"
        )


@dataclass(frozen=True)
class WholeTrials:
    """A file whose trials are given one by one.

    Attributes:
        file: where they lie.
        session: name of the session that messages and clashes go by.
        channels: C names.
        sampling_rate: in Hz, as recorded.
        trials: what is known of each.
        load: returns the signal [T, C] of one, as recorded.
        resample: wanted rate in Hz, None keeps the recorded one.
        lack: why there may be no trial.
        continued: see `Recording`; epochs have none.
    """

    file: Path
    session: str
    channels: list[str]
    sampling_rate: float
    trials: list[TrialInfo]
    load: Callable[[int], np.ndarray]
    resample: float | None
    lack: str
    continued: list[Path] = field(default_factory=list)

    def read(self, index: int) -> np.ndarray:
        """Return the signal [T, C] of one trial."""
        signal = self.load(index)
        return resampled(
            lambda start, stop: signal[start:stop],
            0,
            len(signal),
            (0, len(signal)),
            (self.sampling_rate, self.resample or self.sampling_rate),
        )

    def nothing(self) -> str:
        """Say why there may be no trial."""
        return self.lack
