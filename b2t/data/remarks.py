"""What may be meant and may be a mistake: counted by kind, said once each."""

from b2t.log import logger


class Remarks:
    """Collects remarks while a source is read and says each kind in one warning.

    A place that is met again, as in a second pass over the trials, counts once.
    """

    def __init__(self) -> None:
        self._places: dict[tuple[str, str], dict[str, None]] = {}

    def add(self, what: str, place: str, unit: str = "trial") -> None:
        """Count one place.

        Args:
            what: what was found, and what is done about it.
            place: the file, trial or key that it was found at.
            unit: what ``place`` is one of, in the singular.
        """
        self._places.setdefault((what, unit), {})[place] = None

    def say(self) -> None:
        """Log one warning for each kind, then forget them."""
        for (what, unit), places in self._places.items():
            first = next(iter(places))
            if len(places) == 1:
                logger(__name__).warning("%s: %s", first, what)
            else:
                logger(__name__).warning("%d %ss, the first %s: %s", len(places), unit, first, what)
        self._places.clear()
