"""How long steps take, without what is done between them."""

import time


class StepClock:
    """Wall time from one applied step to the next; `restart` leaves out what came between."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def restart(self) -> None:
        """Count from now: the time since the last step was spent on something else."""
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap or restart, and start the next one."""
        now = time.perf_counter()
        taken, self._since = now - self._since, now
        return taken
