"""Spans of a trial that are hidden from the encoder, which is to tell what was there."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from b2t.data.augment import row_generator
from b2t.options import Options, PositiveInt


class MaskingOptions(Options):
    """What the loss `masked` hides of each trial."""

    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Share of the spans that are hidden."""
    span: PositiveInt = 2
    """Patches of a span: one alone is easily guessed from its neighbours."""


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Hides whole patches of trials, a function of the seed, the row and the time it is read.

    Source of the task: masked modelling of neural activity by Ye & Pandarinath 2021 (Neural Data
    Transformers, doi 10.1101/2021.01.16.426955), which hides bins as zeros too.

    Args:
        patch_stride: bins from one patch to the next: hidden spans begin and end with patches.
        fraction: share of the spans of a trial that are hidden; at least one stays, and of a trial
            of one span none is hidden.
        span: patches of a span.
    """

    patch_stride: int
    fraction: float = 0.4
    span: int = 2

    def __call__(self, mask: np.ndarray, seed: int, phase: int, epoch: int, row: str) -> np.ndarray:
        """Choose the hidden bins [T] bool of a trial whose recorded bins are ``mask`` [T] bool."""
        length = self.patch_stride * self.span
        spans = np.unique(np.flatnonzero(mask) // length)
        count = min(max(round(self.fraction * len(spans)), 1), len(spans) - 1)
        hidden = np.zeros(len(mask), bool)
        if count < 1:
            return hidden
        generator = row_generator(seed, phase, epoch, f"hidden {row}")
        for first in generator.choice(spans, count, replace=False) * length:
            hidden[first : first + length] = True
        return hidden & mask
