"""Who answers Ctrl-C where several processes work: a terminal sends it to all of them."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def left_to_this_process() -> Iterator[None]:
    """Let processes that are started meanwhile ignore SIGINT from their first import on."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set a handler
        return
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
