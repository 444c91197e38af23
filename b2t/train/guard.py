"""What becomes of a hook that fails: nothing that only rank 0 does may end a run of days."""

import logging
import traceback
from pathlib import Path
from typing import Any

from b2t.errors import UserError
from b2t.log import log_once
from b2t.train.callback import Callback


class Guard:
    """Calls hooks, and switches those off that fail.

    Errors of hooks in which ranks meet pass, as the others would wait; so do mistakes of the user
    that a hook finds at the start. A hook that cannot write (`OSError`) is called again, as disks
    are freed. Any other error is logged once, with its place, and switches the hook off, but for
    `on_end`, where it may still close what it holds open.
    """

    def __init__(self) -> None:
        self._off: set[int] = set()

    def call(self, callback: Callback, name: str, *arguments: Any) -> None:
        """Call the hook ``name`` of a callback."""
        if id(callback) in self._off and name != "on_end":
            return
        try:
            getattr(callback, name)(*arguments)
        except Exception as error:
            if callback.collective or (isinstance(error, UserError) and name == "on_start"):
                raise
            kind = type(callback).__name__
            if isinstance(error, OSError):
                log_once(f"{kind}-{name}", f"{kind}: {error}; training goes on", logging.ERROR)
                return
            self._off.add(id(callback))
            log_once(
                f"{kind}-{name}",
                f"{kind}.{name} failed: {describe(error)}; it is switched off, and training goes "
                "on without it",
                logging.ERROR,
            )


def describe(error: BaseException) -> str:
    """Return kind, text and place of an error, in one line."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else text
