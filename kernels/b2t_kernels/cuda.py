"""What a CUDA tensor runs: the Triton kernels, or blocked torch where they cannot be used."""

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import Tensor

from b2t_kernels import blocked, blocked_beam, blocked_codes, blocked_residual

try:
    from b2t_kernels import beam, draw, nearest, prepare, residual, sums, tuning, usage

    MISSING = ""
except ImportError as error:
    MISSING = str(error)

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
T = TypeVar("T")


@functools.cache
def _say_once(operator: str, why: str) -> None:
    logging.getLogger(__name__).warning("%s runs in blocked torch: %s", operator, why)


def _obstacle_of(device: torch.device) -> str:
    """Why the kernels cannot run on a device; empty if they can."""
    if MISSING:
        return f"Triton cannot be imported ({MISSING})"
    if torch.version.hip is not None:
        return "the kernels were made and compiled for NVIDIA GPUs, not for ROCm"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the GPU's compute capability is {major}.{minor}, the kernels need 8.0"
    return ""


_known_obstacle = functools.cache(_obstacle_of)


def obstacle(*tensors: Tensor, widest: int | None = None) -> str:
    """Why the kernels cannot take these tensors; empty if they can."""
    device = tensors[0].device
    why = _known_obstacle(device) if device.type == "cuda" else _obstacle_of(device)
    if why:
        return why
    for tensor in tensors:
        if tensor.dtype not in FLOATS:
            return f"{tensor.dtype} is not one of float16, bfloat16 and float32"
    if widest is not None and tensors[0].shape[1] > widest:
        return f"rows of {tensors[0].shape[1]} exceed the {widest} that fit on chip"
    return ""


_HERE = contextlib.nullcontext()


def _device_of(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)


def _run(
    operator: str, why: str, device_of: Tensor, kernels: Callable[[], T], otherwise: Callable[[], T]
) -> T:
    """The kernels' answer unless ``why`` names an obstacle or no tile fits the device."""
    with _device_of(device_of):
        if not why:
            try:
                return kernels()
            except tuning.DoesNotFitError as error:
                why = str(error)
        _say_once(operator, why)
        return otherwise()


def prepare_codes(codebooks: Tensor) -> list[list[Tensor]]:
    """See :func:`b2t_kernels.prepare_codes`."""
    if obstacle(codebooks):
        dtype = blocked_codes.working_dtype(codebooks)
        return [list(blocked_codes.centre_codes(book, dtype)) for book in codebooks]
    with _device_of(codebooks):
        made = prepare.prepare(codebooks)
        return [list(each) for each in prepare.layers_of(made)]


def _prepared(codebook: Tensor, given: Sequence[Tensor]) -> "prepare.PreparedCodes":
    """What was given if the kernels made it, else made now."""
    if given and given[0].dtype == torch.float16:
        return prepare.PreparedCodes(*given)
    return prepare.prepare(codebook)


def nearest_code(
    x: Tensor, codebook: Tensor, mask: Tensor | None, exact: bool, given: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """See :func:`b2t_kernels.nearest_code`."""
    return _run(
        "nearest_code",
        obstacle(x, codebook),
        x,
        lambda: nearest.nearest_code(x, codebook, mask, exact, _prepared(codebook, given)),
        lambda: blocked.nearest_code(x, codebook, mask, exact, blocked_codes.centred(given, x)),
    )


def sample_code(
    x: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    row_keys: Tensor,
    code_keys: Tensor,
    given: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """See :func:`b2t_kernels.sample_code`."""
    keys = (temperature, row_keys, code_keys)
    return _run(
        "sample_code",
        obstacle(x, codebook),
        x,
        lambda: draw.sample_code(x, codebook, *keys, _prepared(codebook, given)),
        lambda: blocked.sample_code(x, codebook, *keys, blocked_codes.centred(given, x)),
    )


def beam_codes(
    x: Tensor, codebooks: Sequence[Tensor], width: int, given: Sequence[Sequence[Tensor]] = ()
) -> Tensor:
    """See :func:`b2t_kernels.beam_codes`."""
    why = obstacle(x, *codebooks)
    if not why and width > beam.WIDEST_BEAM:
        why = f"a beam of {width} exceeds the {beam.WIDEST_BEAM} sums that fit on chip"
    entries = given or [()] * len(codebooks)

    def kernels() -> Tensor:
        codes = [_prepared(*pair) for pair in zip(codebooks, entries, strict=True)]
        return beam.beam_codes(x, codebooks, codes, width)

    return _run(
        "beam_codes", why, x, kernels, lambda: blocked_beam.beam_codes(x, codebooks, width, given)
    )


def code_sums(
    x: Tensor, indices: Tensor, K: int, mask: Tensor | None, counts: Tensor | None, atomic: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`b2t_kernels.code_sums`."""
    return _run(
        "code_sums",
        obstacle(x),
        x,
        lambda: sums.code_sums(x, indices, K, mask, counts, atomic),
        lambda: blocked.code_sums(x, indices, K, mask, counts),
    )


def usage_forward(
    x: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    exact: bool | None = None,
    given: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Forward of :func:`b2t_kernels.code_usage`; with ``exact`` not None the search as well."""

    def kernels() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        codes = _prepared(codebook, given)
        total, found = usage.usage_forward(
            x, codebook, temperature, mask, codes, exact is not None, bool(exact)
        )
        counts = found.counts if exact is not None else found.counts[:0]
        return total, found.lse, found.frames, found.indices, counts

    return _run(
        "code_usage",
        obstacle(x, codebook, widest=tuning.WIDEST_USAGE) if not MISSING else obstacle(x),
        x,
        kernels,
        lambda: blocked.usage_forward(
            x, codebook, temperature, mask, blocked_codes.centred(given, x), exact
        ),
    )


def usage_backward(
    grad: Tensor,
    x: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    lse: Tensor,
    wanted: tuple[bool, bool] = (True, True),
    given: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Backward of :func:`b2t_kernels.code_usage`; ``lse`` comes from the same room's forward."""
    return _run(
        "code_usage",
        obstacle(x, codebook, widest=tuning.WIDEST_USAGE) if not MISSING else obstacle(x),
        x,
        lambda: usage.usage_backward(
            grad, x, codebook, temperature, lse, _prepared(codebook, given), wanted
        ),
        lambda: blocked.usage_backward(
            grad, x, codebook, temperature, lse, blocked_codes.centred(given, x), wanted
        ),
    )


def leave(
    left: Tensor, codebook: Tensor, indices: Tensor, gain: Tensor | None, errors: Tensor | None
) -> Tensor:
    """See :func:`b2t_kernels.leave`."""
    return _run(
        "leave",
        obstacle(left, codebook),
        left,
        lambda: residual.leave(left, codebook, indices, gain, errors),
        lambda: blocked_residual.leave(left, codebook, indices, gain, errors),
    )


def sum_codes(codebooks: Tensor, codes: Tensor, gain: Tensor | None) -> Tensor:
    """See :func:`b2t_kernels.sum_codes`."""
    return _run(
        "sum_codes",
        obstacle(codebooks),
        codebooks,
        lambda: residual.sum_codes(codebooks, codes, gain),
        lambda: blocked_residual.sum_codes(codebooks, codes, gain),
    )
