"""The nearest of many sums of codes, picked from rough scores: exactly those that float64 finds.

Letters: n frames, b sums kept of each, K′ codes with padding, D width, G groups of g codes, w sums
wanted. A continuation of the sum s by the code c has the place s·K′ + c.

Let t be reached by the rough scores of w continuations, and none be off by more than B. Then those
w are at −½|r − c|² ≥ t − B, so are the w nearest, and their rough scores reach t − 2B: what does
not is left out unseen, by the maxima of groups. Where all that is left over differs by more than
2B from the next, its order is the true one; where not, it is ranked in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from b2t_kernels.blocked import RESCORE_ELEMENTS
from b2t_kernels.blocked_codes import GROUP, CentredCodes

_SETS = 4
"""Sets of continuations whose maxima give t, for each sum that is wanted."""
_SPARE = 16
"""Candidates of a frame that are expected at most beside three times those wanted."""
_UNIT = torch.finfo(torch.float32).eps / 2


class Book(NamedTuple):
    """Codes [K, D], the same centred and in float64, which may be chosen [K′] and how many may.

    The bias of a code that may not be chosen is −inf.
    """

    codes: Tensor
    made: CentredCodes
    wide: Tensor
    allowed: Tensor
    choices: int

    @property
    def padded(self) -> int:
        """Codes with padding, K′."""
        return self.made.bias.numel()


@dataclass(frozen=True)
class Sums:
    """Sums kept of frames [n, D]: the codes [n, b, q] of the ``books`` that led there.

    anchors: −½|r|² of their residuals [n, b], as found for the last code. bound: [n] how far those
    may be off.
    """

    frames: Tensor
    books: tuple[Book, ...]
    paths: Tensor
    anchors: Tensor
    bound: Tensor

    @staticmethod
    def empty(frames: Tensor) -> Sums:
        """No codes yet; nothing is known of the frames' lengths."""
        n = len(frames)
        paths = frames.new_zeros(n, 1, 0, dtype=torch.int64)
        return Sums(frames, (), paths, frames.new_zeros(n, 1), frames.new_full((n,), torch.inf))

    def continued(self, near: Nearest, book: Book) -> Sums:
        """Those that follow by the next ``book``."""
        n, b, q = self.paths.shape
        origin = near.places // book.padded
        codes = near.places - origin * book.padded
        origin += torch.arange(0, n * b, b, device=origin.device)[:, None]
        paths = self.paths.flatten(0, 1).index_select(0, origin.flatten())
        paths = torch.cat([paths, codes.view(-1, 1)], 1).view(n, -1, q + 1)
        return Sums(self.frames, (*self.books, book), paths, near.scores, near.bound)

    def part(self, frames: slice) -> Sums:
        """Those of some frames."""
        some = (each[frames] for each in (self.paths, self.anchors, self.bound))
        return Sums(self.frames[frames], self.books, *some)

    def residuals(self, rows: Tensor | None = None) -> Tensor:
        """Frames less their codes, one after another, for ``rows`` [m] of the n·b: [m, D].

        All are those of the frames in order where no rows are given.
        """
        n, b, q = self.paths.shape
        if rows is None:
            rows = torch.arange(n * b, device=self.frames.device)
        left = self.frames.index_select(0, rows // b if b > 1 else rows)
        chosen = self.paths.view(n * b, q).index_select(0, rows)
        for book, codes in zip(self.books, chosen.unbind(1), strict=True):
            left -= book.codes.index_select(0, codes)
        return left


class Scored(NamedTuple):
    """Rough scores of the continuations of some frames' sums, less the −½|r|² of their residuals.

    maxima: [n, b·G] of groups of codes. scores: those of groups [m] of the n·b·G, [m, g].
    anchors: −½|r|² [n, b]; with them, the scores are −½|r − c|². bound: [n] how far the sum of both
    may be off. residuals: those of rows [m] of the n·b, [m, D].
    """

    maxima: Tensor
    scores: Callable[[Tensor], Tensor]
    anchors: Tensor
    bound: Tensor
    residuals: Callable[[Tensor], Tensor]


class Nearest(NamedTuple):
    """Places of the nearest continuations [n, w] and their −½|r − c|², off by ``bound`` [n]."""

    places: Tensor
    scores: Tensor
    bound: Tensor


class _Candidates(NamedTuple):
    """Continuations that may be among the nearest: frames [m] in order, places [m] in order.

    scores: [m], less a number of the frame.
    """

    frames: Tensor
    places: Tensor
    scores: Tensor

    def of(self, kept: Tensor) -> _Candidates:
        """Those of the frames that are ``kept`` [n]."""
        chosen = kept.index_select(0, self.frames).nonzero()[:, 0]
        return _Candidates(*(each.index_select(0, chosen) for each in self))


def rounding(D: int, q: int, reach: Tensor, radius: Tensor, squares: Tensor) -> Tensor:
    """How far −½|r − c|² as it is computed may be off, [n]; infinite where it may overflow.

    It is the sum of −½|r|² and r·c − ½|c|², with r as it is kept and r·c put together from q codes
    before it. S is the length of the frame less the means of layers before and of the longest codes
    there together (|r| where q is 0), R that of the longest code, ρ² the largest |r|², u the unit
    roundoff. The products are off by D·u·S·R, the code by u·R, what stands for the residual by
    (2q + 2)u·S, and the sum of q + 3 numbers by (q + 2)u(S·R + ½R²) and u·½ρ²; ½|c|² by
    (D + 3)u·½R² and ½|r|² by (D + 2)u·½ρ², if it is computed here. Two units of each are left for
    products of these and for the floor that is taken off.

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


def carried(bound: Tensor, D: int) -> Tensor:
    """How far a −½|r − c|² that was off by ``bound`` [n] is off as that of the residual kept.

    Adding the floor again and rounding r − c takes 4 units of S·R + ½R² + ½ρ² (see `rounding`), of
    which a bound holds D + 5.
    """
    return bound * (1 + 8 / (D + 5))


def group_size(b: int, padded: int, wanted: int) -> int:
    """Codes of a group, g: as many as `_SETS` × ``wanted`` groups allow."""
    size = GROUP
    while size > 1 and b * padded < size * _SETS * wanted:
        size //= 2
    return size


def nearest_sums(scored: Scored, book: Book, wanted: int) -> Nearest:
    """The ``wanted`` nearest continuations of each frame, the nearest first.

    Of equal ones the first, by a distance in float64 from the residual as it is.
    """
    most = 3 * wanted + _SPARE
    floor, groups, hard = _groups(scored, wanted, most)
    found = _candidates(scored, floor, groups)
    counts = torch.bincount(found.frames, minlength=len(floor))
    table, doubtful, crowded = _sorted(found, counts, scored.bound, wanted, most)
    near, scores = table.places[:, :wanted].clone(), table.scores[:, :wanted] + floor[:, None]
    hard |= counts < wanted
    if bool(doubtful.any()):
        rows = doubtful.nonzero()[:, 0]
        near[rows], scores[rows] = _settled(scored, book, table, floor, rows, wanted)
    if bool(crowded.any()):
        near[crowded], scores[crowded] = _ranked(scored, book, found.of(crowded), wanted)
    if bool(hard.any()):
        rows = hard.nonzero()[:, 0]
        step = max(1, RESCORE_ELEMENTS // (scored.anchors.shape[1] * book.padded))
        for part in rows.split(step):
            near[part], scores[part] = _nearest_wide(scored, part, book, wanted)
    return Nearest(near, scores, carried(scored.bound, book.codes.shape[1]))


def _groups(scored: Scored, wanted: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The floor t − 2B [n], the groups of the n·b·G that reach it, and frames to see whole [n].

    Those last have too many groups, or scores that overflow.
    """
    n, b = scored.anchors.shape
    scored.maxima.view(n, b, -1).add_(scored.anchors[..., None])
    floor = _reached(scored.maxima, wanted) - 2 * scored.bound
    # A code that may not be chosen scores −inf.
    floor.clamp_(min=torch.finfo(floor.dtype).min)
    reaching = scored.maxima >= floor[:, None]
    hard = (reaching.sum(1) > most) | ~scored.bound.isfinite()
    if bool(hard.any()):
        reaching &= ~hard[:, None]
    return floor, _nonzero(reaching), hard


def _reached(maxima: Tensor, wanted: int) -> Tensor:
    """What the greatest of ``wanted`` disjoint groups [n, b·G] reach, t [n]: nearly the best."""
    n, groups = maxima.shape
    while groups % 2 == 0 and groups // 2 >= _SETS * wanted:
        groups //= 2
    sets = maxima.view(n, maxima.shape[1] // groups, groups).amax(1)
    return sets.topk(wanted, sorted=False).values.amin(1) if wanted > 1 else sets.amax(1)


def _nonzero(of: Tensor) -> Tensor:
    """Places in ``of`` bool, flattened, of the few that are true: whole words are seen first."""
    if of.numel() % 8:
        return of.view(-1).nonzero()[:, 0]
    words = of.view(-1).view(torch.int64)
    some = words.nonzero()[:, 0]
    inside = words.index_select(0, some).view(torch.bool).nonzero()[:, 0]
    return some.index_select(0, inside >> 3).mul_(8).add_(inside & 7)


def _candidates(scored: Scored, floor: Tensor, groups: Tensor) -> _Candidates:
    """All in ``groups`` whose scores exceed the ``floor`` [n], and by how much."""
    b, of_frame = scored.anchors.shape[1], scored.maxima.shape[1]
    frames = groups // of_frame
    above = scored.anchors.view(-1).index_select(0, groups // (of_frame // b))
    above -= floor.index_select(0, frames)
    scores = scored.scores(groups).add_(above[:, None])
    g = scores.shape[1]
    chosen = _nonzero(scores > 0)
    group = chosen // g
    places = (groups - frames * of_frame).index_select(0, group).mul_(g).add_(chosen % g)
    return _Candidates(
        frames.index_select(0, group), places, scores.view(-1).index_select(0, chosen)
    )


class _Table(NamedTuple):
    """Candidates of each frame, the greatest score first: places and scores [n, s].

    Where there are fewer, their places are 0 and their scores −inf.
    """

    places: Tensor
    scores: Tensor
    close: Tensor


def _sorted(
    found: _Candidates, counts: Tensor, bound: Tensor, wanted: int, most: int
) -> tuple[_Table, Tensor, Tensor]:
    """The candidates of each frame, at most ``most``.

    Returns:
        They, frames [n] whose order among the ``wanted`` first may not be the true one, and others
        [n] that have more candidates.
    """
    n, greatest = counts.shape[0], int(counts.max())
    slots = min(max(greatest, wanted), most)
    first = torch.arange(0, n * slots, slots, device=counts.device)
    first -= counts.cumsum(0) - counts
    address = first.index_select(0, found.frames)
    address += torch.arange(len(found.frames), device=counts.device)
    scores, held = found.scores, found.places
    if greatest > slots:
        within = (address < (found.frames + 1) * slots).nonzero()[:, 0]
        address, scores, held = address[within], scores[within], held[within]
    table = scores.new_full((n * slots,), -torch.inf).scatter_(0, address, scores)
    ranked, order = table.view(n, slots).sort(dim=1, descending=True)
    close = ranked[:, :-1] - ranked[:, 1:] <= 2 * bound[:, None]
    crowded = counts > slots
    doubtful = close[:, :wanted].any(1) & ~crowded
    held = held.new_zeros(n * slots).scatter_(0, address, held).view(n, slots).gather(1, order)
    return _Table(held, ranked, close), doubtful, crowded


def _settled(
    scored: Scored, book: Book, table: _Table, floor: Tensor, rows: Tensor, wanted: int
) -> tuple[Tensor, Tensor]:
    """Places and −½|r − c|², [m, ``wanted``], of some ``rows`` [m] of the table in true order.

    Those within 2B of a neighbour get a score by its distance in float64, which keeps their places
    before and after all others: it is within B of the rough one.
    """
    places, rough, close = (each.index_select(0, rows) for each in table)
    linked = torch.zeros_like(places, dtype=torch.bool)
    linked[:, :-1] |= close
    linked[:, 1:] |= close
    row, slot = linked.nonzero(as_tuple=True)
    above = floor.index_select(0, rows).double()
    keys = rough.double()
    distances = _distances(scored, book, rows[row], places[row, slot])
    keys[row, slot] = -0.5 * distances - above[row]
    # Equal ones by their place.
    places, order = places.sort(dim=1)
    keys, again = keys.gather(1, order).sort(dim=1, descending=True, stable=True)
    places = places.gather(1, again[:, :wanted])
    return places, (keys[:, :wanted] + above[:, None]).float()


def _distances(scored: Scored, book: Book, frames: Tensor, places: Tensor) -> Tensor:
    """|r − c|² in float64 of continuations [m] of some frames [m]."""
    origin = places // book.padded
    sums, codes = frames * scored.anchors.shape[1] + origin, places - origin * book.padded
    step = RESCORE_ELEMENTS // book.codes.shape[1] + 1
    return torch.cat(
        [
            (scored.residuals(some).double() - book.wide.index_select(0, code)).square_().sum(1)
            for some, code in zip(sums.split(step), codes.split(step), strict=True)
        ]
    )


def _ranked(scored: Scored, book: Book, found: _Candidates, wanted: int) -> tuple[Tensor, Tensor]:
    """Places of the nearest candidates of each frame that has any, by distance in float64.

    Returns:
        They and their −½|r − c|², [m, ``wanted``].
    """
    distances = _distances(scored, book, found.frames, found.places)
    order = distances.argsort(stable=True)
    order = order[found.frames[order].argsort(stable=True)]
    counts = torch.unique_consecutive(found.frames, return_counts=True)[1]
    first = counts.cumsum(0) - counts
    kept = order[first[:, None] + torch.arange(wanted, device=first.device)]
    return found.places[kept], (-0.5 * distances[kept]).float()


def _nearest_wide(scored: Scored, frames: Tensor, book: Book, wanted: int) -> tuple[Tensor, Tensor]:
    """The same of all candidates of some ``frames`` [m], with all scores in float64."""
    b, D = scored.anchors.shape[1], book.codes.shape[1]
    mean = book.made.mean.double()
    codes = torch.zeros_like(book.made.codes, dtype=torch.float64)
    codes[: len(book.wide)] = book.wide - mean
    codes = codes.where(book.allowed[:, None], 0.0)
    rows = frames[:, None] * b + torch.arange(b, device=frames.device)
    moved = scored.residuals(rows.flatten()).double() - mean
    lengths = codes.square().sum(1)
    bias = (-0.5 * lengths).masked_fill_(~book.allowed, -torch.inf)
    anchors = moved.square().sum(1).view(-1, b)
    scores = torch.addmm(bias, moved, codes.T).view(len(frames), b, -1)
    scores = (scores - 0.5 * anchors[..., None]).view(len(frames), -1)
    reach = anchors.amax(1).sqrt() + lengths.amax().sqrt()
    margin = (D + 9) * torch.finfo(torch.float64).eps * reach.square()
    floor = scores.topk(wanted, sorted=False).values.amin(1) - margin
    some, held = (scores >= floor[:, None]).logical_and_(scores > -torch.inf).nonzero(as_tuple=True)
    return _ranked(scored, book, _Candidates(frames[some], held, scores[some, held]), wanted)
