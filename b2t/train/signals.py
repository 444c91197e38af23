"""Requests to stop: remembered by the rank that got one, agreed on by all at the next step."""

import os
import signal
from types import FrameType

from b2t.log import logger

EXIT_STOPPED = 75
"""Exit status after a requested stop with a checkpoint: run the same command to go on.

It is EX_TEMPFAIL of sysexits.h; a scheduler can requeue on it.
"""

EXIT_KILLED = 76
"""Exit status after a second signal: left at once, without a new checkpoint."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Listens for SIGTERM, SIGINT and SIGUSR1.

    The first sets `requested`; the trainer shares it with all ranks in the sums that open each
    step, so that they save and leave together. A second leaves at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}

    def close(self) -> None:
        """Restore the handlers from before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(EXIT_KILLED)
        self.requested = True
        logger(__name__).warning(
            "%s received: saving after this step (send it again to leave at once)",
            signal.Signals(number).name,
        )
