"""What libraries raise on damaged files, as one message that names the place."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from b2t.errors import UserError


@contextmanager
def reading(
    place: str | Path,
    kind: str = "",
    remedy: str = "the file is damaged or cut short; copy it again",
) -> Iterator[None]:
    """Turn whatever is raised inside into a message; readers pass on many kinds of exceptions.

    Args:
        place: file, and where in it.
        kind: what it was read as.
        remedy: what to do.

    Raises:
        UserError: anything was raised.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "no detail")[:200]
        as_kind = f" as {kind}" if kind else ""
        raise UserError(
            f"{place}: cannot be read{as_kind} ({type(error).__name__}: {reason}): {remedy}"
        ) from None
