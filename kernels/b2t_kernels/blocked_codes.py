"""A codebook as the blocked implementations take it: centred, padded, its repeats known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 64
"""Codes whose scores' maximum is taken together."""


def working_dtype(x: Tensor) -> torch.dtype:
    """Float64 stays float64; everything else is computed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def lowest_duplicate(codebook: Tensor, bias: Tensor, usable: Tensor) -> Tensor | None:
    """For each code, the lowest index of an identical code, [K]; None if all codes differ.

    Those that are not ``usable`` [K] are like no other.

    A matrix product may round equal columns differently at the edge of a block, so ties between
    identical codes are settled here and not by comparing scores.
    """
    _, group, members = torch.unique(bias, return_inverse=True, return_counts=True)
    suspects = ((members[group] > 1) & usable).nonzero()[:, 0]
    if not suspects.numel():
        return None
    _, inverse = torch.unique(codebook[suspects], dim=0, return_inverse=True)
    lowest = torch.full_like(suspects, codebook.shape[0])
    lowest.scatter_reduce_(0, inverse, suspects, "amin")
    first = torch.arange(codebook.shape[0], device=codebook.device)
    first[suspects] = lowest[inverse]
    return first


class CentredCodes(NamedTuple):
    """A codebook moved to its mean and padded to whole groups, with −½|c|² beside it.

    Centring keeps a common offset of the data out of the rounding. Codes that are not finite and
    the padding get −inf and are never chosen.

    codes: [K′, D]. bias: [K′]. mean: [D]. radius: [] the largest |c − mean|.
    duplicates: [K] int64, the lowest index of an identical code; [0] if all differ.
    """

    codes: Tensor
    bias: Tensor
    mean: Tensor
    radius: Tensor
    duplicates: Tensor

    def centre(self, x: Tensor) -> Tensor:
        """Rows of x in the working precision, moved by the codebook's mean."""
        return x.to(self.mean.dtype) - self.mean

    def scores(self, rows: Tensor, block: slice, buffer: Tensor) -> Tensor:
        """x·c − ½|c|² of centred rows [n, D] and a block of codes, [n, k], in ``buffer``."""
        bias, n = self.bias[block], rows.shape[0]
        scores = buffer[: n * bias.shape[0]].view(n, bias.shape[0])
        return torch.addmm(bias, rows, self.codes[block].T, out=scores)

    def allowed(self) -> Tensor:
        """Codes that may be chosen: finite, and the first of those identical. [K′] bool."""
        allowed = self.bias > -torch.inf
        if self.duplicates.numel():
            K = self.duplicates.numel()
            allowed[:K] &= self.duplicates == torch.arange(K, device=allowed.device)
        return allowed


def centre_codes(codebook: Tensor, dtype: torch.dtype) -> CentredCodes:
    """Prepare a codebook [K, D] for searches and soft assignments of the same ``dtype``."""
    codebook = codebook.to(dtype)
    K, D = codebook.shape
    finite = usable_rows(codebook, None)
    safe = codebook if bool(finite.all()) else torch.where(finite[:, None], codebook, 0)
    mean = safe.sum(dim=0) / finite.sum().clamp(min=1)
    padded = (K + GROUP - 1) // GROUP * GROUP
    codes = safe.new_empty(padded, D)
    torch.sub(safe, mean, out=codes[:K])
    codes[K:] = 0
    bias = codes.square().sum(dim=1).mul_(-0.5)
    duplicates = lowest_duplicate(safe, bias[:K], finite)
    bias[:K].masked_fill_(~finite, -torch.inf)
    bias[K:] = -torch.inf
    radius = torch.where(finite, codes[:K].norm(dim=1), 0).max()
    if duplicates is None:
        duplicates = torch.empty(0, dtype=torch.int64, device=codebook.device)
    return CentredCodes(codes, bias, mean, radius, duplicates)


def centred(given: Sequence[Tensor], x: Tensor) -> CentredCodes | None:
    """What :func:`centre_codes` made, if it was given and fits rows like x."""
    if len(given) == len(CentredCodes._fields) and given[0].dtype == working_dtype(x):
        return CentredCodes(*given)
    return None


def usable_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Rows [N] that are finite and not masked."""
    # Unlike isfinite over all of x, without a temporary of its size.
    valid = x.amax(dim=1).isfinite() & x.amin(dim=1).isfinite()
    return valid if mask is None else valid & mask
