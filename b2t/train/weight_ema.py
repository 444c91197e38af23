"""A running average of the weights for evaluation, spread over ranks as the masters are."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from b2t.train.engine import PhaseEngine

_CODEBOOKS = "quantizer.codebooks."
"""Codes belong to the latents of the current weights and have their own averages."""


class WeightEma:
    """Exponential moving average of the float32 masters that a phase trains.

    average ← d · average + (1 − d) · master after each applied step, with
    d = min(decay, (1 + t) / (10 + t)) after t applied steps of the run. Frozen weights are used as
    they are.

    Args:
        engine: the phase's engine.
        decay: d once it has settled.
        averages: averages to continue from, by name; other weights start at their masters.
    """

    def __init__(self, engine: PhaseEngine, decay: float, averages: Mapping[str, Tensor]) -> None:
        self.engine = engine
        self.decay = decay
        own = [flat.detach().clone() for flat in engine.flat_masters()]
        known = {n: averages.get(n, engine.masters[n]) for n in engine.trained_names()}
        engine.write_masters(known)
        self._shards = [flat.detach().clone() for flat in engine.flat_masters()]
        with torch.no_grad():
            for flat, master in zip(engine.flat_masters(), own, strict=True):
                flat.copy_(master)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` applied steps of the run."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for shard, flat in zip(self._shards, self.engine.flat_masters(), strict=True):
            shard.lerp_(flat, 1 - decay)

    @torch.no_grad()
    def collect(self) -> dict[str, Tensor]:
        """Return the averages of the trained weights, whole, float32, on the CPU. Collective."""
        flats = self.engine.flat_masters()
        masters = [flat.detach().clone() for flat in flats]
        for flat, shard in zip(flats, self._shards, strict=True):
            flat.copy_(shard)
        try:
            averages = self.engine.read_masters()
        finally:
            for flat, master in zip(flats, masters, strict=True):
                flat.copy_(master)
        return {n: value for n, value in averages.items() if not n.startswith(_CODEBOOKS)}

    def gather(self) -> dict[str, Tensor]:
        """Return what `collect` does on rank 0 alone, nothing elsewhere. Collective.

        In memory that the next call uses again.
        """
        averages = self.engine.gather(self._shards, "averages")
        return {n: value for n, value in averages.items() if not n.startswith(_CODEBOOKS)}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Lend the averages to the model, for evaluation. Collective."""
        averages = self.collect()
        own = {n: p.data for n, p in self.engine.model.named_parameters() if n in averages}
        for name, parameter in self.engine.model.named_parameters():
            if name in averages:
                parameter.data = averages[name].to(parameter.device, parameter.dtype)
        try:
            yield
        finally:
            for name, parameter in self.engine.model.named_parameters():
                if name in own:
                    parameter.data = own[name]
