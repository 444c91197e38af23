"""Codebook statistics on their way to the other ranks, while this one goes on."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from b2t.quantize.distributed import PendingHalf, PendingSum, message_sizes
from b2t.quantize.options import QuantizerOptions
from b2t.quantize.statistics import QuantizerStats


class PendingStats:
    """Statistics of this rank, being summed over all: one collective for all layers.

    With `half_width_sums` the sums of frames go apart, in bfloat16, and all else stays exact. Two
    collectives carry them (`PendingHalf`).

    Args:
        local: those of this rank's micro-batches, added.
        options: of the quantizer.
        group: ranks of the global batch.
    """

    def __init__(
        self, local: QuantizerStats, options: QuantizerOptions, group: ProcessGroup | None
    ) -> None:
        self.local = local
        parts = sent_tensors(local, options)
        sums = parts.pop("sums", None) if options.half_width_sums else None
        self._names = list(parts)
        self._rest = PendingSum(list(parts.values()), group)
        self._half = None if sums is None else PendingHalf(sums, group)

    def wait(self) -> QuantizerStats:
        """Return the sums over all ranks, the same on each; the pool stays this rank's own."""
        summed: dict[str, Any] = dict(zip(self._names, self._rest.wait(), strict=True))
        if self._half is not None:
            summed["sums"] = self._half.wait()
        return dataclasses.replace(self.local, **summed)


def sent_tensors(stats: QuantizerStats, options: QuantizerOptions) -> dict[str, Tensor]:
    """What of ``stats`` the update needs from all ranks: under the gradient rule no sums."""
    parts = stats.tensors()
    if options.update_rule != "ema":
        parts.pop("sums", None)
    return parts


def sent_bytes(stats: QuantizerStats, options: QuantizerOptions, ranks: int) -> list[int]:
    """Bytes of each collective that `PendingStats` takes on several ranks."""
    parts = sent_tensors(stats, options)
    half = parts.pop("sums", None) if options.half_width_sums else None
    sizes = message_sizes(list(parts.values()))
    if half is None:
        return sizes
    padded = 2 * ranks * -(-half.numel() // ranks)
    return [*sizes, padded, padded]


Begun = QuantizerStats | PendingStats
"""Statistics that `ResidualVQ.update` takes: this rank's, or on their way to all."""
