"""What changes from step to step by a rule: the temperature, and how many layers train."""

from __future__ import annotations

import math

import torch

from b2t.quantize.frame_hash import signed64


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
    raise ValueError(f"unknown schedule {schedule!r}; choose cosine, linear or exponential")


def drawn_layers(lowest: int, highest: int, seed: int, update: int) -> int:
    """Number of layers of a step under quantize dropout, the same on all ranks.

    Args:
        lowest: fewest layers.
        highest: most layers.
        seed: of the quantizer.
        update: updates so far.
    """
    generator = torch.Generator().manual_seed(signed64(seed * 7_919 + update))
    return int(torch.randint(lowest, highest + 1, (1,), generator=generator))
