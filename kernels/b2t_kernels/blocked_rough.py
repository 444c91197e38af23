"""Nearest codes on a CPU that multiplies bfloat16 faster: rough scores leave nearly all codes out.

Letters: n rows, K′ codes with padding, D width, G groups of codes.

With x̃, c̃ the bfloat16 of centred rows x̂ and codes ĉ, R the largest |ĉ|, E the largest |ĉ − c̃|
and u = 2⁻²⁴, the sum that x̃·c̃ and −½|ĉ|² (as two columns more) are rounded from is off from the
score by A = |x̂ − x̃|R + |x̃|E + 4(D + 34)u(|x̃|(R + E) + R²) at most: the last covers D + 2 terms
added in float32 in any order, also where the processor rounds each product, and the two columns.
Then a score is rounded to bfloat16 (2⁻⁸) and some get the bits of a neighbour below their own
(2⁻⁷): relatively by less than v = 1/80. Let t be the greatest that is found. Its code has a score
of t − v′|t| − A at least, with v′ = v/(1 − v), so has the nearest one, whose rough score reaches
t − 2v′|t| − 2(1 + v)A, therefore. Groups that reach it less what makes two float32 scores doubtful
are scored in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from b2t_kernels.blocked_codes import GROUP, CentredCodes

ROWS = 8192
"""Rows whose groups are compared together."""
LEAST = (1024, 2048, 128)
"""Rows, codes and width from which it pays."""
MOST_GROUPS = 6
"""Groups of a row, on average, beyond which it does not."""
_ROW_BLOCK, _CODE_BLOCK = 1024, 1024
_COLUMNS = 32
"""Columns beside those of a row, of which two are used: rows of whole cache lines."""
_RELATIVE = 2 * (1 / 79)
_NEVER = -(2.0**120)
_SIZES = (2.0**-40, 2.0**50)
"""Lengths between which nothing that counts here is lost or overflows."""


@dataclass(frozen=True)
class Best:
    """Best score of each row [n], the best of any other code, and the index of the best."""

    score: Tensor
    second: Tensor
    index: Tensor


@cache
def supported() -> bool:
    """Whether this processor multiplies bfloat16."""
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return known is not None and known() and torch.backends.mkldnn.is_available()


def pays(x: Tensor, codes: CentredCodes) -> bool:
    """Whether rows x [N, D] are worth it."""
    sizes = (x.shape[0], *codes.codes.shape)
    return (
        x.device.type == "cpu"
        and codes.bias.dtype == torch.float32
        and all(size >= least for size, least in zip(sizes, LEAST, strict=True))
        and supported()
        and torch._C._get_mkldnn_enabled()
        and _SIZES[0] < float(codes.radius) < _SIZES[1]
    )


class RoughCodes:
    """A codebook in bfloat16, with −½|ĉ|² in two columns more."""

    def __init__(self, codes: CentredCodes) -> None:
        K, D = codes.codes.shape
        self.codes = codes
        self.narrow = torch.zeros(K, D + _COLUMNS, dtype=torch.bfloat16)
        self.narrow[:, :D] = codes.codes
        finite = codes.bias > -torch.inf
        off = (codes.codes - self.narrow[:, :D]).norm(dim=1)
        self.error = off.where(finite, 0).amax()
        # An infinity with other bits below it were no number.
        bias = codes.bias.where(finite, _NEVER)
        self.narrow[:, D] = bias
        self.narrow[:, D + 1] = (bias - self.narrow[:, D]).where(finite, 0)

    def nearest(self, rows: Tensor) -> Best | None:
        """The nearest codes of centred rows [n, D]; None if too many groups are in question.

        The score of a row whose length is not that of `_SIZES` is −inf.
        """
        maxima, gap = self._maxima(rows)
        top = maxima.amax(1)
        near = maxima >= (top - gap - _RELATIVE * top.abs())[:, None]
        if int(near.sum()) > MOST_GROUPS * len(rows):
            return None
        group, row = near.T.nonzero(as_tuple=True)
        return self._best(rows, row, group)

    def _maxima(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Greatest rough score of each group [n, G], and 2(1 + v)A and what is doubtful, [n]."""
        (n, D), K = rows.shape, self.narrow.shape[0]
        maxima = rows.new_empty(n, K // GROUP)
        gap = rows.new_empty(n)
        room = torch.empty(_ROW_BLOCK * _CODE_BLOCK, dtype=torch.bfloat16)
        narrow = torch.zeros(min(n, _ROW_BLOCK), D + _COLUMNS, dtype=torch.bfloat16)
        narrow[:, D : D + 2] = 1
        for start in range(0, n, _ROW_BLOCK):
            part = rows[start : start + _ROW_BLOCK]
            some = narrow[: len(part)]
            some[:, :D] = part
            gap[start : start + _ROW_BLOCK] = self._gap(part, some[:, :D])
            for first in range(0, K, _CODE_BLOCK):
                codes = self.narrow[first : first + _CODE_BLOCK]
                scores = room[: len(part) * len(codes)].view(len(part), -1)
                torch.mm(some, codes.T, out=scores)
                # As float32, every second score with its neighbour's bits below, then that one.
                pairs = scores.view(torch.float32).view(len(part), -1, GROUP // 2)
                groups = slice(first // GROUP, first // GROUP + pairs.shape[1])
                into = maxima[start : start + _ROW_BLOCK, groups]
                torch.amax(pairs, 2, out=into)
                scores.view(torch.int32).bitwise_left_shift_(16)
                torch.maximum(into, pairs.amax(2), out=into)
        return maxima, gap

    def _gap(self, rows: Tensor, narrow: Tensor) -> Tensor:
        """2(1 + v)A of rows [n, D], and twice what makes float32 scores doubtful, [n]."""
        D, radius = rows.shape[1], self.codes.radius
        unit = torch.finfo(torch.float32).eps / 2
        wide = narrow.float()
        length = wide.norm(dim=1)
        off = (rows - wide).norm(dim=1) * radius + length * self.error
        off += 4 * (D + 34) * unit * (length * (radius + self.error) + radius.square())
        doubtful = 4 * (D + 6) * unit * (1.01 * length + 0.5 * radius) * radius
        gap = (2 * (1 + 1 / 79) * (1 + 2.0**-10)) * off + doubtful + 2.0**-90
        return gap.where((length < _SIZES[1]), torch.nan)

    def _best(self, rows: Tensor, row: Tensor, group: Tensor) -> Best:
        """The best of the codes of pairs of a row [m] and a group [m], which are in order."""
        n, m = rows.shape[0], row.shape[0]
        score, second = rows.new_empty(2, m)
        index = torch.empty_like(row)
        start = 0
        for g, count in enumerate(torch.bincount(group).tolist()):
            pairs, codes = slice(start, start + count), slice(g * GROUP, (g + 1) * GROUP)
            start += count
            if count:
                some = rows.index_select(0, row[pairs])
                scores = torch.addmm(self.codes.bias[codes], some, self.codes.codes[codes].T)
                found = scores.argmax(1)
                score[pairs] = scores.gather(1, found[:, None])[:, 0]
                second[pairs] = scores.scatter_(1, found[:, None], -torch.inf).amax(1)
                index[pairs] = found.add_(g * GROUP)
        best = rows.new_full((n,), -torch.inf).scatter_reduce_(0, row, score, "amax")
        won = score == best[row]
        rest = rows.new_full((n,), -torch.inf)
        rest.scatter_reduce_(0, row, second.where(won, score), "amax")
        winners = torch.zeros_like(row[:1]).new_zeros(n).scatter_add_(0, row, won.long())
        nearest = torch.full_like(winners, self.narrow.shape[0])
        nearest.scatter_reduce_(0, row[won], index[won], "amin")
        nearest.masked_fill_(winners == 0, 0)
        return Best(best, best.where(winners > 1, rest), nearest)
