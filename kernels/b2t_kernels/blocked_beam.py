"""Beam search over residual layers in blocked torch: what a CPU runs.

Letters: N frames, b sums kept of each, K codes, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from b2t_kernels.blocked import GROUP, CentredCodes, centre_codes, centred

_BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 25}


class _Book(NamedTuple):
    """Codes [K, D], the same ready for the scores, and how many of them may be chosen.

    lengthened: [K′, D + 2], the centred codes, −½|c|² and 1, so that one product with rows that end
    in 1 and −½|r|² gives −½|r − c|² without another pass over the scores.
    """

    codes: Tensor
    lengthened: Tensor
    mean: Tensor
    choices: int

    def scores(self, residuals: Tensor) -> Tensor:
        """−½|r − c|² of residuals [n, b, D], −inf where a code may not be chosen: [n, b, K′]."""
        moved = residuals - self.mean
        rows = torch.cat(
            [moved, torch.ones_like(moved[..., :1]), -0.5 * moved.square().sum(2, keepdim=True)], 2
        )
        scores = rows.flatten(0, 1) @ self.lengthened.T
        return scores.view(*residuals.shape[:2], self.lengthened.shape[0])


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
    bias = made.bias.masked_fill(~made.allowed(), -torch.inf)[:, None]
    lengthened = torch.cat([made.codes, bias, torch.ones_like(bias)], 1)
    return _Book(codes, lengthened, made.mean, max(1, int((bias > -torch.inf).sum())))


def _search(block: Tensor, books: list[_Book], width: int) -> Tensor:
    """Codes [n, Q] of a block of frames [n, D]."""
    residuals = block[:, None]
    paths = torch.zeros(*residuals.shape[:2], 0, dtype=torch.int64, device=block.device)
    for q, book in enumerate(books):
        origin, codes = _nearest_sums(residuals, book, width)
        paths = torch.cat([_taken(paths, origin), codes[..., None]], -1)
        if q < len(books) - 1:
            residuals = _taken(residuals, origin) - book.codes[codes]
    return paths[:, 0]


def _nearest_sums(residuals: Tensor, book: _Book, width: int) -> tuple[Tensor, Tensor]:
    """Pick the ``width`` best of all continuations of ``residuals`` [n, b, D] by a code.

    Returns:
        Which residual [n, width] and which code [n, width], the nearest first; fewer where there
        are not so many.
    """
    padded = book.lengthened.shape[0]
    scores = book.scores(residuals).flatten(1)
    # Twice as many as wanted, so that rounding decides only among those that lose anyway.
    wanted = min(2 * width, residuals.shape[1] * book.choices)
    near = _greatest(scores, wanted).sort(dim=1).values
    origin, codes = near // padded, near % padded
    left = _taken(residuals, origin).double().sub_(book.codes[codes])
    order = left.square_().sum(2).sort(dim=1, stable=True).indices[:, :width]
    return origin.gather(1, order), codes.gather(1, order)


def _greatest(scores: Tensor, wanted: int, sizes: tuple[int, ...] = (GROUP, 8)) -> Tensor:
    """Places of the ``wanted`` greatest of each row of ``scores`` [n, whole groups], in any order.

    They lie in the groups of the greatest maxima, which are found in one fast pass, and there in
    the smaller groups of the greatest maxima.
    """
    if not sizes:
        return scores.topk(wanted, sorted=False).indices
    size, smaller = sizes[0], sizes[1:]
    groups = scores.unflatten(1, (-1, size))
    if groups.shape[1] <= wanted:
        return _greatest(scores, wanted, smaller)
    chosen = groups.amax(2).topk(wanted, sorted=False).indices
    places = _greatest(_taken(groups, chosen).flatten(1), wanted, smaller)
    return chosen.gather(1, places // size) * size + places % size


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """Select ``index`` [n, k] along the second axis of ``values`` [n, b, …]."""
    n, b, width = values.shape
    first = torch.arange(0, n * b, b, device=index.device)[:, None]
    return values.reshape(n * b, width)[index + first]
