"""Search and sums as public operators, registered with torch for CPU, CUDA and shape propagation.

Letters: N frames, K codes, D width, Q quantizers. Each operator is a torch custom op, so that it
works under autograd, ``torch.compile`` and activation checkpointing; the device of x chooses the
implementation: Triton on CUDA, blocked torch elsewhere.
"""

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor

from b2t_kernels import blocked, blocked_beam, blocked_codes, blocked_residual, cuda
from b2t_kernels.checks import check_devices, check_precision, check_rows, check_search

Precision = Literal["fast", "exact"]
Prepared = Sequence[Tensor]
_AS_IT_IS = contextlib.nullcontext()


@torch.no_grad()
def prepare_codes(codebooks: Tensor) -> list[list[Tensor]]:
    """What every operator makes of a codebook before it starts, for each of codebooks [Q, K, D].

    Give an entry as ``prepared`` to all calls that use the codebook as long as it stays the same:
    a few launches on a GPU, or a sort of its codes on a CPU, are then saved in each. The entries
    mean nothing to anyone else. On a CPU, beams keep up to 34 MB of products of codes with them.

    Raises:
        ValueError: shapes do not fit.
    """
    if codebooks.ndim != 3 or 0 in codebooks.shape:
        raise ValueError(f"expected codebooks [Q, K, D], found {list(codebooks.shape)}")
    codebooks = codebooks.detach()
    if codebooks.is_cuda:
        return cuda.prepare_codes(codebooks)
    dtype = blocked_codes.working_dtype(codebooks)
    return [list(blocked_codes.centre_codes(book, dtype)) for book in codebooks]


@torch.library.custom_op("b2t_kernels::nearest_code", mutates_args=(), device_types="cpu")
def _nearest_code(
    x: Tensor, codebook: Tensor, mask: Tensor | None, exact: bool, prepared: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    return blocked.nearest_code(x, codebook, mask, exact, blocked_codes.centred(prepared, x))


@_nearest_code.register_kernel("cuda")
def _(
    x: Tensor, codebook: Tensor, mask: Tensor | None, exact: bool, prepared: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    return cuda.nearest_code(x, codebook, mask, exact, prepared)


@_nearest_code.register_fake
def _(
    x: Tensor, codebook: Tensor, mask: Tensor | None, exact: bool, prepared: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape[0], dtype=torch.int64),
        x.new_empty(codebook.shape[0], dtype=torch.int64),
    )


def nearest_code(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None = None,
    precision: Precision = "fast",
    prepared: Prepared = (),
) -> tuple[Tensor, Tensor]:
    """Nearest code of every row by Euclidean distance, and how often each code was chosen.

    The N × K distances are never stored: argmax_k x·c_k − ½|c_k|² is kept as codes stream by.
    Ties go to the lowest index. Not differentiable.

    Args:
        x: [N, D] rows, any floating dtype.
        codebook: [K, D] codes. A code that is not finite is never chosen.
        mask: [N] bool, True = real; None means all.
        precision: "fast" scores once (float32 on CPU, fp16 tensor cores on centred data on a GPU).
            "exact" gives the float64 answer: rows whose best two scores lie within a proven bound
            of each other are scored again.
        prepared: the codebook's entry of :func:`prepare_codes`.

    Returns:
        indices [N] int64, −1 where masked or not finite, and counts [K] int64 of the others.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    exact = check_precision(precision)
    check_search(x, codebook, mask)
    if undispatched(x):
        with without_gradient():
            return cuda.nearest_code(x, codebook, mask, exact, prepared)
    return _nearest_code(x, codebook, mask, exact, list(prepared))


def undispatched(x: Tensor) -> bool:
    """Whether to run on a GPU at once: torch's dispatcher takes the host longer than the kernels.

    It is needed where something watches it, such as ``torch.compile`` or a tensor of no data.
    """
    return (
        x.is_cuda
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def without_gradient() -> AbstractContextManager:
    """`torch.no_grad`, which takes microseconds, where it changes something."""
    return torch.no_grad() if torch.is_grad_enabled() else _AS_IT_IS


def on_device(number: float | Tensor, x: Tensor) -> Tensor:
    """A float32 scalar [] beside x. A number is filled in there: no copy breaks a CUDA graph."""
    if isinstance(number, Tensor):
        return number.to(x.device, torch.float32)
    return torch.full((), number, dtype=torch.float32, device=x.device)


@torch.no_grad()
def sample_code(
    x: Tensor,
    codebook: Tensor,
    temperature: float | Tensor,
    row_keys: Tensor,
    code_keys: Tensor,
    prepared: Prepared = (),
) -> tuple[Tensor, Tensor]:
    """Draw a code for each row with probability softmax_k(−|x_n − c_k|² / temperature).

    By the Gumbel-max trick, with the noise of :func:`b2t_kernels.gumbel.noise`: a row's draw is a
    function of the row, its key and the codebook alone, wherever and beside whatever it is drawn.

    Args:
        x: [N, D] rows.
        codebook: [K, D] codes. A code that is not finite is never drawn.
        temperature: positive, in units of squared distance.
        row_keys: [N] int64, random numbers of the rows.
        code_keys: [K] int64, others of the codes.
        prepared: the codebook's entry of :func:`prepare_codes`.

    Returns:
        indices [N] int64, −1 where a row is not finite, and counts [K] int64 of the others.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    check_search(x, codebook, None)
    check_rows("row_keys", row_keys, x, torch.int64)
    check_rows("code_keys", code_keys, codebook, torch.int64)
    scale = on_device(temperature, x)
    if x.is_cuda:
        return cuda.sample_code(x, codebook, scale, row_keys, code_keys, prepared)
    return blocked.sample_code(
        x, codebook, scale, row_keys, code_keys, blocked_codes.centred(prepared, x)
    )


@torch.no_grad()
def beam_codes(
    x: Tensor, codebooks: Sequence[Tensor], width: int, prepared: Sequence[Prepared] = ()
) -> Tensor:
    """Codes of each row whose sum is the nearest that a beam search over the layers finds.

    Layer by layer, the ``width`` sums nearest to each row go on, and the nearest of the last is
    taken. Candidates are compared in float64, the lower sum and code first among equals, so that a
    row's codes do not depend on the rows beside it or on an offset. As in additive quantization
    (Babenko & Lempitsky 2014) and faiss's ResidualQuantizer. Memory is O(N + K·D), time ``width``
    times that of the nearest codes and more.

    Args:
        x: [N, D] finite rows.
        codebooks: Q of [K, D] float32, in the order of the layers. A code that is not finite is
            never chosen, nor one that an earlier code of its layer equals.
        width: sums kept.
        prepared: entries of :func:`prepare_codes`, one for each layer.

    Returns:
        [N, Q] int64.

    Raises:
        ValueError: shapes or devices do not fit, or the width is not positive.
    """
    if width < 1 or not codebooks:
        raise ValueError(f"a beam of {width} over {len(codebooks)} layers searches nothing")
    for codebook in codebooks:
        check_search(x, codebook, None)
    if x.is_cuda:
        return cuda.beam_codes(x, codebooks, width, prepared)
    return blocked_beam.beam_codes(x, codebooks, width, prepared)


@torch.library.custom_op("b2t_kernels::code_sums", mutates_args=(), device_types="cpu")
def _code_sums(
    x: Tensor, indices: Tensor, K: int, mask: Tensor | None, counts: Tensor | None, atomic: bool
) -> tuple[Tensor, Tensor]:
    return blocked.code_sums(x, indices, K, mask, counts)


@_code_sums.register_kernel("cuda")
def _(
    x: Tensor, indices: Tensor, K: int, mask: Tensor | None, counts: Tensor | None, atomic: bool
) -> tuple[Tensor, Tensor]:
    return cuda.code_sums(x, indices, K, mask, counts, atomic)


@_code_sums.register_fake
def _(
    x: Tensor, indices: Tensor, K: int, mask: Tensor | None, counts: Tensor | None, atomic: bool
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(K, x.shape[1], dtype=blocked_codes.working_dtype(x)),
        x.new_empty(K, dtype=torch.int64),
    )


def code_sums(
    x: Tensor,
    indices: Tensor,
    K: int,
    mask: Tensor | None = None,
    method: Literal["sorted", "atomic"] = "sorted",
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of the rows that chose each code, and their number: what an EMA update needs.

    Args:
        x: [N, D] rows.
        indices: [N] int64, as from :func:`nearest_code`; what lies outside 0..K−1 is left out.
        K: number of codes.
        mask: [N] bool, True = real.
        method: "sorted" adds the rows of a code in their own order, so that the same input gives
            the same bits; "atomic" is faster on a GPU and rounds differently from run to run. On a
            CPU both are the sorted sum.
        counts: [K] int64, what the search counted with these indices; they are not counted again.
            Without a mask only.

    Returns:
        sums [K, D] float32 and counts [K] int64. A row that is not finite enters the sums unless
        its index is −1.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    if x.ndim != 2:
        raise ValueError(f"expected x [N, D], found {list(x.shape)}")
    if method not in ("sorted", "atomic"):
        raise ValueError(f"method is 'sorted' or 'atomic', found {method!r}")
    check_rows("indices", indices, x, torch.int64)
    check_rows("mask", mask, x, torch.bool)
    if counts is not None:
        if mask is not None or counts.shape != (K,) or counts.dtype != torch.int64:
            raise ValueError(
                f"expected counts [{K}] torch.int64 and no mask, found {list(counts.shape)} "
                f"{counts.dtype} and {'a' if mask is not None else 'no'} mask"
            )
        check_devices(x, counts=counts)
    if undispatched(x):
        with without_gradient():
            return cuda.code_sums(x, indices, K, mask, counts, method == "atomic")
    return _code_sums(x, indices, K, mask, counts, method == "atomic")


@torch.no_grad()
def leave(
    residual: Tensor,
    codebook: Tensor,
    indices: Tensor,
    gain: Tensor | None = None,
    errors: Tensor | None = None,
) -> Tensor:
    """Take the chosen codes from the residual, in place: the step from one layer to the next.

    residual ← residual − gain · codebook[indices], then errors ← errors + residual.

    Args:
        residual: [N, D] float32.
        codebook: [K, D] float32.
        indices: [N] int64; −1 takes nothing.
        gain: [] length of the codes where they are unit vectors.
        errors: [N, D] float32, the sum over layers of what each leaves.

    Returns:
        Σ residual² [] of the new residual.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    check_search(residual, codebook, None)
    check_rows("indices", indices, residual, torch.int64)
    if errors is not None and errors.shape != residual.shape:
        raise ValueError(f"expected errors {list(residual.shape)}, found {list(errors.shape)}")
    room = cuda if residual.is_cuda else blocked_residual
    return room.leave(residual, codebook, indices, gain, errors)


@torch.no_grad()
def sum_codes(codebooks: Tensor, codes: Tensor, gain: Tensor | None = None) -> Tensor:
    """Σ_q gain_q · codebooks_q[codes_q], [N, D] float32, added in the order of the layers.

    Args:
        codebooks: [L, K, D] float32, L ≥ Q, or 1 where the layers share one.
        codes: [N, Q] int64; −1 adds nothing.
        gain: [L] lengths of the codes where they are unit vectors.

    Raises:
        ValueError: shapes or devices do not fit.
    """
    if codebooks.ndim != 3 or codes.ndim != 2 or 1 != len(codebooks) < codes.shape[1]:
        raise ValueError(
            f"expected codebooks [Q or more or 1, K, D] and codes [N, Q], found "
            f"{list(codebooks.shape)} and {list(codes.shape)}"
        )
    check_devices(codebooks, codes=codes)
    room = cuda if codes.is_cuda else blocked_residual
    return room.sum_codes(codebooks, codes, gain)
