"""How much of a phase is over: by its steps, or by its time where it has a budget of minutes."""

import time
from collections.abc import Callable

from b2t.config import PhaseConfig
from b2t.train.progress import Progress

_CLOCKS: dict[str, Callable[[], float]] = {
    "wall": time.perf_counter,
    "processor": time.process_time,
}


class PhaseBudget:
    """Steps and minutes of one phase.

    The time is counted between two steps and shared by all ranks before it counts, so that all end
    the phase after the same step. What passes between two sessions of a run is not counted.

    Args:
        phase: the phase.
        progress: clocks of the run; `phase_seconds` grows.
    """

    def __init__(self, phase: PhaseConfig, progress: Progress) -> None:
        self.phase = phase
        self.progress = progress
        self._clock = _CLOCKS[phase.minutes_of]
        self._last = self._clock()

    def elapsed(self) -> float:
        """Seconds of this rank since the last call; 0 in a phase without minutes."""
        if self.phase.minutes is None:
            return 0.0
        now = self._clock()
        seconds, self._last = now - self._last, now
        return seconds

    def time_done(self) -> float:
        """Share of the minutes that is over, 0 in a phase without."""
        if self.phase.minutes is None:
            return 0.0
        return min(1.0, self.progress.phase_seconds / (60 * self.phase.minutes))

    def done(self) -> float:
        """Share of the phase that is over, by steps or by minutes, whichever is more."""
        return max(self.progress.phase_step / self.phase.steps, self.time_done())

    def seconds_left(self, step_s: float) -> float:
        """Estimate of the seconds that the phase still takes at this pace."""
        left = step_s * (self.phase.steps - self.progress.phase_step)
        share = self.time_done()
        if not share:
            return left
        spent = step_s * self.progress.phase_step
        return min(left, spent * (1 - share) / share)
