"""Learning rates: linear warm-up from zero, then a cosine, linear or constant course."""

import math

from b2t.config import PhaseConfig


def shortened_warmup(warmup: int, steps: int) -> int:
    """Return a warm-up that fits a phase: one longer than its steps becomes a tenth of them.

    Whoever cuts a phase short for a trial wants to see it learn: at `phases.0.steps=200`, a warm-up
    of 2,000 steps would end at a tenth of the learning rate.
    """
    return warmup if warmup <= steps else max(1, steps // 10)


def lr_factor(
    step: int, phase: PhaseConfig, component: str | None = None, time_done: float = 0.0
) -> float:
    """Factor on the peak learning rate for the update that follows `step` applied ones.

    Where a greater share of the phase's minutes than of its steps is over (`time_done`), the course
    after warm-up follows the minutes.

    A component has the phase's warm-up and course where it has none of its own. A warm-up longer
    than the phase is shortened.
    """
    warmup = (phase.component_warmup_steps or {}).get(component, phase.warmup_steps)  # type: ignore[call-overload]  # any name may be asked for
    warmup = shortened_warmup(warmup, phase.steps)
    schedule = (phase.component_schedule or {}).get(component, phase.schedule)  # type: ignore[call-overload]  # as above
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    span = max(1, phase.steps - warmup)
    done = min(1.0, max((step - warmup) / span, time_done))
    course = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return phase.min_lr_fraction + (1 - phase.min_lr_fraction) * course
