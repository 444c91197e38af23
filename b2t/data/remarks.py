"""What may be meant and may be a mistake: counted by kind, said once each."""

import logging

from b2t.log import logger


class Remarks:
    """Collects remarks while a source is read and says each kind in one record.

    A place that is met again, as in a second pass over the trials, counts once.
    """

    def __init__(self) -> None:
        self._places: dict[tuple[str, str, int], dict[str, None]] = {}

    def add(self, what: str, place: str, unit: str = "trial", level: int = logging.WARNING) -> None:
        """Count one place.

        Args:
            what: what was found, and what is done about it.
            place: the file, trial or key that it was found at.
            unit: what ``place`` is one of, in the singular.
            level: of the log record; what the user asked for is only information.
        """
        self._places.setdefault((what, unit, level), {})[place] = None

    def say(self) -> None:
        """Log one record for each kind, then forget them."""
        for (what, unit, level), places in self._places.items():
            first = next(iter(places))
            if len(places) == 1:
                logger(__name__).log(level, "%s: %s", first, what)
            else:
                logger(__name__).log(
                    level, "%d %ss, the first %s: %s", len(places), unit, first, what
                )
        self._places.clear()

    def take(self) -> list[tuple[str, str, int, list[str]]]:
        """Return what was added, and forget it: what `merge` takes."""
        taken = [(*kind, list(places)) for kind, places in self._places.items()]
        self._places.clear()
        return taken

    def merge(self, taken: list[tuple[str, str, int, list[str]]]) -> None:
        """Add what another process found."""
        for what, unit, level, places in taken:
            for place in places:
                self.add(what, place, unit, level)
