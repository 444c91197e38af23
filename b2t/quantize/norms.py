"""What the losses of an optimizer step are divided by, the same in each of its forwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from b2t.quantize.statistics import SoftUsage

Number = Tensor | float


@dataclass(frozen=True)
class StepNorms:
    """Normalisers of one optimizer step, of all its micro-batches on all ranks.

    With them the mean of a loss over micro-batches and ranks is the loss of the global batch.

    Args:
        counts: elements by name, per micro-batch and rank on average: what sums of losses are
            divided by. `ResidualVQ` reads ``frames``, `BrainToText` all that
            `b2t.model.objectives.Count` names. None divides by what a forward counts itself.
        usage: soft usage of the whole step (`ResidualVQ.soft_usage`), which makes diversity and
            perplexity exact over micro-batches. None takes each micro-batch for the whole step.
        micro_batches: forwards of the step on each rank; needed with ``usage``.
    """

    counts: Mapping[str, Number] | None = None
    usage: SoftUsage | None = None
    micro_batches: int = 1

    def count(self, name: str, own: Number | None = None) -> Number:
        """Divisor of a sum over ``name``.

        Args:
            name: of the elements.
            own: what a forward counted itself, for a step that counted nothing.

        Raises:
            ValueError: neither has been counted.
        """
        found = own if self.counts is None else self.counts[name]
        if found is None:
            raise ValueError(f"nobody has counted {name}")
        return found
