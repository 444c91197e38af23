"""Blocked torch implementations, multi-threaded by torch: what a CPU runs.

The same code serves a CUDA tensor that cannot use the Triton kernels. Scores are computed in
float32 (float64 where x is float64), for blocks that stay in the cache, and never kept.
"""

import torch
from torch import Tensor
from torch.nn import functional

ROW_BLOCK, CODE_BLOCK, GROUP = 2048, 1024, 64
USAGE_ELEMENTS = 1 << 19
RESCORE_ELEMENTS = 1 << 18


def working_dtype(x: Tensor) -> torch.dtype:
    """Float64 stays float64; everything else is computed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def lowest_duplicate(codebook: Tensor, bias: Tensor) -> Tensor | None:
    """For each code, the lowest index of an identical code, [K]; None if all codes differ.

    A matrix product may round equal columns differently at the edge of a block, so ties between
    identical codes are settled here and not by comparing scores.
    """
    _, group, members = torch.unique(bias, return_inverse=True, return_counts=True)
    suspects = (members[group] > 1).nonzero()[:, 0]
    if not suspects.numel():
        return None
    _, inverse = torch.unique(codebook[suspects], dim=0, return_inverse=True)
    lowest = torch.full_like(suspects, codebook.shape[0])
    lowest.scatter_reduce_(0, inverse, suspects, "amin")
    first = torch.arange(codebook.shape[0], device=codebook.device)
    first[suspects] = lowest[inverse]
    return first


class CentredCodes:
    """A codebook moved to its mean and padded to whole groups, with −½|c|² beside it.

    Centring keeps a common offset of the data out of the rounding. Codes that are not finite and
    the padding get −inf and are never chosen.
    """

    def __init__(self, codebook: Tensor, dtype: torch.dtype):
        codebook = codebook.to(dtype)
        K, D = codebook.shape
        finite = codebook.isfinite().all(dim=1)
        safe = torch.where(finite[:, None], codebook, 0)
        self.mean = safe.sum(dim=0) / finite.sum().clamp(min=1)
        padded = (K + GROUP - 1) // GROUP * GROUP
        self.codes = safe.new_zeros(padded, D)
        torch.sub(safe, self.mean, out=self.codes[:K])
        bias = self.codes.square().sum(dim=1).mul_(-0.5)
        self.duplicates = lowest_duplicate(safe, bias[:K])
        bias[:K].masked_fill_(~finite, -torch.inf)
        bias[K:] = -torch.inf
        self.bias = bias
        self.radius = (
            self.codes[:K][finite].norm(dim=1).max() if finite.any() else bias.new_zeros(())
        )

    def centre(self, x: Tensor) -> Tensor:
        """Rows of x in the working precision, moved by the codebook's mean."""
        return x.to(self.mean.dtype) - self.mean


def _search_block(
    rows: Tensor, codes: CentredCodes, buffer: Tensor, runner_up: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Best score, its index and (if asked for) the second-best score of centred rows [n, D].

    Maxima are taken over groups of 64 codes; the index is looked up in the winning group alone, and
    only for rows that a block of codes improves, which is a few per cent of a full argmax. The
    scores of one block of codes live in ``buffer``.
    """
    n, K = rows.shape[0], codes.codes.shape[0]
    best = rows.new_full((n,), -torch.inf)
    second = best.clone()
    winner = torch.zeros(n, dtype=torch.int64, device=rows.device)
    for start in range(0, K, CODE_BLOCK):
        block = slice(start, min(start + CODE_BLOCK, K))
        groups = (block.stop - start) // GROUP
        scores = buffer[: n * groups * GROUP].view(n, groups * GROUP)
        torch.addmm(codes.bias[block], rows, codes.codes[block].T, out=scores)
        maxima = scores.view(n, groups, GROUP).amax(dim=2)
        top, group = maxima.max(dim=1)
        improved = (top > best).nonzero()[:, 0]
        chosen = group[improved]
        candidates = scores.view(n * groups, GROUP)[improved * groups + chosen]
        column = candidates.argmax(dim=1)
        if runner_up:
            maxima.scatter_(1, group[:, None], -torch.inf)
            rest = maxima.amax(dim=1)
            candidates.scatter_(1, column[:, None], -torch.inf)
            rest[improved] = torch.maximum(rest[improved], candidates.amax(dim=1))
            second = torch.maximum(second, torch.maximum(rest, torch.minimum(top, best)))
        winner[improved] = start + chosen * GROUP + column
        best = torch.maximum(best, top)
    return best, winner, second


def _rescore(x: Tensor, codebook: Tensor) -> Tensor:
    """Float64 answer for a few rows: a float64 search, then |x − c|² summed for its near ties."""
    wide = CentredCodes(codebook, torch.float64)
    allowed = wide.bias > -torch.inf
    if wide.duplicates is not None:
        positions = torch.arange(codebook.shape[0], device=x.device)
        allowed[: codebook.shape[0]] &= wide.duplicates == positions
    K, D = wide.codes.shape
    winner = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    step = max(1, RESCORE_ELEMENTS // K)
    for start in range(0, x.shape[0], step):
        rows = wide.centre(x[start : start + step])
        scores = torch.addmm(wide.bias, rows, wide.codes.T).masked_fill_(~allowed, -torch.inf)
        reach = rows.norm(dim=1) + wide.radius
        margin = 4 * (D + 4) * torch.finfo(torch.float64).eps * reach.square()
        near = scores >= (scores.amax(dim=1) - margin)[:, None]
        row, code = near.nonzero(as_tuple=True)
        distance = torch.cat(
            [
                (x[start + r].double() - codebook[c].double()).square().sum(dim=1)
                for r, c in zip(
                    row.split(RESCORE_ELEMENTS // D + 1),
                    code.split(RESCORE_ELEMENTS // D + 1),
                    strict=True,
                )
            ]
        )
        exact = torch.full_like(scores, torch.inf)
        exact[row, code] = distance
        winner[start : start + step] = exact.argmin(dim=1)
    return winner


def nearest_code(
    x: Tensor, codebook: Tensor, mask: Tensor | None, exact: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`b2t_kernels.nearest_code`.

    With ``exact``, every row whose two best float32 scores differ by less than twice the bound
    below is searched again in float64. With u the unit roundoff, |x̂|, |ĉ| the centred norms and R
    the largest |ĉ|, centring adds at most u(|x̂| + R) to a vector and a D-term product plus the bias
    at most (D + 2)u(|x̂| + R)², so a score is off by no more than (D + 5)u(|x̂| + R)².
    """
    N, K = x.shape[0], codebook.shape[0]
    codes = CentredCodes(codebook, working_dtype(x))
    indices = torch.empty(N, dtype=torch.int64, device=x.device)
    doubtful = torch.zeros(N, dtype=torch.bool, device=x.device)
    unit = torch.finfo(codes.mean.dtype).eps / 2
    buffer = codes.mean.new_empty(min(ROW_BLOCK, N) * min(CODE_BLOCK, codes.bias.numel()))
    for start in range(0, N, ROW_BLOCK):
        block = slice(start, start + ROW_BLOCK)
        rows = codes.centre(x[block])
        best, winner, second = _search_block(rows, codes, buffer, exact)
        valid = best.isfinite()
        if mask is not None:
            valid &= mask[block]
        if exact:
            reach = rows.norm(dim=1) + codes.radius
            bound = (x.shape[1] + 5) * unit * reach.square()
            doubtful[block] = valid & (best - second <= 2 * bound)
        indices[block] = torch.where(valid, winner, -1)
    again = doubtful.nonzero()[:, 0]
    if again.numel():
        indices[again] = _rescore(x[again], codebook)
    if codes.duplicates is not None:
        indices = torch.where(indices < 0, -1, codes.duplicates[indices.clamp(0, K - 1)])
    return indices, count_codes(indices, K)


def count_codes(indices: Tensor, K: int) -> Tensor:
    """How often each code 0..K−1 occurs in indices; −1 is not counted. [K] int64."""
    return torch.bincount(indices + 1, minlength=K + 1)[1:].clone()


def rvq_encode(
    x: Tensor, codebooks: Tensor, mask: Tensor | None, exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`b2t_kernels.rvq_encode`: one search per layer on the residual of the last."""
    residual = x.to(working_dtype(x), copy=True)
    quantized = torch.zeros_like(residual)
    indices, counts = [], []
    for codebook in codebooks.to(residual.dtype):
        index, count = nearest_code(residual, codebook, mask, exact)
        chosen = codebook[index.clamp(min=0)].masked_fill_((index < 0)[:, None], 0)
        residual -= chosen
        quantized += chosen
        indices.append(index)
        counts.append(count)
    return torch.stack(indices, dim=1), torch.stack(counts), quantized


def code_sums(x: Tensor, indices: Tensor, K: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """See :func:`b2t_kernels.code_sums`: rows sorted by code, then summed in their own order."""
    if mask is not None:
        indices = indices.masked_fill(~mask, -1)
    bins = indices + 1
    counts = torch.bincount(bins, minlength=K + 1)
    order = bins.argsort(stable=True)
    offsets = counts.cumsum(0) - counts
    rows = x.to(working_dtype(x))
    if not x.shape[0]:
        return rows.new_zeros(K, x.shape[1]), counts[1:].clone()
    sums = functional.embedding_bag(
        order[int(counts[0]) :], rows, (offsets - counts[0])[1:], mode="sum"
    )
    return sums, counts[1:].clone()


def _usable(x: Tensor, mask: Tensor | None) -> Tensor:
    # Unlike isfinite over all of x, without a temporary of its size.
    valid = x.amax(dim=1).isfinite() & x.amin(dim=1).isfinite()
    return valid if mask is None else valid & mask


def _logits(rows: Tensor, codes: CentredCodes, temperature: Tensor) -> Tensor:
    return torch.addmm(codes.bias, rows, codes.codes.T).mul_(2 / temperature)


def usage_forward(
    x: Tensor, codebook: Tensor, temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed soft assignments [K], log-sum-exp of each row [N] (+inf where invalid), valid rows."""
    codes = CentredCodes(codebook, working_dtype(x))
    temperature = temperature.to(codes.mean)
    valid = _usable(x, mask)
    total = torch.zeros_like(codes.bias)
    lse = codes.mean.new_full((x.shape[0],), torch.inf)
    step = max(1, USAGE_ELEMENTS // codes.bias.numel())
    for start in range(0, x.shape[0], step):
        kept = valid[start : start + step].nonzero()[:, 0] + start
        logits = _logits(codes.centre(x[kept]), codes, temperature)
        lse[kept] = logits.logsumexp(dim=1)
        total += logits.sub_(lse[kept, None]).exp_().sum(dim=0)
    return total[: codebook.shape[0]].clone(), lse, valid.sum()


def usage_backward(
    grad: Tensor, x: Tensor, codebook: Tensor, temperature: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of Σ_k grad_k · usage_k for x and the codebook.

    With p the assignments and w = p ⊙ (grad − Σ_k p grad), rows of w sum to zero, so that
    ∂x_n = (2/τ) Σ_k w_nk c_k and ∂c_k = (2/τ) Σ_n w_nk (x_n − c_k).
    """
    K = codebook.shape[0]
    codes = CentredCodes(codebook, working_dtype(x))
    temperature = temperature.to(codes.mean)
    padded = functional.pad(grad.to(codes.mean), (0, codes.bias.numel() - K))
    grad_x = torch.zeros_like(x, dtype=codes.mean.dtype)
    grad_codes = torch.zeros_like(codes.codes)
    weight = torch.zeros_like(codes.bias)
    valid = lse.isfinite()
    step = max(1, USAGE_ELEMENTS // codes.bias.numel())
    for start in range(0, x.shape[0], step):
        kept = valid[start : start + step].nonzero()[:, 0] + start
        rows = codes.centre(x[kept])
        p = _logits(rows, codes, temperature).sub_(lse[kept, None]).exp_()
        w = p.mul_(padded - (p @ padded)[:, None])
        grad_x[kept] = w @ codes.codes
        grad_codes.addmm_(w.T, rows)
        weight += w.sum(dim=0)
    grad_codes.addcmul_(weight[:, None], codes.codes, value=-1)
    scale = 2 / temperature
    return grad_x.mul_(scale).to(x.dtype), grad_codes.mul_(scale)[:K].to(codebook.dtype)
