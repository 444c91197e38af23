"""Who answers Ctrl-C where several processes work: a terminal sends it to all of them."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker


@contextmanager
def left_to_this_process() -> Iterator[None]:
    """Let processes that are started meanwhile ignore SIGINT from their first import on.

    They inherit that it is blocked. Here it is held back and answered when this ends.
    """
    # It lets SIGINT through again once it has started a process of its own.
    resource_tracker.ensure_running()
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
