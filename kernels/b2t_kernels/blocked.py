"""Blocked torch implementations, multi-threaded by torch: what a CPU runs.

The same code serves a CUDA tensor that cannot use the Triton kernels. Scores are computed in
float32 (float64 where x is float64), for blocks that stay in the cache, and never kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from b2t_kernels import blocked_rough
from b2t_kernels.blocked_codes import (
    GROUP,
    CentredCodes,
    centre_codes,
    usable_rows,
    working_dtype,
)
from b2t_kernels.gumbel import noise

ROW_BLOCK, CODE_BLOCK = 512, 1024
USAGE_ELEMENTS = 1 << 21
RESCORE_ELEMENTS = 1 << 18


class _Best:
    """Best score of some rows, its index and (if asked for) the second-best score.

    Maxima are taken over groups of 64 codes; the index is looked up in the winning group alone, and
    only for rows that a block of codes improves, which is a few per cent of a full argmax.
    """

    def __init__(self, rows: Tensor, runner_up: bool) -> None:
        n = rows.shape[0]
        self.score = rows.new_full((n,), -torch.inf)
        self.second = self.score.clone()
        self.index = torch.zeros(n, dtype=torch.int64, device=rows.device)
        self.runner_up = runner_up

    def fold(self, scores: Tensor, start: int) -> None:
        """Take scores [n, k] of codes from ``start`` on, k whole groups."""
        n = scores.shape[0]
        groups = scores.shape[1] // GROUP
        maxima = scores.view(n, groups, GROUP).amax(dim=2)
        top, group = maxima.max(dim=1)
        improved = (top > self.score).nonzero()[:, 0]
        chosen = group[improved]
        candidates = scores.view(n * groups, GROUP)[improved * groups + chosen]
        column = candidates.argmax(dim=1)
        if self.runner_up:
            maxima.scatter_(1, group[:, None], -torch.inf)
            rest = maxima.amax(dim=1)
            candidates.scatter_(1, column[:, None], -torch.inf)
            rest[improved] = torch.maximum(rest[improved], candidates.amax(dim=1))
            rest = torch.maximum(rest, torch.minimum(top, self.score))
            self.second = torch.maximum(self.second, rest)
        self.index[improved] = start + chosen * GROUP + column
        self.score = torch.maximum(self.score, top)


def _nearest_of(x: Tensor, codebook: Tensor, row: Tensor, code: Tensor) -> Tensor:
    """Of the pairs (row, code), the code nearest to each row of x by |x − c|² in float64, [n].

    Pairs are sorted by row, then code; every row occurs.
    """
    step = RESCORE_ELEMENTS // x.shape[1] + 1
    pairs = zip(row.split(step), code.split(step), strict=True)
    distance = torch.cat(
        [(x[r].double() - codebook[c].double()).square().sum(dim=1) for r, c in pairs]
    )
    least = distance.new_full((x.shape[0],), torch.inf)
    least.scatter_reduce_(0, row, distance, "amin")
    nearest = torch.full_like(least, codebook.shape[0], dtype=torch.int64)
    tied = distance == least[row]
    return nearest.scatter_reduce_(0, row[tied], code[tied], "amin")


def _search_wide(x: Tensor, codebook: Tensor) -> Tensor:
    """Float64 answer for rows whose float32 scores overflow; −1 if no code is finite."""
    wide = centre_codes(codebook, torch.float64)
    allowed = wide.allowed()
    if not bool(allowed.any()):
        return torch.full_like(x[:, 0], -1, dtype=torch.int64)
    K, D = wide.codes.shape
    winners = [torch.empty(0, dtype=torch.int64, device=x.device)]
    for part in x.split(max(1, RESCORE_ELEMENTS // K)):
        rows = wide.centre(part)
        scores = torch.addmm(wide.bias, rows, wide.codes.T).masked_fill_(~allowed, -torch.inf)
        reach = rows.norm(dim=1) + wide.radius
        margin = 4 * (D + 4) * torch.finfo(torch.float64).eps * reach.square()
        near = scores >= (scores.amax(dim=1) - margin)[:, None]
        winners.append(_nearest_of(part, codebook, *(near & allowed).nonzero(as_tuple=True)))
    return torch.cat(winners)


def _settle_close(
    x: Tensor, codebook: Tensor, codes: CentredCodes, best: Tensor, index: Tensor
) -> Tensor:
    """Nearest codes of rows [n, D] with a ``best`` score, that of code ``index``, in float64.

    Scores are computed once more. Each is off by its own code's bound at most (`_Search`'s with
    |ĉ| for R, and 3u more for the comparison's own roundings), then and now: |x − c|² is computed
    for codes alone whose score reaches ``best`` less both bounds.
    """
    numbers = torch.finfo(codes.bias.dtype)
    allowed, length = codes.allowed(), codes.bias.mul(-2).sqrt().clamp(min=numbers.tiny**0.5)
    unit = (x.shape[1] + 8) * numbers.eps / 2
    bounds = torch.stack([length, 0.5 * length.square()]) * unit
    step = max(1, 4 * RESCORE_ELEMENTS // codes.bias.numel())
    winners = [torch.empty(0, dtype=torch.int64, device=x.device)]
    for part, score, of in zip(x.split(step), best.split(step), index.split(step), strict=True):
        rows = codes.centre(part)
        sizes = torch.stack([rows.norm(dim=1), torch.ones_like(score)], dim=1)
        least = score - (sizes * bounds.T[of]).sum(dim=1)
        scores = torch.addmm(codes.bias, rows, codes.codes.T).addmm_(sizes, bounds)
        near = (scores >= least[:, None]) & allowed
        winners.append(_nearest_of(part, codebook, *near.nonzero(as_tuple=True)))
    return torch.cat(winners)


class _Search:
    """Indices of all rows, filled in block by block, and what is left to settle.

    With ``exact``, every row whose two best scores differ by less than twice the bound below is
    settled in float64. With u the unit roundoff, |x̂|, |ĉ| the centred norms and R the largest |ĉ|,
    centring changes a score by at most 2u|x̂|R + uR², a D-term product is off by Du|x̂|R, the bias by
    (D + 1)u·½R² and their sum by u(|x̂|R + ½R²): together by less than (D + 5)u(|x̂| + ½R)R.
    """

    def __init__(
        self, x: Tensor, codebook: Tensor, codes: CentredCodes, valid: Tensor, exact: bool
    ) -> None:
        self.x, self.codebook, self.codes, self.valid, self.exact = (
            x, codebook, codes, valid, exact,
        )  # fmt: skip
        N = x.shape[0]
        self.indices = torch.empty(N, dtype=torch.int64, device=x.device)
        self.best = codes.mean.new_zeros(N)
        self.bound = codes.mean.new_zeros(N)
        self.doubtful = torch.zeros(N, dtype=torch.bool, device=x.device)

    def take(self, block: slice | Tensor, rows: Tensor, best: _Best | blocked_rough.Best) -> None:
        """Keep what was found for centred ``rows``, which are ``block`` of all."""
        self.indices[block] = best.index
        # A row or a code too long for float32 squares is found in float64.
        sure = best.score.isfinite() & self.codes.radius.square().isfinite()
        if self.exact:
            unit = torch.finfo(rows.dtype).eps / 2
            reach = rows.norm(dim=1) + 0.5 * self.codes.radius
            bound = (rows.shape[1] + 5) * unit * self.codes.radius * reach
            sure &= best.score - best.second > 2 * bound
            self.best[block], self.bound[block] = best.score, bound
        else:
            self.best[block] = best.score
        self.doubtful[block] = ~sure

    def settled(self) -> tuple[Tensor, Tensor]:
        """Indices [N], −1 where not valid, and counts [K]."""
        K, duplicates = self.codebook.shape[0], self.codes.duplicates
        again = (self.doubtful & self.valid).nonzero()[:, 0]
        if again.numel():
            held = self.best[again].isfinite() & self.bound[again].isfinite()
            held &= self.codes.radius.square().isfinite()
            close, far = again[held], again[~held]
            if close.numel():
                self.indices[close] = _settle_close(
                    self.x[close], self.codebook, self.codes, self.best[close], self.indices[close]
                )
            if far.numel():
                self.indices[far] = _search_wide(self.x[far], self.codebook)
        self.indices.masked_fill_(~self.valid, -1)
        if duplicates.numel():
            first = duplicates[self.indices.clamp(0, K - 1)]
            self.indices = torch.where(self.indices < 0, -1, first)
        return self.indices, count_codes(self.indices, K)


def nearest_code(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    exact: bool,
    codes: CentredCodes | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`b2t_kernels.nearest_code`."""
    codes = codes or centre_codes(codebook, working_dtype(x))
    search = _Search(x, codebook, codes, usable_rows(x, mask), exact)
    N, padded, start = x.shape[0], codes.bias.numel(), 0
    rough = blocked_rough.RoughCodes(codes) if blocked_rough.pays(x, codes) else None
    while rough is not None and start < N:
        block = slice(start, start + blocked_rough.ROWS)
        rows = codes.centre(x[block])
        found = rough.nearest(rows)
        if found is None:
            break
        search.take(block, rows, found)
        start += blocked_rough.ROWS
    buffer = codes.mean.new_empty(min(ROW_BLOCK, N) * min(CODE_BLOCK, padded))
    for first_row in range(start, N, ROW_BLOCK):
        block = slice(first_row, first_row + ROW_BLOCK)
        rows = codes.centre(x[block])
        best = _Best(rows, exact)
        for first in range(0, padded, CODE_BLOCK):
            part = slice(first, min(first + CODE_BLOCK, padded))
            best.fold(codes.scores(rows, part, buffer), first)
        search.take(block, rows, best)
    return search.settled()


def sample_code(
    x: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    row_keys: Tensor,
    code_keys: Tensor,
    codes: CentredCodes | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`b2t_kernels.sample_code`."""
    codes = codes or centre_codes(codebook, working_dtype(x))
    (N, _), K = x.shape, codebook.shape[0]
    every, valid = slice(0, K), usable_rows(x, None)
    step = max(1, USAGE_ELEMENTS // K)
    buffer = codes.mean.new_empty(min(step, N) * K)
    indices = torch.empty(N, dtype=torch.int64, device=x.device)
    for start in range(0, N, step):
        part = slice(start, start + step)
        scores = codes.scores(codes.centre(x[part]), every, buffer).mul_(2.0 / temperature)
        indices[part] = scores.add_(noise(row_keys[part], code_keys)).argmax(dim=1)
    indices.masked_fill_(~valid | ~(codes.bias[every] > -torch.inf).any(), -1)
    return indices, count_codes(indices, K)


def count_codes(indices: Tensor, K: int) -> Tensor:
    """How often each code 0..K−1 occurs in indices; −1 is not counted. [K] int64."""
    return torch.bincount(indices + 1, minlength=K + 1)[1:].clone()


def code_sums(
    x: Tensor, indices: Tensor, K: int, mask: Tensor | None, known: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`b2t_kernels.code_sums`: rows sorted by code, then summed in their own order."""
    indices = indices.masked_fill((indices < 0) | (indices >= K), -1)
    if mask is not None:
        indices = indices.masked_fill(~mask, -1)
    counts = count_codes(indices, K) if known is None else known.clone()
    order = indices.argsort(stable=True)
    left_out = x.shape[0] - int(counts.sum())
    rows = x.to(working_dtype(x))
    if not x.shape[0]:
        return rows.new_zeros(K, x.shape[1]), counts
    sums = functional.embedding_bag(order[left_out:], rows, counts.cumsum(0) - counts, mode="sum")
    return sums, counts


class _Assignments:
    """Soft assignments p of blocks of rows, with two buffers that are used again and again.

    torch's softmax is several times faster than its exp, which takes the logits far below the best
    one by a slow path.
    """

    def __init__(self, codes: CentredCodes, temperature: Tensor, N: int) -> None:
        self.codes = codes
        self.factor = 2 / temperature.to(codes.mean)
        padded = codes.bias.numel()
        self.step = max(1, USAGE_ELEMENTS // padded)
        self.buffers = codes.mean.new_empty(2, min(self.step, N) * padded)

    def scores(self, rows: Tensor) -> Tensor:
        """Scores of centred rows [n, D] and all codes, [n, K′], in the first buffer."""
        return self.codes.scores(rows, slice(None), self.buffers[0])

    def normalized(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """P [n, K′], in place of the scores, and the logits' log-sum-exp [n]."""
        logits = self.spare(scores)
        torch.mul(scores, self.factor, out=logits)
        p = torch.softmax(logits, dim=1, out=scores)
        return p, logits.amax(dim=1) - p.amax(dim=1).log()

    def spare(self, p: Tensor) -> Tensor:
        """The second buffer in the shape of p."""
        return self.buffers[1][: p.numel()].view(p.shape)


def usage_forward(
    x: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    mask: Tensor | None,
    codes: CentredCodes | None = None,
    exact: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Soft assignments, and with ``exact`` not None the nearest codes from the same scores.

    Returns:
        total [K] summed assignments, lse [N] log-sum-exp of each row (+inf where invalid), valid
        rows [], indices [N] and counts [K] (empty where not asked for).
    """
    codes = codes or centre_codes(codebook, working_dtype(x))
    K, N = codebook.shape[0], x.shape[0]
    valid = usable_rows(x, mask)
    search = None if exact is None else _Search(x, codebook, codes, valid, exact)
    soft = _Assignments(codes, temperature, N)
    total = torch.zeros_like(codes.bias)
    lse = codes.mean.new_full((N,), torch.inf)
    for start in range(0, N, soft.step):
        kept = valid[start : start + soft.step].nonzero()[:, 0] + start
        rows = codes.centre(x[kept])
        scores = soft.scores(rows)
        if search is not None:
            best = _Best(rows, search.exact)
            best.fold(scores, 0)
            search.take(kept, rows, best)
        p, lse[kept] = soft.normalized(scores)
        total += p.sum(dim=0)
    nothing = torch.empty(0, dtype=torch.int64, device=x.device)
    indices, counts = (nothing, nothing.clone()) if search is None else search.settled()
    return total[:K].clone(), lse, valid.sum(), indices, counts


def usage_backward(
    grad: Tensor,
    x: Tensor,
    codebook: Tensor,
    temperature: Tensor,
    lse: Tensor,
    codes: CentredCodes | None = None,
    wanted: tuple[bool, bool] = (True, True),
) -> tuple[Tensor, Tensor]:
    """Gradients of Σ_k grad_k · usage_k for x and the codebook; empty where not ``wanted``.

    With p the assignments and w = p ⊙ (grad − Σ_k p grad), rows of w sum to zero, so that
    ∂x_n = (2/τ) Σ_k w_nk c_k and ∂c_k = (2/τ) Σ_n w_nk (x_n − c_k).
    """
    K, N = codebook.shape[0], x.shape[0]
    codes = codes or centre_codes(codebook, working_dtype(x))
    padded = functional.pad(grad.to(codes.mean), (0, codes.bias.numel() - K))
    grad_x = torch.zeros_like(x if wanted[0] else x[:0], dtype=codes.mean.dtype)
    grad_codes = torch.zeros_like(codes.codes if wanted[1] else codes.codes[:0])
    weight = torch.zeros_like(codes.bias)
    valid = lse.isfinite()
    soft = _Assignments(codes, temperature, N)
    for start in range(0, N, soft.step):
        kept = valid[start : start + soft.step].nonzero()[:, 0] + start
        rows = codes.centre(x[kept])
        p, _ = soft.normalized(soft.scores(rows))
        w = torch.sub(padded, (p @ padded)[:, None], out=soft.spare(p)).mul_(p)
        if wanted[0]:
            grad_x[kept] = w @ codes.codes
        if wanted[1]:
            grad_codes.addmm_(w.T, rows)
            weight += w.sum(dim=0)
    if wanted[1]:
        grad_codes.addcmul_(weight[:, None], codes.codes, value=-1)
    scale = soft.factor
    return grad_x.mul_(scale).to(x.dtype), grad_codes.mul_(scale)[:K].to(codebook.dtype)
