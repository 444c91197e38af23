"""How long decoding still takes: a bar with the time left, and a word where that is long."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from tqdm import tqdm

from b2t.log import logger

if TYPE_CHECKING:
    from b2t.data.batches import Batch

LONG = 300.0
"""Seconds left from which a warning says so."""


def with_time_left(
    batches: Iterable["Batch"],
    doing: str,
    trials: int | None = None,
    remedy: str = "",
    *,
    hidden: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator["Batch"]:
    """Yield batches while a bar counts their trials on a terminal.

    Once, where more than `LONG` seconds seem to be left after a batch, a warning says so, also
    where there is no terminal. Long trials come first, so that less is left than it says.

    Args:
        batches: to pass on.
        doing: what is done to them, before the bar.
        trials: how many there are in all; None shows no time left and warns of nothing.
        remedy: what would be faster.
        hidden: no bar, whatever stderr is.
        clock: seconds.
    """
    began, done, warned = clock(), 0, False
    shown = True if hidden else None  # None: on a terminal only
    with tqdm(total=trials, desc=doing, unit="trial", disable=shown, leave=False) as bar:
        for batch in batches:
            yield batch
            done += len(batch.rows)
            bar.update(len(batch.rows))
            spent = clock() - began
            left = 0.0 if trials is None else spent / max(1, done) * (trials - done)
            if left > LONG and not warned:
                warned = True
                logger(__name__).warning(
                    "%s: %s of %s trials took %.0f s; up to %.0f minutes are left%s",
                    doing, f"{done:,}", f"{trials:,}", spent, left / 60,
                    f" ({remedy})" if remedy else "",
                )  # fmt: skip
