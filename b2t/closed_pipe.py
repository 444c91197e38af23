"""Commands whose reader has read enough, as in `b2t inspect DATA | head`."""

import os
import select
import sys
from collections.abc import Callable

EXIT_CLOSED_PIPE = 141
"""128 + SIGPIPE: what a shell says of `cat` in `cat FILE | head`."""


def until_closed(command: Callable[[], int]) -> int:
    """Run ``command``, flush what it printed, and return its status.

    Where the reader of standard output or error has gone, nothing more is written and the status
    is `EXIT_CLOSED_PIPE`. A pipe to a process of our own that broke is not that, and is raised.
    """
    try:
        try:
            return command()
        finally:
            _flush()
    except BrokenPipeError:
        gone = [number for number in (1, 2) if _reader_left(number)]
        if not gone:
            raise
        _write_nowhere(gone)
    except SystemExit as leaving:
        # rich turns a closed pipe into this, after it has pointed standard output elsewhere.
        if not isinstance(leaving.__context__, BrokenPipeError):
            raise
    return EXIT_CLOSED_PIPE


def _flush() -> None:
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError:  # a full disk: the interpreter tries again at its end, and says so
        return


def _reader_left(descriptor: int) -> bool:
    """Tell whether ``descriptor`` is a pipe or socket that nobody reads."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _write_nowhere(descriptors: list[int]) -> None:
    """Let Python flush its buffers at its end without an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
