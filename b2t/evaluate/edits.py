"""What kind of errors were made, on what, where: the details behind an error rate."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import jiwer

from b2t.evaluate.metrics import EditCounts, count_edits

LENGTHS = ((1, 3), (4, 6), (7, 9), (10, None))
"""Groups of targets by their number of words, both ends included."""

_SHOWN = 20

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class EditKinds:
    """Edits of all rows by kind.

    Attributes:
        hits: units that were right.
        substitutions, deletions, insertions: units said as another, left out, added.
        confused: (meant, said, times), the most frequent 20.
        deleted, inserted: (unit, times), the most frequent 20.
    """

    hits: int
    substitutions: int
    deletions: int
    insertions: int
    confused: list[tuple[str, str, int]]
    deleted: list[tuple[str, int]]
    inserted: list[tuple[str, int]]

    def shares(self) -> dict[str, float]:
        """Substitutions, deletions and insertions per unit of the targets."""
        total = max(self.hits + self.substitutions + self.deletions, 1)
        kinds = ("substitutions", "deletions", "insertions")
        return {kind: getattr(self, kind) / total for kind in kinds}


def edit_kinds(targets: Sequence[str], predictions: Sequence[str]) -> EditKinds:
    """Count edits by kind and by unit.

    Of several shortest ways to edit one text into another jiwer takes one: sums are exact, which
    words met each other is as likely as any.

    Args:
        targets: units separated by single spaces, as they are scored.
        predictions: likewise.
    """
    hits = 0
    confused: Counter[tuple[str, str]] = Counter()
    deleted: Counter[str] = Counter()
    inserted: Counter[str] = Counter()
    for target, prediction in zip(targets, predictions, strict=True):
        meant, said = target.split(), prediction.split()
        for chunk in jiwer.process_words(target, prediction).alignments[0]:
            left = meant[chunk.ref_start_idx : chunk.ref_end_idx]
            right = said[chunk.hyp_start_idx : chunk.hyp_end_idx]
            if chunk.type == "equal":
                hits += len(left)
            elif chunk.type == "substitute":
                confused.update(zip(left, right, strict=True))
            elif chunk.type == "delete":
                deleted.update(left)
            else:
                inserted.update(right)
    return EditKinds(
        hits,
        confused.total(),
        deleted.total(),
        inserted.total(),
        [(*pair, times) for pair, times in _frequent(confused)],
        _frequent(deleted),
        _frequent(inserted),
    )


def rates_by(keys: Sequence[Key], edits: EditCounts) -> dict[Key, dict[str, Any]]:
    """Pooled error rate, rows and units of every group of rows; groups are sorted."""
    found = {}
    for key in sorted({*keys}, key=str):
        rows = [row for row, other in enumerate(keys) if other == key]
        some = EditCounts(edits.edits[rows], edits.lengths[rows])
        found[key] = {"rows": len(rows), "units": int(some.lengths.sum()), "rate": some.rate()}
    return found


def length_group(target: str) -> str:
    """Name the group of `LENGTHS` that a plain target belongs to."""
    words = len(target.split())
    for low, high in LENGTHS:
        if words >= low and (high is None or words <= high):
            return f"{low:02d}+" if high is None else f"{low:02d}-{high:02d}"
    return "00"


def details(
    targets: Sequence[str], predictions: Sequence[str], sessions: Sequence[str]
) -> dict[str, Any]:
    """Kinds of edits, and error rates by session and by words per sentence, as JSON values.

    Args:
        targets: words or phonemes separated by single spaces, as they are scored.
        predictions: likewise.
        sessions: of each row.
    """
    edits = count_edits(targets, predictions, "word")
    kinds = edit_kinds(targets, predictions)
    return {
        **asdict(kinds),
        "by_session": rates_by(sessions, edits),
        "by_length": rates_by([length_group(target) for target in targets], edits),
    }


def _frequent(counts: Counter[Any]) -> list[tuple[Any, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN]
