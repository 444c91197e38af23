"""The quantizer's hot path, on the kernels or on their naive references."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

import b2t_kernels
from b2t.quantize.frame_hash import code_keys
from b2t_kernels import reference

BACKENDS = ("kernels", "reference")


def nearest(
    x: Tensor, codebook: Tensor, backend: str = "kernels", prepared: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """Nearest code of each frame of ``x`` [N, D] in ``codebook`` [K, D], and their counts.

    The exact answer, so that a frame's code does not depend on the frames beside it, on a common
    offset, or on how a batch is spread over ranks.

    Returns:
        codes [N] int64 and counts [K] int64.
    """
    if backend == "reference":
        return reference.nearest_code(x, codebook)
    return b2t_kernels.nearest_code(x, codebook, precision="exact", prepared=prepared)


def nearest_and_usage(
    x: Tensor, codebook: Tensor, temperature: Tensor, prepared: Sequence[Tensor] = ()
) -> b2t_kernels.SearchedUsage:
    """What `nearest` and `soft_usage` find, from one pass over the distances; no gradient."""
    return b2t_kernels.search_usage(x, codebook, temperature, precision="exact", prepared=prepared)


def code_sums(
    x: Tensor, codes: Tensor, K: int, backend: str = "kernels", counts: Tensor | None = None
) -> Tensor:
    """Sum [K, D] float32 of the frames ``x`` [N, D] of each code; the same bits every time.

    ``counts`` [K] are those of ``codes``, where the search gave them.
    """
    if backend == "reference":
        return reference.code_sums(x, codes, K)[0].float()
    return b2t_kernels.code_sums(x, codes, K, counts=counts)[0]


def soft_usage(
    x: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    backend: str = "kernels",
    prepared: Sequence[Tensor] = (),
) -> Tensor:
    """Σ over frames of softmax(−‖x−c‖²/temperature), [K]; differentiable in x and codebook.

    Args:
        x: [N, D].
        codebook: [K, D].
        temperature: [] in units of squared distance.
        backend: ``kernels`` streams, memory O(N + K·D); ``reference`` holds N × K × D.
        prepared: the codebook's entry of `b2t_kernels.prepare_codes`.
    """
    if backend == "reference":
        return reference.code_usage(x, codebook, temperature) * x.shape[0]
    return b2t_kernels.code_usage(x, codebook, temperature, reduction="sum", prepared=prepared)


def sample(
    x: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    hashes: Tensor,
    layer: int,
    backend: str = "kernels",
    prepared: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Codes [N] drawn with probability softmax(−‖x−c‖²/temperature), and counts [K] of them.

    Args:
        x: [N, D].
        codebook: [K, D].
        temperature: [] in units of squared distance.
        hashes: [N] int64, the frames' random numbers.
        layer: draws of different layers are independent.
        backend: as in `nearest`.
        prepared: the codebook's entry of `b2t_kernels.prepare_codes`.
    """
    keys = code_keys(codebook.shape[0], layer, x.device)
    if backend == "reference":
        return reference.sample_code(x, codebook, temperature, hashes, keys)
    return b2t_kernels.sample_code(x, codebook, temperature, hashes, keys, prepared)
