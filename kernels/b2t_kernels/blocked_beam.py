"""Beam search over residual layers in blocked torch: what a CPU runs.

Letters: N frames, b sums kept of each, K codes, D width, Q layers.

A residual r is a frame less the codes before it, so its products with a codebook follow from those
of the frame and, from a table, those of the codes: r·c = x·c − Σ_m c_m·c. Where that is less work
than the products of b residuals, it is done. Either way scores are rough: some more continuations
than are wanted are compared in float64, and that none of the others is nearer is proven by a bound
of the rounding. Frames where it is not take more of them, from the products themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from b2t_kernels.blocked import GROUP, CentredCodes, centre_codes, centred

_BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Scores of one block."""
_KEPT_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 25}
"""Elements of the residuals that are kept at a time."""
_TABLE_ELEMENTS = 1 << 23
_GATHERED_ROW = 4
"""What adding up one row of a table costs, in terms of a product's width."""
_SMALLER_GROUP = 8
_UNIT = torch.finfo(torch.float32).eps / 2


class _Book(NamedTuple):
    """Codes [K, D], the same centred and in float64, and how many of them may be chosen.

    The bias of a code that may not be chosen is −inf.
    """

    codes: Tensor
    made: CentredCodes
    wide: Tensor
    choices: int


class _Sums(NamedTuple):
    """Sums kept of frames: residuals [n, b, D] and the codes that led there [n, b, q]."""

    residuals: Tensor
    paths: Tensor


class _Scored(NamedTuple):
    """Scores r·c − ½|c|² [n·b, K′] of residuals [n, b, D], both less the codes' mean.

    With the anchors −½|r|² [n, b] they are −½|r − c|². bound: [n] how far the sum of both may be
    off.
    """

    scores: Tensor
    anchors: Tensor
    bound: Tensor
    residuals: Tensor


def beam_codes(
    x: Tensor, codebooks: Sequence[Tensor], width: int, prepared: Sequence[Sequence[Tensor]] = ()
) -> Tensor:
    """See :func:`b2t_kernels.beam_codes`."""
    x = x.float()
    given = [centred(entry, x) for entry in prepared] or [None] * len(codebooks)
    books = [_book(*pair) for pair in zip(codebooks, given, strict=True)]
    kept = _KEPT_ELEMENTS.get(x.device.type, 1 << 21) // (width * x.shape[1])
    return torch.cat([_search(frames, books, width) for frames in x.split(max(1, kept))])


def _book(codes: Tensor, known: CentredCodes | None) -> _Book:
    """Prepare a codebook; of identical codes only the first may be chosen, NaN never."""
    made = known or centre_codes(codes, torch.float32)
    bias = made.bias.masked_fill(~made.allowed(), -torch.inf)
    choices = max(1, int((bias > -torch.inf).sum()))
    return _Book(codes, made._replace(bias=bias), codes.double(), choices)


def _search(frames: Tensor, books: list[_Book], width: int) -> Tensor:
    """Codes [n, Q] of frames [n, D]."""
    n, D = frames.shape
    sums = _Sums(frames[:, None], frames.new_zeros(n, 1, 0, dtype=torch.int64))
    for q, book in enumerate(books[:-1]):
        origin, codes = _continue(frames, sums, books[: q + 1], width)
        rows = _places(origin, sums.paths.shape[1]).flatten()
        left = sums.residuals.flatten(0, 1).index_select(0, rows)
        left -= book.codes.index_select(0, codes.flatten())
        paths = torch.cat([sums.paths.flatten(0, 1)[rows], codes.view(-1, 1)], 1)
        sums = _Sums(left.view(*codes.shape, D), paths.view(*codes.shape, q + 1))
    origin, codes = _continue(frames, sums, books, 1)
    return torch.cat([sums.paths[torch.arange(n, device=frames.device), origin[:, 0]], codes], 1)


def _continue(frames: Tensor, sums: _Sums, books: list[_Book], width: int) -> tuple[Tensor, Tensor]:
    """The ``width`` nearest continuations of each frame by a code of the last of ``books``.

    Returns:
        Which sum [n, w] and which code [n, w], the nearest first; fewer where there are not so
        many.
    """
    (_, b, D), book = sums.residuals.shape, books[-1]
    K = book.made.bias.numel()
    # A score for each code, and two candidates in float64 for each sum kept.
    elements = _BLOCK_ELEMENTS.get(frames.device.type, 1 << 21)
    step = max(1, elements // (max(b, width) * max(K, 4 * D)))
    scored = _by_tables if _pays(frames, sums, K) else _by_products
    found = [
        _nearest_sums(part, book, width, max(3, width // 2))
        for part in scored(frames, sums, books, step)
    ]
    origin, codes, sure = (torch.cat(each) for each in zip(*found, strict=True))
    doubtful = (~sure).nonzero()[:, 0]
    for rows in doubtful.split(step) if doubtful.numel() else ():
        again = _nearest_sums(_products(sums.residuals[rows], book), book, width, max(8, width))
        origin[rows], codes[rows] = again[:2]
    return origin, codes


def _pays(frames: Tensor, sums: _Sums, K: int) -> bool:
    """Whether tables, and their sums, are less work than the products of all residuals."""
    (n, D), (_, b, q) = frames.shape, sums.paths.shape
    if frames.device.type != "cpu" or not q or (q * K + n) * K > _TABLE_ELEMENTS:
        return False
    return _GATHERED_ROW * (q + 1) * n * b + (q * K + n) * D < n * b * D


def _products(residuals: Tensor, book: _Book) -> _Scored:
    """Scores of residuals [n, b, D]: off by (D + 9)u(|r| + R)² at most, as in `_moved`."""
    made, D = book.made, residuals.shape[2]
    moved = residuals - made.mean
    scores = torch.addmm(made.bias, moved.flatten(0, 1), made.codes.T)
    lengths = moved.norm(dim=2)
    bound = (D + 9) * _UNIT * (lengths.amax(1) + made.radius).square()
    return _Scored(scores, -0.5 * lengths.square(), bound, residuals)


def _by_products(frames: Tensor, sums: _Sums, books: list[_Book], step: int) -> Iterator[_Scored]:
    """Scores of each ``step`` frames."""
    return (_products(part, books[-1]) for part in sums.residuals.split(step))


def _by_tables(frames: Tensor, sums: _Sums, books: list[_Book], step: int) -> Iterator[_Scored]:
    """The same from tables: [q·K′, K′] of the codes, and below them the frames of one step."""
    *earlier, book = books
    (n, D), (_, b, q), K = frames.shape, sums.paths.shape, book.made.bias.numel()
    table = frames.new_empty(q * K + min(step, n), K)
    opposite = -book.made.codes.T
    for m, other in enumerate(earlier):
        torch.mm(other.made.codes, opposite, out=table[m * K : (m + 1) * K])
    moved, reach = _moved(frames, books)
    bound = (D + 3 * q + 9) * _UNIT * reach.square()
    rows = torch.cat([sums.paths, torch.arange(n)[:, None, None].expand(n, b, 1)], 2)
    rows += torch.arange(0, (q + 1) * K, K)
    for start in range(0, n, step):
        part = slice(start, start + step)
        own = table[q * K :][: len(moved[part])]
        torch.addmm(book.made.bias, moved[part], book.made.codes.T, out=own)
        rows[part, :, q] -= start
        scores = functional.embedding_bag(rows[part].flatten(0, 1), table, mode="sum")
        residuals = sums.residuals[part]
        anchors = (residuals - book.made.mean).norm(dim=2).square_().mul_(-0.5)
        yield _Scored(scores, anchors, bound[part], residuals)


def _moved(frames: Tensor, books: list[_Book]) -> tuple[Tensor, Tensor]:
    """Frames less the means of all ``books``, [n, D], and S + R [n].

    S is the length of the frame less the first mean, of the longest codes before and of the later
    means together, R that of the longest code, u the unit roundoff. The products and their sum are
    off by at most (D + q + 3)u·S·R, the residual they stand for by (2q + 4)u·S, ½|c|² by
    (D + 2)u·½R² and ½|r|² by (D + 4)u·½S²; together by less than (D + 3q + 9)u(S + R)².
    """
    moved = frames - books[0].made.mean
    reach = moved.norm(dim=1) + books[0].made.radius
    for book in books[1:]:
        moved -= book.made.mean
        reach += book.made.radius + book.made.mean.norm()
    return moved, reach


def _nearest_sums(
    scored: _Scored, book: _Book, width: int, spare: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Pick the ``width`` best of all continuations by a code, of as many and ``spare``.

    Returns:
        Which sum [n, w], which code [n, w], the nearest first, and whether that is sure [n].
    """
    (n, b, _), padded = scored.residuals.shape, scored.scores.shape[1]
    wanted = min(width + spare, b * book.choices)
    near, least = _greatest(scored.scores, scored.anchors, wanted)
    near = near.sort(dim=1).values
    origin, codes = near // padded, near % padded
    left = scored.residuals.flatten(0, 1).double().index_select(0, _places(origin, b).flatten())
    left -= book.wide.index_select(0, codes.flatten())
    distances, order = left.square_().sum(1).view(n, wanted).sort(dim=1, stable=True)
    kept = order[:, :width]
    sure = -0.5 * distances[:, kept.shape[1] - 1] > least.double() + scored.bound
    return origin.gather(1, kept), codes.gather(1, kept), sure | (wanted == b * book.choices)


def _greatest(scores: Tensor, anchors: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """Where in ``scores`` [n, b·K′] plus ``anchors`` [n, b] the greatest are, in any order.

    They lie in the groups of the greatest maxima, which are found in one fast pass, and there in
    the smaller groups of the greatest maxima.

    Returns:
        Places [n, ``wanted``], and the least of the values there [n].
    """
    n, b = anchors.shape
    groups = scores.view(n, scores.shape[1] * b // GROUP, GROUP)
    anchors = anchors.repeat_interleave(groups.shape[1] // b, 1)
    chosen = _first(groups.amax(2).add_(anchors), wanted)
    held = groups.flatten(0, 1)[_places(chosen, groups.shape[1])]
    held += anchors.gather(1, chosen)[..., None]
    smaller = held.view(n, chosen.shape[1] * GROUP // _SMALLER_GROUP, _SMALLER_GROUP)
    parts = _first(smaller.amax(2), wanted)
    ends = smaller.flatten(0, 1)[_places(parts, smaller.shape[1])].flatten(1)
    values, places = ends.topk(wanted, sorted=False)
    part = parts.gather(1, places // _SMALLER_GROUP)
    group = chosen.gather(1, part // (GROUP // _SMALLER_GROUP))
    inside = part % (GROUP // _SMALLER_GROUP) * _SMALLER_GROUP + places % _SMALLER_GROUP
    return group * GROUP + inside, values.amin(1)


def _first(maxima: Tensor, wanted: int) -> Tensor:
    """Places of the ``wanted`` greatest of each row of ``maxima`` [n, k], all where k is fewer."""
    return maxima.topk(min(wanted, maxima.shape[1]), sorted=False).indices


def _places(index: Tensor, b: int) -> Tensor:
    """Rows in a flattened [n·b, …] of ``index`` [n, k] along the second axis of [n, b, …]."""
    return index + torch.arange(0, index.shape[0] * b, b, device=index.device)[:, None]
