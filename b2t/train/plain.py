"""One rank in float32: DeepSpeed's engine without ZeRO, which has nothing to share there.

On one rank ZeRO still copies each gradient into a bucket, out of it and into a flat vector, and
steps a second copy of the weights. Here the optimizer steps the module's own weights along their
own gradients: the same arithmetic, and checkpoints that any number of ranks continues.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from b2t.config import OptimConfig
from b2t.train.ds_config import DeepSpeedFile
from b2t.train.engine import PhaseEngine
from b2t.train.gather import Part
from b2t.train.gradient_norms import sum_of_squares


def without_needless_zero(ds_file: DeepSpeedFile, optim: OptimConfig, world: int) -> DeepSpeedFile:
    """Return the file as it is used by ``world`` ranks: with stage 0 where ZeRO shares nothing.

    Not in 16 bit, where ZeRO keeps the float32 masters, nor with offload, nor where
    `optim.zero_on_one_rank` asks for ZeRO.
    """
    needed = world > 1 or ds_file.precision != "fp32" or ds_file.offload or optim.zero_on_one_rank
    return ds_file if needed else replace(ds_file, zero_stage=0)


class SkippingAdamW(torch.optim.AdamW):
    """AdamW that leaves a step out while ``overflow`` is set, which DeepSpeed asks for."""

    overflow = False

    def step(self, closure: Any = None) -> Any:
        """Move the weights along their gradients, unless these are not finite."""
        return None if self.overflow else super().step(closure)


class PlainEngine(PhaseEngine):
    """A `PhaseEngine` of one rank in float32, whose masters are the module's weights."""

    _adamw = SkippingAdamW

    def __init__(self, model: nn.Module, *arguments: Any) -> None:
        super().__init__(model, *arguments)
        self._engine.enable_backward_allreduce = False  # which copies, with nobody to add to
        self._engine.clip_fp32_gradients = self._clip

    def flat_masters(self) -> list[Tensor]:
        """Return the weights, flat, one a parameter."""
        return [parameter.detach().view(-1) for _, parameter in self._trained()]

    def read(self, parameter: nn.Parameter) -> Tensor:
        """Return a copy of a weight."""
        return parameter.detach().clone()

    def write(self, parameter: nn.Parameter, value: Tensor, moment: str | None = None) -> None:
        """Replace a weight, or one of its moments."""
        target = parameter.detach() if moment is None else self._adam.state[parameter][moment]
        target.copy_(value)

    @property
    def _adam(self) -> Any:
        return self._engine.optimizer

    def _stepped(self) -> list[Tensor]:
        return [parameter for _, parameter in self._trained()]

    def _link_moments(self) -> None:
        """Do nothing: a weight's moments are found by the weight."""

    def _parts(self) -> Iterator[Part]:
        for number, (name, parameter) in enumerate(self._trained()):
            yield Part(name, number, 0, 0, parameter.numel())

    @torch.no_grad()
    def _clip(self) -> None:
        """Scale all gradients to the largest norm, keep their norms, and skip what is not finite.

        All as ZeRO does; so a weight without a gradient gets one of zeros: it decays, and its
        moments fade.
        """
        groups = [group["params"] for group in self._engine.optimizer.param_groups]
        for parameter in (p for group in groups for p in group):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [[p.grad for p in group] for group in groups]
        squares = torch.stack([sum_of_squares(group) for group in gradients])
        norm = self._norms.take(squares)
        self._engine._global_grad_norm = norm
        self._adam.overflow = not bool(norm.isfinite())
        if self._adam.overflow:
            names = [group["name"].split("/")[0] for group in self._adam.param_groups]
            finite = squares.isfinite().tolist()
            self.overflowed = sorted({n for n, good in zip(names, finite, strict=True) if not good})
            return
        scale = 1.0 / ((norm + 1e-6) / self.ds_file.clipping).clamp(min=1.0)
        torch._foreach_mul_([g for group in gradients for g in group], scale)
