"""Who answers Ctrl-C where several processes work: a terminal sends it to all of them."""

import signal
import threading
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
    handler = signal.getsignal(signal.SIGINT)
    # Another thread, which does not block it, may be handed it: the main one would be interrupted.
    held = threading.current_thread() is threading.main_thread() and callable(handler)
    came: list[int] = []
    if held:
        signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
        if held:
            signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)
