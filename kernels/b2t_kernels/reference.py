"""Naive references: whole N × K matrices, float64 inside, written to be read and trusted.

Letters: N frames, K codes, D width. Every function takes and gives what the public
operator of the same name does; the tests compare the two, and a user who doubts a result can too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from b2t_kernels.gumbel import noise


def valid_rows(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Rows that count: finite in every column and, where a mask is given, True in it. [N] bool."""
    valid = x.isfinite().all(dim=1)
    return valid if mask is None else valid & mask


def squared_distances(x: Tensor, codebook: Tensor) -> Tensor:
    """|x_n − c_k|² in float64, [N, K]; infinite for codes that are not finite."""
    finite = codebook.isfinite().all(dim=1)
    safe = torch.where(finite[:, None], codebook, 0).double()
    distances = (x.double()[:, None, :] - safe[None, :, :]).square().sum(dim=2)
    return distances.masked_fill(~finite, float("inf"))


def nearest_code(x: Tensor, codebook: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Nearest code of each row of x [N, D] in codebook [K, D], ties to the lowest index.

    Returns indices [N] int64 (−1 where masked or not finite) and counts [K] int64.
    """
    K = codebook.shape[0]
    valid = valid_rows(x, mask)
    distances = squared_distances(torch.where(valid[:, None], x, 0), codebook)
    nearest = (distances == distances.amin(dim=1, keepdim=True)).int().argmax(dim=1)
    indices = torch.where(valid, nearest, -1)
    return indices, torch.bincount(indices[valid], minlength=K)


def code_usage(
    x: Tensor, codebook: Tensor, temperature: float | Tensor, mask: Tensor | None = None
) -> Tensor:
    """Mean over valid rows of softmax_k(−|x_n − c_k|² / temperature), [K]; plain autograd."""
    valid = valid_rows(x, mask)
    kept = x[valid]
    distances = (kept[:, None, :] - codebook[None, :, :]).square().sum(dim=2)
    return (-distances / temperature).softmax(dim=1).sum(dim=0) / valid.sum().clamp(min=1)


def sample_code(
    x: Tensor,
    codebook: Tensor,
    temperature: float | Tensor,
    row_keys: Tensor,
    code_keys: Tensor,
) -> tuple[Tensor, Tensor]:
    """Codes [N] drawn from softmax_k(−|x_n − c_k|² / temperature) with Gumbel noise, counts [K]."""
    valid = valid_rows(x)
    logits = -squared_distances(torch.where(valid[:, None], x, 0), codebook) / temperature
    drawn = (logits + noise(row_keys, code_keys)).argmax(dim=1)
    indices = torch.where(valid, drawn, -1)
    return indices, torch.bincount(indices[valid], minlength=codebook.shape[0])


def code_sums(
    x: Tensor, indices: Tensor, K: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of the rows of x [N, D] that chose each code, [K, D] float64, and their counts [K]."""
    valid = (indices >= 0) if mask is None else (indices >= 0) & mask
    chosen = torch.nn.functional.one_hot(indices[valid], K)
    return chosen.double().T @ x[valid].double(), chosen.sum(dim=0)


def beam_codes(x: Tensor, codebooks: Sequence[Tensor], width: int) -> Tensor:
    """Codes [N, Q] of a beam search: all continuations of the ``width`` sums kept, every layer."""
    left = x.double()[:, None]
    paths = torch.zeros(x.shape[0], 1, 0, dtype=torch.int64, device=x.device)
    for codebook in codebooks:
        K = codebook.shape[0]
        distances = torch.stack([squared_distances(rows, codebook) for rows in left.unbind(1)], 1)
        equal = (codebook[:, None] == codebook[None, :]).all(dim=2)
        never = equal.tril(-1).any(dim=1) | ~codebook.isfinite().all(dim=1)
        distances[..., never] = float("inf")
        kept = min(width, left.shape[1] * max(1, int((~never).sum())))
        order = distances.flatten(1).sort(dim=1, stable=True).indices[:, :kept]
        origin, codes = order // K, order % K
        left = left.gather(1, origin[..., None].expand(-1, -1, x.shape[1]))
        left = left - torch.where(codebook.isfinite(), codebook, 0).double()[codes]
        paths = paths.gather(1, origin[..., None].expand(-1, -1, paths.shape[2]))
        paths = torch.cat([paths, codes[..., None]], dim=2)
    return paths[:, 0]
