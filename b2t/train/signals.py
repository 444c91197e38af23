"""Requests to stop: remembered by the rank that got one, agreed on by all at the next step."""

import os
import signal
import time
from types import FrameType

from b2t.log import logger

EXIT_STOPPED = 75
"""Exit status after a requested stop with a checkpoint: run the same command to go on.

It is EX_TEMPFAIL of sysexits.h; a scheduler can requeue on it.
"""

EXIT_KILLED = 76
"""Exit status after a second signal: left at once, without a new checkpoint."""

REPEAT_S = 3.0
"""Seconds within which another signal is the same request.

Ctrl-C and schedulers reach a launcher and its ranks alike, and the launcher then signals the ranks
again: DeepSpeed's does so at once, and once more a tenth of a second later.
"""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Listens for SIGTERM, SIGINT and SIGUSR1.

    The first sets `requested`; the trainer shares it with all ranks in the sums that open each
    step, so that they save and leave together. One that comes `repeat_s` seconds later, or more,
    leaves at once.
    """

    def __init__(self, repeat_s: float = REPEAT_S) -> None:
        self.requested = False
        self._repeat_s = repeat_s
        self._since = 0.0
        self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}

    def close(self) -> None:
        """Restore the handlers from before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested:
            if now - self._since >= self._repeat_s:
                os._exit(EXIT_KILLED)
            return
        self.requested, self._since = True, now
        logger(__name__).warning(
            "%s received: saving after this step (after %g s, send it again to leave at once)",
            signal.Signals(number).name,
            self._repeat_s,
        )
