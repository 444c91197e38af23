"""Which components of a model have been trained so far."""

from collections.abc import Sequence
from typing import Any

from b2t.model.objectives import WEIGHTED

_HEADS = {
    head: [name for name, loss in WEIGHTED.items() if loss.component == head]
    for head in ("signal_decoder", "phoneme_head", "text_decoder")
}
"""Components that these losses alone reach."""


def trained_components(
    phases: Sequence[Any], phase: int, phase_step: int, before: Sequence[str] = ()
) -> list[str]:
    """Return the components that at least one applied step has trained, sorted.

    Args:
        phases: those of the configuration, in order.
        phase: number of the phase that the run is in, from 0; those before it are done.
        phase_step: applied steps in it.
        before: components that were trained when the run began.
    """
    done = [*phases[:phase], *(phases[phase : phase + 1] if phase_step else ())]
    return sorted(
        {
            name
            for one in done
            for name in one.trainable
            if name not in _HEADS or any(getattr(one.losses, loss) > 0 for loss in _HEADS[name])
        }
        | {*before}
    )
