"""Beam search over residual layers in blocked torch: what a CPU runs.

Letters: N frames, b sums kept of each, K codes, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from b2t_kernels.blocked import GROUP, CentredCodes, centre_codes, centred

_BLOCK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 25}


class _Book(NamedTuple):
    """Codes [K, D], the same centred, and how many of them may be chosen."""

    codes: Tensor
    centred: CentredCodes
    choices: int


def beam_codes(
    x: Tensor, codebooks: Sequence[Tensor], width: int, prepared: Sequence[Sequence[Tensor]] = ()
) -> Tensor:
    """See :func:`b2t_kernels.beam_codes`."""
    given = [centred(entry, x) for entry in prepared] or [None] * len(codebooks)
    books = [_book(*pair) for pair in zip(codebooks, given, strict=True)]
    K, D = books[0].codes.shape
    # A score for each code, and two candidates in float64 for each sum kept.
    elements = width * max(K, 4 * D)
    rows = max(1, _BLOCK_ELEMENTS.get(x.device.type, 1 << 21) // elements)
    return torch.cat([_search(block, books, width) for block in x.split(rows)])


def _book(codes: Tensor, known: CentredCodes | None) -> _Book:
    """Prepare a codebook; of identical codes only the first may be chosen, NaN never."""
    made = known or centre_codes(codes, torch.float32)
    made = made._replace(bias=made.bias.masked_fill(~made.allowed(), -torch.inf))
    return _Book(codes, made, max(1, int((made.bias > -torch.inf).sum())))


def _search(block: Tensor, books: list[_Book], width: int) -> Tensor:
    """Codes [n, Q] of a block of frames [n, D]."""
    residuals = block[:, None]
    paths = torch.zeros(*residuals.shape[:2], 0, dtype=torch.int64, device=block.device)
    for book in books:
        origin, codes = _nearest_sums(residuals, book, width)
        residuals = _taken(residuals, origin) - book.codes[codes]
        paths = torch.cat([_taken(paths, origin), codes[..., None]], -1)
    return paths[:, 0]


def _nearest_sums(residuals: Tensor, book: _Book, width: int) -> tuple[Tensor, Tensor]:
    """Pick the ``width`` best of all continuations of ``residuals`` [n, b, D] by a code.

    Returns:
        Which residual [n, width] and which code [n, width], the nearest first; fewer where there
        are not so many.
    """
    n, beams, _ = residuals.shape
    moved, padded = book.centred.centre(residuals), book.centred.codes.shape[0]
    scores = torch.addmm(book.centred.bias, moved.flatten(0, 1), book.centred.codes.T)
    scores = scores.view(n, beams, padded) - 0.5 * moved.square().sum(2, keepdim=True)
    # Twice as many as wanted, so that rounding decides only among those that lose anyway.
    near = _greatest(scores.flatten(1), min(2 * width, beams * book.choices))
    near = near.sort(dim=1).values
    origin, codes = near // padded, near % padded
    left = _taken(residuals, origin).double() - book.codes[codes].double()
    order = left.square().sum(2).sort(dim=1, stable=True).indices[:, :width]
    return origin.gather(1, order), codes.gather(1, order)


def _greatest(scores: Tensor, wanted: int) -> Tensor:
    """Places of the ``wanted`` greatest of each row of ``scores`` [n, whole groups], in any order.

    They lie in the groups of the greatest maxima, which are found in one fast pass.
    """
    groups = scores.unflatten(1, (-1, GROUP))
    if groups.shape[1] <= wanted:
        return scores.topk(wanted, sorted=False).indices
    chosen = groups.amax(2).topk(wanted, sorted=False).indices
    places = _taken(groups, chosen).flatten(1).topk(wanted, sorted=False).indices
    return chosen.gather(1, places // GROUP) * GROUP + places % GROUP


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """Select ``index`` [n, k] along the second axis of ``values`` [n, b, …]."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))
