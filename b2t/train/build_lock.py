"""Locks on operators that are being compiled, which the system opens when their holder dies.

torch's own lock is a file that is there or not: one that a killed process left makes all later
starts wait for ever, and a file that is old may still belong to a build on a busy machine.
"""

import fcntl
import os
import time
from pathlib import Path

from torch.utils.file_baton import FileBaton

from b2t.errors import UserError
from b2t.log import logger

SUFFIX = ".held"
"""Ends the name of the file that is locked; torch's own, beside it, is never made."""

_SAID_AFTER_S = 10.0


class BuildLock(FileBaton):
    """What torch's `FileBaton` does, by flock(2).

    Args:
        lock_file_path: the file that torch would make, in the folder of an operator.
        wait_seconds: between two looks.
        warn_after_seconds: as in torch; a line of the log says sooner what is waited for.
    """

    def __init__(
        self,
        lock_file_path: str,
        wait_seconds: float = 0.1,
        warn_after_seconds: float | None = None,
    ) -> None:
        super().__init__(f"{lock_file_path}{SUFFIX}", wait_seconds, warn_after_seconds)
        self.folder = Path(lock_file_path).parent

    def try_acquire(self) -> bool:
        """Lock; False where another process builds."""
        handle = os.open(self.lock_file_path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if isinstance(error, BlockingIOError):
                return False
            raise
        self.fd = handle  # type: ignore[assignment]  # torch says nothing of its type
        return True

    def wait(self) -> None:
        """Wait until nobody builds.

        Raises:
            UserError: the one that built has ended before it was done.
        """
        began, said = time.monotonic(), False
        while not self.try_acquire():
            if not said and time.monotonic() - began > _SAID_AFTER_S:
                said = True
                logger(__name__).info(
                    "another process compiles %s (%s): waiting for it",
                    self.folder.name,
                    self.lock_file_path,
                )
            time.sleep(self.wait_seconds)
        self.release()
        if not any(self.folder.glob("*.so")):
            raise UserError(
                f"{self.folder}: the process that compiled this operator ended before it was done; "
                "the same command compiles it anew"
            )

    def release(self) -> None:
        """Unlock; the file stays, as one that is removed could be locked twice."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def lock_builds(cache: Path) -> None:
    """Let torch lock the operators that it compiles in ``cache`` by `BuildLock`."""
    import torch.utils.cpp_extension

    try:
        cache.mkdir(parents=True, exist_ok=True)
        probe = BuildLock(str(cache / "lock"))
        probe.try_acquire()
        probe.release()
    except OSError as error:
        logger(__name__).warning(
            "%s: files cannot be locked there (%s): if a start hangs, a killed one may have left "
            "*/lock, which may be removed; TORCH_EXTENSIONS_DIR names another folder",
            cache,
            error.strerror,
        )
        return
    torch.utils.cpp_extension.FileBaton = BuildLock  # type: ignore[misc, assignment]
