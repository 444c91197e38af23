"""What a check of an audit found."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

NOTE, WARNING, CRITICAL = "note", "warning", "critical"
LEVELS = (NOTE, WARNING, CRITICAL)


@dataclass(frozen=True)
class Finding:
    """One thing that a check has looked at.

    Attributes:
        check: name of the check.
        level: `note` (nothing is wrong), `warning` (know it when you read scores) or `critical`
            (training would fail, or scores mean something else than they say).
        text: what was found, in a sentence.
        numbers: counts and shares behind it; `places` lists sessions, channels and trials.
        examples: rows, channels or sentences that show it.
        remedy: what to do about it.
    """

    check: str
    level: str
    text: str
    numbers: dict[str, Any] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    remedy: str = ""


def worst(findings: Iterable[Finding]) -> str:
    """Return the worst level among ``findings``."""
    return max((finding.level for finding in findings), key=LEVELS.index, default=NOTE)


def listed(names: Sequence[str], most: int = 6) -> str:
    """Name the first few."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
