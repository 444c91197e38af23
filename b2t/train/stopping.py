"""Requests to stop, heard by all ranks while they work apart: in validation, decoding, k-means."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeVar

from b2t.train.ranks import Ranks

Item = TypeVar("Item")

POLL_S = 1.0
"""Seconds between two looks for what other ranks were asked."""


class Interrupted(Exception):  # noqa: N818  # not an error: the user or the scheduler asked
    """All ranks leave what they were doing, with nothing changed by it."""


class Asked(Protocol):
    """What knows whether this process was asked to stop, as `StopSignals` does."""

    requested: bool


class StopRequests:
    """What ranks do about requests to stop between two steps.

    Between steps ranks work without meeting, for minutes: one that was asked posts it where the
    others look every second, all leave their loops, and they agree where they meet next.

    Args:
        ranks: this process among all.
        asked: of this process, None is never asked.
    """

    def __init__(self, ranks: Ranks, asked: Asked | None) -> None:
        self._ranks = ranks
        self._asked = asked
        self._heard = False
        self._looked = 0.0

    def heard(self) -> bool:
        """Whether any rank is known to have been asked. Not collective."""
        if self._asked is None or self._heard:
            return self._heard
        if self._asked.requested:
            self._ranks.post_stop()
            self._heard = True
        elif time.monotonic() - self._looked >= POLL_S:
            self._looked = time.monotonic()
            self._heard = self._ranks.stop_posted()
        return self._heard

    def until_heard(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield items, at least one of them, until a rank is asked to stop."""
        for item in items:
            yield item
            if self.heard():
                return

    def agree(self) -> None:
        """Meet the other ranks; go on together or not at all. Collective.

        Raises:
            Interrupted: on all ranks, where one of them has heard a request.
        """
        if self._ranks.any(self.heard()):
            raise Interrupted

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in order. Collective.

        Raises:
            Interrupted: as in `agree`.
        """
        found = self._ranks.gather((value, self.heard()))
        if any(heard for _, heard in found):
            raise Interrupted
        return [each for each, _ in found]
