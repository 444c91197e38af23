"""Scores of a beam's sums on a CPU, put together from products of frames and of codes.

Letters: N frames, b sums kept of each, K′ codes with padding, D width, Q layers, G groups of codes.

A residual is a frame less the codes before it, so r·c = x·c − Σ_m c_m·c: one row of products of the
frame and one of a table for each layer before. The tables depend on the codebooks alone, so they
are kept with what was prepared from those.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from b2t_kernels.beam_candidates import Book, Scored, Sums, group_size, rounding
from b2t_kernels.blocked_codes import CentredCodes

PASSING_ELEMENTS = 1 << 18
"""Scores that are made at a time, and stay in the cache until maxima are taken."""
TABLE_ELEMENTS = 1 << 23
"""Products that are held at a time, or kept."""
FRAME_ELEMENTS = 1 << 21
"""Of these, products of frames."""
_GATHERED_ROW = 4
"""What adding up one row of a table costs, in terms of a product's width."""

_KEPT = WeakTensorKeyDictionary()
"""Of prepared codes: those of all layers that lead there, and the tables of a search."""

_SPARE: list[Tensor] = []
"""Rows of tables that are gone: asking for such memory anew takes a fifth of a search."""


class Tables:
    """Rows that are added up: [R, K′] products of frames, below them those of codes.

    For each later layer q and each m before it, K′ rows: −ĉ_m·c_q, with ĉ_m less the mean of its
    layer; those of the layer just before hold −½|c_q|² too. They are made when first asked for.

    Args:
        layers: q of the later layers.
        like: a codebook of the common size.
    """

    def __init__(self, layers: range, like: CentredCodes) -> None:
        K = like.bias.numel()
        self.frames, self.layers = max(1, FRAME_ELEMENTS // K), layers
        shape = (self.frames + K * sum(layers), K)
        spare = _SPARE.pop() if _SPARE else None
        if spare is None or spare.shape != shape:
            spare = like.codes.new_empty(shape)
        self.rows = spare
        self._codes: dict[int, Tensor] = {}

    def __del__(self, spare: list[Tensor] = _SPARE) -> None:
        """Leave the rows to the next."""
        spare[:] = [self.rows]

    def of(self, earlier: Sequence[Book], book: Book) -> tuple[Tensor, list[int]]:
        """Codes [K′, D] of ``book``, and where the rows of each of the ``earlier`` begin."""
        q, K = len(earlier), book.padded
        first = self.frames + K * sum(range(self.layers.start, q))
        starts = list(range(first, first + q * K, K))
        if q not in self._codes:
            codes = torch.zeros_like(book.made.codes)
            known = book.allowed[: len(book.codes), None]
            codes[: len(book.codes)] = book.codes.where(known, 0)
            bias = codes.square().sum(1).mul_(-0.5).masked_fill_(~book.allowed, -torch.inf)
            for start, before in zip(starts, earlier, strict=True):
                torch.addmm(
                    bias, before.made.codes, codes.T, beta=float(start == starts[-1]), alpha=-1,
                    out=self.rows[start : start + K],
                )  # fmt: skip
            self._codes[q] = codes
        return self._codes[q], starts


class Kept:
    """The tables of one search, taken from what its codebooks kept and given back at the end.

    They are kept beside the last codebook's prepared codes, as long as those live. Two searches at
    once never write products of frames into the same, and tables that together are too large are
    made for each layer and not kept.
    """

    def __init__(self, books: Sequence[Book]) -> None:
        self._codes = [book.made.codes for book in books]
        self._later, K = range(1, len(books)), books[-1].padded
        self._whole = FRAME_ELEMENTS + K * K * sum(self._later) <= TABLE_ELEMENTS
        self._tables: Tables | None = None

    def __enter__(self) -> Kept:
        """Take what an earlier search of the same codes kept."""
        of, tables = _KEPT.pop(self._codes[-1], ([], None))
        if len(of) == len(self._codes) and all(
            each() is codes for each, codes in zip(of, self._codes, strict=True)
        ):
            self._tables = tables
        return self

    def __exit__(self, *error: object) -> None:
        """Keep the tables for the next search."""
        if self._tables is not None and self._whole:
            _KEPT[self._codes[-1]] = ([TensorWeakRef(codes) for codes in self._codes], self._tables)

    def tables(self, earlier: Sequence[Book], book: Book) -> Tables:
        """Those for a ``book`` after the ``earlier`` ones."""
        q = len(earlier)
        if self._tables is None or q not in self._tables.layers:
            layers = self._later if self._whole else range(q, q + 1)
            self._tables = Tables(layers, book.made)
        return self._tables


def pays(sums: Sums, book: Book) -> bool:
    """Whether tables, and adding them up, are less work than the products of all residuals."""
    (n, D), (_, b, q), K = sums.frames.shape, sums.paths.shape, book.padded
    if sums.frames.device.type != "cpu" or not q or any(each.padded != K for each in sums.books):
        return False
    if FRAME_ELEMENTS + q * K * K > TABLE_ELEMENTS:
        return False
    return _GATHERED_ROW * (q + 1) * n * b + (q * K + n) * D < n * b * D


def by_tables(sums: Sums, book: Book, wanted: int, tables: Tables) -> Iterator[Scored]:
    """Scores of the sums' continuations by ``book``, some frames after others."""
    codes, starts = tables.of(sums.books, book)
    (n, D), (_, b, q), K = sums.frames.shape, sums.paths.shape, book.padded
    size, passing = group_size(b, K, wanted), max(1, PASSING_ELEMENTS // (b * K))
    bags = torch.arange(0, passing * b * (q + 1), q + 1)
    groups = tables.rows.view(-1, size)
    for start in range(0, n, tables.frames):
        part = sums.part(slice(start, start + tables.frames))
        moved = part.frames - torch.stack([each.made.mean for each in sums.books]).sum(0)
        torch.mm(moved, codes.T, out=tables.rows[: len(moved)])
        own = torch.arange(len(moved))[:, None, None].expand(-1, b, 1)
        index = torch.cat([part.paths + torch.tensor(starts), own], 2).flatten(0, 1)
        maxima = codes.new_empty(len(index), K // size)
        blocks = zip(index.split(passing * b), maxima.split(passing * b), strict=True)
        for some, into in blocks:
            scores = functional.embedding_bag(
                some.flatten(), tables.rows, bags[: len(some)], mode="sum"
            )
            torch.amax(scores.view(-1, K // size, size), 2, out=into)
        reach = moved.norm(dim=1) + sum(each.made.radius for each in sums.books)
        radius = book.made.radius + book.made.mean.norm()
        bound = part.bound + rounding(D, q, reach, radius, -2 * part.anchors.amin(1))
        yield Scored(
            maxima.view(len(moved), -1),
            partial(_summed_groups, groups, index, K // size),
            part.anchors, bound, part.residuals,
        )  # fmt: skip


def _summed_groups(groups: Tensor, index: Tensor, of_sum: int, chosen: Tensor) -> Tensor:
    """Scores of the ``chosen`` [m] groups of sums, as `by_tables` makes them: [m, g].

    Args:
        groups: of the rows of its table, one after another, [·, g].
        index: rows that are added for each sum, [n·b, q + 1].
        of_sum: groups of a row, G.
        chosen: of the n·b·G.
    """
    sums = chosen // of_sum
    rows = index.index_select(0, sums).mul_(of_sum).add_((chosen - sums * of_sum)[:, None])
    return functional.embedding_bag(rows, groups, mode="sum")
