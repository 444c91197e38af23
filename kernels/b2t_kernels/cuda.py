"""What a CUDA tensor runs: the Triton kernels, or blocked torch where they cannot be used."""

import contextlib
import functools
import logging
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from b2t_kernels import blocked

try:
    from b2t_kernels import nearest, rvq, sums, tuning, usage

    MISSING = ""
except ImportError as error:
    MISSING = str(error)

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def _say_once(operator: str, why: str) -> None:
    logging.getLogger(__name__).warning("%s runs in blocked torch: %s", operator, why)


def obstacle(*tensors: Tensor, widest: int | None = None) -> str:
    """Why the kernels cannot take these tensors; empty if they can."""
    if MISSING:
        return f"Triton cannot be imported ({MISSING})"
    major, minor = torch.cuda.get_device_capability(tensors[0].device)
    if major < 8:
        return f"the GPU's compute capability is {major}.{minor}, the kernels need 8.0"
    for tensor in tensors:
        if tensor.dtype not in FLOATS:
            return f"{tensor.dtype} is not one of float16, bfloat16 and float32"
    if widest is not None and tensors[0].shape[1] > widest:
        return f"rows of {tensors[0].shape[1]} exceed the {widest} that fit on chip"
    return ""


def _usable(operator: str, *tensors: Tensor, widest: int | None = None) -> bool:
    why = obstacle(*tensors, widest=widest)
    if why:
        _say_once(operator, why)
    return not why


def _device_of(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def nearest_code(
    x: Tensor, codebook: Tensor, mask: Tensor | None, exact: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`b2t_kernels.nearest_code`."""
    room = nearest if _usable("nearest_code", x, codebook) else blocked
    with _device_of(x):
        return room.nearest_code(x, codebook, mask, exact)


def rvq_encode(
    x: Tensor, codebooks: Tensor, mask: Tensor | None, exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`b2t_kernels.rvq_encode`."""
    room = rvq if _usable("rvq_encode", x, codebooks) else blocked
    with _device_of(x):
        return room.rvq_encode(x, codebooks, mask, exact)


def code_sums(
    x: Tensor, indices: Tensor, K: int, mask: Tensor | None, atomic: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`b2t_kernels.code_sums`."""
    if _usable("code_sums", x):
        with _device_of(x):
            return sums.code_sums(x, indices, K, mask, atomic)
    return blocked.code_sums(x, indices, K, mask)


def usage_forward(
    x: Tensor, codebook: Tensor, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward of :func:`b2t_kernels.code_usage`."""
    room = usage if _usable("code_usage", x, codebook, widest=tuning.WIDEST_USAGE) else blocked
    with _device_of(x):
        return room.usage_forward(x, codebook, temperature, mask)


def usage_backward(
    grad: Tensor, x: Tensor, codebook: Tensor, temperature: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Backward of :func:`b2t_kernels.code_usage`; ``lse`` comes from the same room's forward."""
    room = usage if _usable("code_usage", x, codebook, widest=tuning.WIDEST_USAGE) else blocked
    with _device_of(x):
        return room.usage_backward(grad, x, codebook, temperature, lse)
