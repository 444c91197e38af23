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
from typing import NamedTuple

import torch
from torch import Tensor

from b2t_kernels.blocked import GROUP, RESCORE_ELEMENTS, CentredCodes

_SETS = 4
"""Sets of continuations whose maxima give t, for each sum that is wanted."""
_SPARE = 16
"""Candidates of a frame that are expected at most beside three times those wanted."""


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


class Scored(NamedTuple):
    """Rough scores r·c − ½|c|² of some frames' residuals [n, b, D], both less the codes' mean.

    maxima: [n, b·G] of groups of codes. scores: those of groups [m] of the n·b·G, [m, g].
    anchors: −½|r|² [n, b]; with them, the scores are −½|r − c|². bound: [n] how far the sum of both
    may be off.
    """

    maxima: Tensor
    scores: Callable[[Tensor], Tensor]
    anchors: Tensor
    bound: Tensor
    residuals: Tensor


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


def group_size(b: int, padded: int, wanted: int) -> int:
    """Codes of a group, g: as many as `_SETS` × ``wanted`` groups allow."""
    size = GROUP
    while size > 1 and b * padded < size * _SETS * wanted:
        size //= 2
    return size


def places(index: Tensor, b: int) -> Tensor:
    """Rows in a flattened [n·b, …] of ``index`` [n, k] along the second axis of [n, b, …]."""
    return index + torch.arange(0, index.shape[0] * b, b, device=index.device)[:, None]


def nearest_sums(scored: Scored, book: Book, wanted: int) -> Tensor:
    """Places [n, ``wanted``] of the nearest continuations, the nearest first.

    Of equal ones the first, by a distance in float64 from the residual as it is.
    """
    most = 3 * wanted + _SPARE
    floor, groups, hard = _groups(scored, wanted, most)
    found = _candidates(scored, floor, groups)
    counts = torch.bincount(found.frames, minlength=len(floor))
    near, sure = _sorted(found, counts, scored.bound, wanted, most)
    hard |= counts < wanted
    doubtful = ~(sure | hard)
    if bool(doubtful.any()):
        near[doubtful] = _ranked(scored.residuals, book, found.of(doubtful), wanted)
    if bool(hard.any()):
        rows = hard.nonzero()[:, 0]
        step = max(1, RESCORE_ELEMENTS // (scored.anchors.shape[1] * book.padded))
        near[rows] = torch.cat(
            [_nearest_wide(scored.residuals[part], book, wanted) for part in rows.split(step)]
        )
    return near


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
    """Places in ``of``, flattened, of the few that are not zero: whole words are seen first."""
    if of.numel() * of.itemsize % 8:
        return of.view(-1).nonzero()[:, 0]
    words, each = of.view(-1).view(torch.int64), 8 // of.itemsize
    some = words.nonzero()[:, 0]
    inside = words.index_select(0, some).view(of.dtype).nonzero()[:, 0]
    return some.index_select(0, inside // each).mul_(each).add_(inside % each)


def _candidates(scored: Scored, floor: Tensor, groups: Tensor) -> _Candidates:
    """All in ``groups`` whose scores exceed the ``floor`` [n], and by how much."""
    b, of_frame = scored.anchors.shape[1], scored.maxima.shape[1]
    frames = groups // of_frame
    above = scored.anchors.view(-1).index_select(0, groups // (of_frame // b))
    above -= floor.index_select(0, frames)
    scores = scored.scores(groups).add_(above[:, None]).relu_()
    g = scores.shape[1]
    chosen = _nonzero(scores)
    group = chosen // g
    places = (groups - frames * of_frame).index_select(0, group).mul_(g).add_(chosen % g)
    return _Candidates(
        frames.index_select(0, group), places, scores.view(-1).index_select(0, chosen)
    )


def _sorted(
    found: _Candidates, counts: Tensor, bound: Tensor, wanted: int, most: int
) -> tuple[Tensor, Tensor]:
    """Places [n, ``wanted``] of the greatest scores, and whether their order is the true one [n].

    Candidates of a frame beyond ``most`` are not seen, and the frame is not sure.
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
    apart = ranked[:, :-1] - ranked[:, 1:] > 2 * bound[:, None]
    sure = apart[:, :wanted].all(1) & (counts <= slots)
    held = held.new_zeros(n * slots).scatter_(0, address, held)
    return held.view(n, slots).gather(1, order[:, :wanted]), sure


def _ranked(residuals: Tensor, book: Book, found: _Candidates, wanted: int) -> Tensor:
    """Places of the nearest candidates of each frame that has any, by distance in float64."""
    b, D = residuals.shape[1:]
    origin, codes = found.places // book.padded, found.places % book.padded
    rows, flat = found.frames * b + origin, residuals.flatten(0, 1)
    step = RESCORE_ELEMENTS // D + 1
    distances = torch.cat(
        [
            (flat.index_select(0, row).double() - book.wide.index_select(0, code)).square_().sum(1)
            for row, code in zip(rows.split(step), codes.split(step), strict=True)
        ]
    )
    order = distances.argsort(stable=True)
    order = order[found.frames[order].argsort(stable=True)]
    counts = torch.unique_consecutive(found.frames, return_counts=True)[1]
    first = counts.cumsum(0) - counts
    kept = first[:, None] + torch.arange(wanted, device=first.device)
    return found.places[order[kept]]


def _nearest_wide(residuals: Tensor, book: Book, wanted: int) -> Tensor:
    """The same as `nearest_sums` of residuals [n, b, D], with all scores in float64."""
    n, b, D = residuals.shape
    mean = book.made.mean.double()
    codes = torch.zeros_like(book.made.codes, dtype=torch.float64)
    codes[: len(book.wide)] = book.wide - mean
    codes = codes.where(book.allowed[:, None], 0.0)
    moved = residuals.double() - mean
    lengths = codes.square().sum(1)
    bias = (-0.5 * lengths).masked_fill_(~book.allowed, -torch.inf)
    anchors = moved.square().sum(2)
    scores = torch.addmm(bias, moved.flatten(0, 1), codes.T).view(n, b, -1)
    scores = (scores - 0.5 * anchors[..., None]).view(n, -1)
    reach = anchors.amax(1).sqrt() + lengths.amax().sqrt()
    margin = (D + 9) * torch.finfo(torch.float64).eps * reach.square()
    floor = scores.topk(wanted, sorted=False).values.amin(1) - margin
    frames, held = (
        (scores >= floor[:, None]).logical_and_(scores > -torch.inf).nonzero(as_tuple=True)
    )
    return _ranked(residuals, book, _Candidates(frames, held, scores[frames, held]), wanted)
