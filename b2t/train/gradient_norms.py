"""Gradient norms by component under ZeRO, before clipping and without the loss scale."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

_GROUP_NORMS = ("get_grad_norm_direct", "complete_grad_norm_calculation_for_cpu_offload")


class GradientNorms:
    """Keeps the norms that ZeRO-1 and ZeRO-2 compute per parameter group on their way to the total.

    Each is already summed over ranks, so that nothing is added to a step: neither a collective
    nor a wait for the device. A skipped step leaves the norms of the last applied one.

    Args:
        optimizer: DeepSpeed's ZeRO-1 or ZeRO-2 optimizer; of another one nothing is known.
        names: names of its parameter groups; what stands before a `/` is the component.
    """

    def __init__(self, optimizer: Any, names: Sequence[str]) -> None:
        self._names = [name.split("/")[0] for name in names]
        self._optimizer = optimizer
        self._squares: dict[str, Tensor] = {}
        self._scale = 1.0
        self._groups: list[Tensor] = []
        if hasattr(optimizer, "scaled_global_norm"):
            self._combine = optimizer.scaled_global_norm
            optimizer.scaled_global_norm = self._combined
            for method in _GROUP_NORMS:
                if hasattr(optimizer, method):
                    setattr(optimizer, method, self._recorded(getattr(optimizer, method)))

    def norms(self) -> dict[str, Tensor]:
        """Return the norm of each component, 0-d, of the last step whose gradients were finite."""
        return {name: square.sqrt() / self._scale for name, square in self._squares.items()}

    def _recorded(self, compute: Any) -> Any:
        def norm(*args: Any, **kwargs: Any) -> Any:
            found = compute(*args, **kwargs)
            self._groups.append(found)
            return found

        return norm

    def _combined(self, *args: Any, **kwargs: Any) -> Any:
        self._groups = []
        total = self._combine(*args, **kwargs)
        if len(self._groups) == len(self._names):
            self._scale = float(self._optimizer.loss_scale)
            self._squares = {}
            for name, group in zip(self._names, self._groups, strict=True):
                square = group.detach().double().square()
                self._squares[name] = self._squares.get(name, 0.0) + square
        return total
