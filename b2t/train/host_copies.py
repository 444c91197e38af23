"""Copies of tensors in host memory that is kept and used again."""

from collections.abc import Mapping

import torch
from torch import Tensor


class HostCopies:
    """Copies tensors to the CPU, pinned where they come from a GPU.

    What `take` returned is overwritten by the next call.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies by name; all of them are there on return."""
        devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        copies = {}
        for name, tensor in tensors.items():
            kept = self._kept.get(name)
            if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
                kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._kept[name] = kept
            copies[name] = kept.copy_(tensor.detach(), non_blocking=True)
        for device in devices:
            torch.cuda.synchronize(device)
        return copies
