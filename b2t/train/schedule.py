"""Learning rates: linear warm-up from zero, then a cosine, linear or constant course."""

import math

from b2t.config import PhaseConfig


def lr_factor(step: int, phase: PhaseConfig) -> float:
    """Factor on the peak learning rate for the update that follows `step` applied ones."""
    if step < phase.warmup_steps:
        return (step + 1) / phase.warmup_steps
    if phase.schedule == "constant":
        return 1.0
    span = max(1, phase.steps - phase.warmup_steps)
    done = min(1.0, (step - phase.warmup_steps) / span)
    course = 0.5 * (1 + math.cos(math.pi * done)) if phase.schedule == "cosine" else 1 - done
    return phase.min_lr_fraction + (1 - phase.min_lr_fraction) * course
