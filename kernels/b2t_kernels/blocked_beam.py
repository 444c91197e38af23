"""Beam search over residual layers in blocked torch: what a CPU runs.

Letters: N frames, b sums kept of each, K codes, D width, Q layers, G groups of codes.

A residual r is a frame less the codes before it, so its products with a codebook follow from those
of the frame and, from a table, those of the codes: r·c = x·c − Σ_m c_m·c. Where that is less work
than the products of b residuals, it is done. Either way scores are rough, and of all of them only
the maxima of groups of codes are kept: `b2t_kernels.beam_candidates` picks the nearest sums from
those, and proves by the bound of the rounding that they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from b2t_kernels.beam_candidates import Book, Scored, group_size, nearest_sums, places
from b2t_kernels.blocked import CentredCodes, centre_codes, centred

_BLOCK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 25}
"""Scores of one block that are kept."""
_PASSING_ELEMENTS = 1 << 19
"""Scores that are made from tables at a time, and stay in the cache until maxima are taken."""
_PASSING_BLOCKS = 64
"""How many of these have their sums picked together."""
_KEPT_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 25}
"""Elements of the residuals that are kept at a time."""
_TABLE_ELEMENTS = 1 << 23
_GATHERED_ROW = 4
"""What adding up one row of a table costs, in terms of a product's width."""
_UNIT = torch.finfo(torch.float32).eps / 2


class _Sums:
    """Sums kept of frames: residuals [n, b, D] and the codes that led there [n, b, q]."""

    def __init__(self, residuals: Tensor, paths: Tensor) -> None:
        self.residuals, self.paths = residuals, paths

    def continued(self, origin: Tensor, codes: Tensor, book: Book) -> _Sums:
        """Those of the sums ``origin`` [n, w] and the ``codes`` [n, w] that follow them."""
        _, b, q = self.paths.shape
        rows = places(origin, b).flatten()
        left = self.residuals.flatten(0, 1).index_select(0, rows)
        left -= book.codes.index_select(0, codes.flatten())
        paths = torch.cat([self.paths.flatten(0, 1)[rows], codes.view(-1, 1)], 1)
        return _Sums(left.view(*codes.shape, -1), paths.view(*codes.shape, q + 1))


def beam_codes(
    x: Tensor, codebooks: Sequence[Tensor], width: int, prepared: Sequence[Sequence[Tensor]] = ()
) -> Tensor:
    """See :func:`b2t_kernels.beam_codes`."""
    x = x.float()
    if not len(x):
        return torch.zeros(0, len(codebooks), dtype=torch.int64, device=x.device)
    given = [centred(entry, x) for entry in prepared] or [None] * len(codebooks)
    books = [_book(*pair) for pair in zip(codebooks, given, strict=True)]
    kept = _KEPT_ELEMENTS.get(x.device.type, 1 << 21) // (width * x.shape[1])
    return torch.cat([_search(frames, books, width) for frames in x.split(max(1, kept))])


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


def _search(frames: Tensor, books: list[Book], width: int) -> Tensor:
    """Codes [n, Q] of frames [n, D]."""
    n = frames.shape[0]
    sums = _Sums(frames[:, None], frames.new_zeros(n, 1, 0, dtype=torch.int64))
    for q, book in enumerate(books[:-1]):
        sums = sums.continued(*_continue(frames, sums, books[: q + 1], width), book)
    origin, codes = _continue(frames, sums, books, 1)
    return torch.cat([sums.paths[torch.arange(n, device=frames.device), origin[:, 0]], codes], 1)


def _continue(frames: Tensor, sums: _Sums, books: list[Book], width: int) -> tuple[Tensor, Tensor]:
    """The ``width`` nearest continuations of each frame by a code of the last of ``books``.

    Returns:
        Which sum [n, w] and which code [n, w], the nearest first; fewer where there are not so
        many.
    """
    book, b = books[-1], sums.residuals.shape[1]
    wanted = min(width, b * book.choices)
    scored = _by_tables if _pays(frames, sums, book.padded) else _by_products
    near = torch.cat(
        [nearest_sums(part, book, wanted) for part in scored(frames, sums, books, wanted)]
    )
    return near // book.padded, near % book.padded


def _pays(frames: Tensor, sums: _Sums, K: int) -> bool:
    """Whether tables, and their sums, are less work than the products of all residuals."""
    (n, D), (_, b, q) = frames.shape, sums.paths.shape
    if frames.device.type != "cpu" or not q or (q * K + n) * K > _TABLE_ELEMENTS:
        return False
    return _GATHERED_ROW * (q + 1) * n * b + (q * K + n) * D < n * b * D


def _by_products(frames: Tensor, sums: _Sums, books: list[Book], wanted: int) -> Iterator[Scored]:
    """Scores of some frames after others, by the products of their residuals."""
    (_, b, D), book = sums.residuals.shape, books[-1]
    elements = _BLOCK_ELEMENTS.get(frames.device.type, 1 << 21)
    size = group_size(b, book.padded, wanted)
    for residuals in sums.residuals.split(max(1, elements // (b * max(book.padded, 4 * D)))):
        moved = residuals - book.made.mean
        scores = torch.addmm(book.made.bias, moved.flatten(0, 1), book.made.codes.T)
        groups = scores.view(-1, size)
        squares = moved.square_().sum(2)
        bound = rounding(D, 0, squares.amax(1).sqrt(), book.made.radius, squares.amax(1))
        yield Scored(
            groups.amax(1).view(len(residuals), -1),
            partial(groups.index_select, 0),
            squares.mul_(-0.5), bound, residuals,
        )  # fmt: skip


def _by_tables(frames: Tensor, sums: _Sums, books: list[Book], wanted: int) -> Iterator[Scored]:
    """The same from tables: [q·K′, K′] of the codes, and below them the frames of one block."""
    *earlier, book = books
    (n, D), (_, b, q), K = frames.shape, sums.paths.shape, book.padded
    size, passing = group_size(b, K, wanted), max(1, _PASSING_ELEMENTS // (b * K))
    step = passing * _PASSING_BLOCKS
    table = frames.new_empty(q * K + min(step, n), K)
    for m, other in enumerate(earlier):
        of_codes = table[m * K : (m + 1) * K]
        torch.addmm(of_codes, other.made.codes, book.made.codes.T, beta=0, alpha=-1, out=of_codes)
    groups = table.view(-1, size)
    moved, reach = _moved(frames, books)
    rows = torch.cat([sums.paths, torch.arange(n)[:, None, None].expand(n, b, 1)], 2)
    rows += torch.arange(0, (q + 1) * K, K)
    bags = torch.arange(0, passing * b * (q + 1), q + 1)
    for start in range(0, n, step):
        part = slice(start, start + step)
        residuals = sums.residuals[part]
        own = table[q * K :][: len(residuals)]
        torch.addmm(book.made.bias, moved[part], book.made.codes.T, out=own)
        index = rows[part].flatten(0, 1)
        index[:, q] -= start
        maxima = frames.new_empty(len(index), K // size)
        blocks = zip(index.split(passing * b), maxima.split(passing * b), strict=True)
        for some, into in blocks:
            scores = functional.embedding_bag(some.flatten(), table, bags[: len(some)], mode="sum")
            torch.amax(scores.view(-1, K // size, size), 2, out=into)
        squares = (residuals - book.made.mean).square_().sum(2)
        bound = rounding(D, q, reach[part], book.made.radius, squares.amax(1))
        yield Scored(
            maxima.view(len(residuals), -1),
            partial(_summed_groups, groups, index, K // size),
            squares.mul_(-0.5), bound, residuals,
        )  # fmt: skip


def _summed_groups(groups: Tensor, index: Tensor, of_sum: int, chosen: Tensor) -> Tensor:
    """Scores of the ``chosen`` [m] groups of sums, as `_by_tables` makes them: [m, g].

    Args:
        groups: of the rows of its table, one after another, [·, g].
        index: rows that are added for each sum, [n·b, q + 1].
        of_sum: groups of a row, G.
        chosen: of the n·b·G.
    """
    sums = chosen // of_sum
    rows = index.index_select(0, sums).mul_(of_sum).add_((chosen - sums * of_sum)[:, None])
    return functional.embedding_bag(rows, groups, mode="sum")


def _moved(frames: Tensor, books: list[Book]) -> tuple[Tensor, Tensor]:
    """Frames less the means of all ``books``, [n, D], and S [n] as in `rounding`."""
    moved = frames - books[0].made.mean
    reach = moved.norm(dim=1)
    for earlier, book in pairwise(books):
        moved -= book.made.mean
        reach += earlier.made.radius + book.made.mean.norm()
    return moved, reach


def rounding(D: int, q: int, reach: Tensor, radius: Tensor, squares: Tensor) -> Tensor:
    """How far −½|r − c|² as it is computed may be off, [n]; infinite where it may overflow.

    It is the sum of −½|r|² and r·c − ½|c|², both less the mean of the codes, with r as it is kept
    and r·c put together from q codes before it. S is the length of the frame less the first mean,
    of the longest codes before and of the later means together (|r| where q is 0), R that of the
    longest code, ρ² the largest |r|², u the unit roundoff. The products are off by D·u·S·R, the
    code by u·R, what stands for the residual by (2q + 2)u·S, and the sum of q + 3 numbers by
    (q + 2)u(S·R + ½R²) and u·½ρ²; ½|c|² by (D + 3)u·½R² and ½|r|² by (D + 2)u·½ρ². Two units of
    each are left for products of these.

    Args:
        D: terms of a product.
        q: codes before.
        reach: S [n].
        radius: R [].
        squares: ρ² [n].
    """
    terms = (D + 3 * q + 7) * reach * radius
    terms += 0.5 * ((D + q + 7) * radius.square() + (D + 5) * squares)
    return (_UNIT * terms).where(
        (reach + radius).square().isfinite() & squares.isfinite(), torch.inf
    )
