"""Beam search over residual layers in blocked torch: what a CPU runs.

Letters: N frames, b sums kept of each, K codes, D width, Q layers, G groups of codes.

Scores of sums are products of their residuals, or `b2t_kernels.blocked_tables` where that is less
work. Either way they are rough, and of all of them only the maxima of groups of codes are kept:
`b2t_kernels.beam_candidates` picks the nearest sums from those, and proves by the bound of the
rounding that they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from b2t_kernels.beam_candidates import (
    Book,
    Nearest,
    Scored,
    Sums,
    group_size,
    nearest_sums,
    rounding,
)
from b2t_kernels.blocked_codes import CentredCodes, centre_codes, centred
from b2t_kernels.blocked_tables import Kept, by_tables, pays

_BLOCK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 25}
"""Scores of one block that are kept."""
_KEPT_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 25}
"""Elements of the residuals that are kept at a time."""


def beam_codes(
    x: Tensor, codebooks: Sequence[Tensor], width: int, prepared: Sequence[Sequence[Tensor]] = ()
) -> Tensor:
    """See :func:`b2t_kernels.beam_codes`."""
    x = x.float()
    if not len(x):
        return torch.zeros(0, len(codebooks), dtype=torch.int64, device=x.device)
    given = [centred(entry, x) for entry in prepared] or [None] * len(codebooks)
    books = [_book(*pair) for pair in zip(codebooks, given, strict=True)]
    elements = _KEPT_ELEMENTS.get(x.device.type, 1 << 21) // (width * x.shape[1])
    with Kept(books) as kept:
        return torch.cat(
            [_search(frames, books, width, kept) for frames in x.split(max(1, elements))]
        )


def _book(codes: Tensor, known: CentredCodes | None) -> Book:
    """Prepare a codebook; of identical codes only the first may be chosen, NaN never."""
    made = known or centre_codes(codes, torch.float32)
    allowed = made.allowed()
    if not bool(made.radius.square().isfinite()):
        # The bias of a code too long for float32 is −inf, too.
        bias = made.bias.clone()
        bias[: len(codes)].masked_fill_(codes.isfinite().all(1), 0.0)
        allowed = made._replace(bias=bias).allowed()
    bias = made.bias.masked_fill(~allowed, -torch.inf)
    choices = max(1, int(allowed.sum()))
    return Book(codes, made._replace(bias=bias), codes.double(), allowed, choices)


def _search(frames: Tensor, books: list[Book], width: int, kept: Kept) -> Tensor:
    """Codes [n, Q] of frames [n, D]."""
    sums = Sums.empty(frames)
    for book in books:
        wanted = 1 if book is books[-1] else width
        sums = sums.continued(_continue(sums, book, wanted, kept), book)
    return sums.paths[:, 0]


def _continue(sums: Sums, book: Book, width: int, kept: Kept) -> Nearest:
    """The ``width`` nearest continuations by a code of ``book``; fewer where there are no more."""
    wanted = min(width, sums.paths.shape[1] * book.choices)
    if pays(sums, book):
        scored = by_tables(sums, book, wanted, kept.tables(sums.books, book))
    else:
        scored = _by_products(sums, book, wanted)
    parts = [nearest_sums(part, book, wanted) for part in scored]
    return parts[0] if len(parts) == 1 else Nearest(*map(torch.cat, zip(*parts, strict=True)))


def _by_products(sums: Sums, book: Book, wanted: int) -> Iterator[Scored]:
    """Scores of some frames after others, by the products of their residuals."""
    (n, D), b = sums.frames.shape, sums.paths.shape[1]
    elements = _BLOCK_ELEMENTS.get(sums.frames.device.type, 1 << 21)
    size = group_size(b, book.padded, wanted)
    step = max(1, elements // (b * max(book.padded, 4 * D)))
    for start in range(0, n, step):
        part = sums.part(slice(start, start + step))
        moved = part.residuals().sub_(book.made.mean)
        scores = torch.addmm(book.made.bias, moved, book.made.codes.T)
        groups = scores.view(-1, size)
        squares = moved.square_().sum(1).view(-1, b)
        bound = rounding(D, 0, squares.amax(1).sqrt(), book.made.radius, squares.amax(1))
        yield Scored(
            groups.amax(1).view(len(squares), -1),
            partial(groups.index_select, 0),
            squares.mul_(-0.5), bound, part.residuals,
        )  # fmt: skip
