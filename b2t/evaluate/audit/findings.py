"""What a check of an audit found."""

from dataclasses import dataclass, field
from typing import Any

NOTE, WARNING, CRITICAL = "note", "warning", "critical"


@dataclass(frozen=True)
class Finding:
    """One thing that a check has looked at.

    Attributes:
        check: name of the check.
        level: `note` (nothing is wrong), `warning` (know it when you read scores) or `critical`
            (scores mean something else than they say).
        text: what was found, in a sentence, and what to do about it.
        numbers: counts and shares behind it.
        examples: rows or sentences that show it.
    """

    check: str
    level: str
    text: str
    numbers: dict[str, Any] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
