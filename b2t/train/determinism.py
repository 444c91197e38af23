"""The same seed, the same bits: what torch is asked for, on a GPU above all."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.utils.deterministic

from b2t.errors import UserError
from b2t.log import logger

log = logger(__name__)

_REFUSAL = re.compile(r"(\S+) does not have a deterministic implementation")

_allowed: set[str] = set()
"""Operations of a backward that this process puts up with as they are."""


class NotRepeatable(UserError):  # noqa: N818  # reads as what happened
    """A backward needs an operation that has no deterministic version on a GPU.

    Attributes:
        operation: torch's name of it.
    """

    def __init__(self, operation: str) -> None:
        super().__init__(
            f"run.deterministic: torch has no deterministic {operation} on a GPU, and the dry "
            "batch, which would have found it, is switched off: set run.deterministic=false, or "
            "stability.dry_batch=true to have the rest repeatable"
        )
        self.operation = operation


def ask_for_determinism() -> None:
    """Let torch take deterministic algorithms; call before the device is first used.

    Where there is none torch warns. `strict_backward` does the rest.
    """
    # cuBLAS reads this when the device is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Nothing here reads what it has not written: filling every new tensor would only cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def strict_backward(device: torch.device) -> Iterator[None]:
    """Go backward by deterministic algorithms alone, where they are wanted and on a GPU.

    Attention has a deterministic backward there, which torch takes only where it may not warn
    instead.

    Raises:
        NotRepeatable: an operation has none, and `put_up_with` was not told of it.
    """
    wanted = torch.are_deterministic_algorithms_enabled() and not _allowed
    if device.type != "cuda" or not wanted:
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        refused = _REFUSAL.search(str(error))
        if refused is None:
            raise
        raise NotRepeatable(refused[1]) from error
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def put_up_with(problem: NotRepeatable) -> None:
    """Say what has no deterministic version, and let all backwards of this process be as they are.

    Also those of attention: torch knows only all or nothing.
    """
    if not _allowed:
        log.warning(
            "torch has no deterministic %s on a GPU: two runs with one seed will differ in the "
            "last bits, and so will a run that was stopped and gone on (run.deterministic)",
            problem.operation,
        )
    _allowed.add(problem.operation)
