"""Gradient norms by component under ZeRO, before clipping and without the loss scale."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class GradientNorms:
    """Computes the global norm for ZeRO-1 and ZeRO-2, and keeps what each component has in it.

    DeepSpeed asks for the norm of each parameter group in turn, one collective and one check after
    the other. Here the squares of all groups are summed over ranks at once. With CPU offload,
    where DeepSpeed adds up norms while it copies gradients, and under ZeRO-3 its own norms of
    groups are listened to. In all cases a skipped step leaves the norms of the last applied one.

    Args:
        optimizer: DeepSpeed's ZeRO optimizer; of another one nothing is known.
        names: names of its parameter groups (sub-groups under ZeRO-3); what stands before a `/`
            is the component.
    """

    def __init__(self, optimizer: Any, names: Sequence[str]) -> None:
        groups = [name.split("/")[0] for name in names]
        self._names = list(dict.fromkeys(groups))
        self._component = torch.tensor([self._names.index(name) for name in groups])
        self._optimizer = optimizer
        self._squares: Tensor | None = None
        self._groups: list[Tensor] = []
        if hasattr(optimizer, "_get_norm_groups"):
            self._all_groups = optimizer._get_norm_groups
            optimizer._get_norm_groups = self._listen_to_all
        if not hasattr(optimizer, "scaled_global_norm"):
            return
        if optimizer.cpu_offload:
            self._combine = optimizer.scaled_global_norm
            self._group = optimizer.complete_grad_norm_calculation_for_cpu_offload
            optimizer.complete_grad_norm_calculation_for_cpu_offload = self._listen
            optimizer.scaled_global_norm = self._combined
        else:
            optimizer.scaled_global_norm = self._global_norm

    def norms(self) -> dict[str, Tensor]:
        """Return the norm of each component, 0-d, of the last step whose gradients were finite."""
        if self._squares is None:
            return {}
        # Kept there: each copy from the host would wait for the device.
        self._component = self._component.to(self._squares.device)
        sums = self._squares.new_zeros(len(self._names))
        sums.index_add_(0, self._component, self._squares)
        return dict(zip(self._names, sums.sqrt().unbind(), strict=True))

    def _global_norm(self, norm_type: int = 2) -> Tensor:
        """Return the norm of all gradients times the loss scale, infinite where one is not finite.

        Stands in for `DeepSpeedZeroOptimizer.scaled_global_norm`, which gives the same number.
        """
        if norm_type != 2:
            raise ValueError(f"norm of order {norm_type}, expected 2")
        zero = self._optimizer
        squares = torch.stack(
            [sum_of_squares(zero.averaged_gradients[i]) for i in range(len(zero.bit16_groups))]
        )
        if dist.get_world_size(zero.dp_process_group) > 1:
            dist.all_reduce(squares, group=zero.dp_process_group)
        return self.take(squares)

    def take(self, squares: Tensor) -> Tensor:
        """Keep a step's sums of squares of each group; return the norm of all, as above."""
        total = squares.sum().sqrt().float()
        self._keep(squares, total.isfinite())
        return torch.where(total.isfinite(), total, torch.inf)

    def _keep(self, squares: Tensor, finite: Tensor) -> None:
        """Take over the squares of a step, but not of one that will be skipped."""
        before = torch.zeros_like(squares) if self._squares is None else self._squares
        unscaled = squares / float(getattr(self._optimizer, "loss_scale", 1.0)) ** 2
        self._squares = torch.where(finite, unscaled, before)

    def _listen(self, *args: Any, **kwargs: Any) -> Any:
        norm = self._group(*args, **kwargs)
        self._groups.append(torch.as_tensor(norm).detach().double())
        return norm

    def _combined(self, *args: Any, **kwargs: Any) -> Any:
        self._groups = []
        total = self._combine(*args, **kwargs)
        if len(self._groups) == len(self._component):
            self._keep(torch.stack(self._groups).square(), torch.as_tensor(total).isfinite())
        return total

    def _listen_to_all(self) -> Any:
        norms = self._all_groups()
        found = torch.stack([torch.as_tensor(norm).detach().double() for norm in norms])
        # DeepSpeed says -1 where a norm is not finite.
        self._keep(found.square(), (found >= 0).all())
        return norms


def sum_of_squares(gradients: list[Tensor]) -> Tensor:
    """Σ of squares over tensors, 0-d float64, which no fp16 or float32 gradients overflow."""
    return torch.stack(torch._foreach_norm(gradients, 2, torch.float64)).square().sum()
