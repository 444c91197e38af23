"""Course of the temperature over training."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "exponential")


def anneal(start: float, end: float, progress: float, schedule: str = "cosine") -> float:
    """Value at ``progress`` in [0, 1] on the way from ``start`` to ``end`` (values outside clamp).

    ``exponential`` is linear in the logarithm and needs two positive ends.
    """
    p = min(1.0, max(0.0, progress))
    if schedule == "cosine":
        return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * p))
    if schedule == "linear":
        return start + (end - start) * p
    if schedule == "exponential":
        return start * (end / start) ** p
    raise ValueError(f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
