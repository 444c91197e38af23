"""The work that scripts/tune_kernels.py gives each kernel: data, operators, and right answers."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

from b2t_kernels import cuda, gumbel, reference

CHECKED = 256
BEAM, LAYERS = 8, 3
BLOCK_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class Size:
    """N rows, K codes, D width."""

    N: int
    K: int
    D: int

    def __str__(self) -> str:
        return f"{self.N} × {self.K} × {self.D}"


class Work:
    """Rows scattered about codes, every operator on them, and what float64 says of the answers.

    Rows are float32 where they are few, as a quantizer's residuals, and fp16 otherwise.
    """

    def __init__(self, size: Size, device: str) -> None:
        self.size, N, K, D = size, size.N, size.K, size.D
        generator = torch.Generator(device).manual_seed(N + K + D)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        self.codebook = normal(K, D)
        drawn = torch.randint(K, (N,), generator=generator, device=device)
        x = self.codebook[drawn] + 0.7 * normal(N, D)
        self.x = x.half() if N > 1 << 14 else x
        self.tau = torch.tensor(float(D), device=device)
        self.grad = normal(K)
        rows, codes = torch.arange(N, device=device), torch.arange(K, device=device)
        self.keys = gumbel.mix(rows), gumbel.mix(-codes - 1)
        self.books = [0.6**q * self.codebook for q in range(LAYERS)]
        self.indices = torch.zeros(N, dtype=torch.int64, device=device)
        self.counts = torch.zeros(K, dtype=torch.int64, device=device)
        self.lse = torch.zeros(N, device=device)
        self.prepared = cuda.prepare_codes(torch.stack(self.books))
        self.truth: dict[str, Any] = {}

    def solve(self) -> None:
        """The inputs that operators find for one another, and the truth."""
        self.prepared = cuda.prepare_codes(torch.stack(self.books))
        _, self.lse, _, self.indices, self.counts = self.soft()
        wide, codes = self.x[:CHECKED].double(), self.codebook.double()
        distances = reference.squared_distances(self.x[:CHECKED], self.codebook)
        self.truth = {"distances": distances, "nearest": distances.argmin(dim=1)}
        noisy = -distances / self.tau.double() + gumbel.noise(self.keys[0][:CHECKED], self.keys[1])
        best = noisy.topk(2)
        clear = best.values[:, 0] - best.values[:, 1] > 0.05
        self.truth["drawn"] = clear, best.indices[:, 0]
        sums = torch.zeros_like(codes)
        self.truth["sums"] = sums.index_add_(0, self.indices, self.x.double())
        self.truth["left"] = wide - codes[self.indices[:CHECKED]]
        if self.size.D <= cuda.tuning.WIDEST_USAGE:
            self._solve_usage()

    def _solve_usage(self) -> None:
        """Σ_n p_nk, and the gradients of Σ_k g_k Σ_n p_nk, by blocks of rows."""
        tau, grad, codes = self.tau.double(), self.grad.double(), self.codebook.double()
        usage, pulled, rows = torch.zeros_like(grad), torch.zeros_like(codes), []
        for part in self.x.split(max(1, BLOCK_ELEMENTS // self.size.K)):
            wide = part.double()
            p = ((2 * wide @ codes.T - codes.square().sum(dim=1)) / tau).softmax(dim=1)
            usage += p.sum(dim=0)
            w = p * (grad - (p @ grad)[:, None])
            rows.append(2 / tau * w @ codes)
            pulled += 2 / tau * (w.T @ wide - w.sum(dim=0)[:, None] * codes)
        self.truth |= {"usage": usage, "rows": torch.cat(rows), "pulled": pulled}

    def prepare(self) -> Any:
        """Three launches that make a codebook ready."""
        return cuda.prepare_codes(self.codebook[None])

    def fast(self) -> Any:
        """The nearest codes."""
        return cuda.nearest_code(self.x, self.codebook, None, False, self.prepared[0])

    def exact(self) -> Any:
        """The nearest codes, proven."""
        return cuda.nearest_code(self.x, self.codebook, None, True, self.prepared[0])

    def soft(self) -> Any:
        """The nearest codes and soft assignments; without these where D is too wide."""
        if self.size.D > cuda.tuning.WIDEST_USAGE:
            indices, counts = self.exact()
            return None, self.lse, None, indices, counts
        return cuda.usage_forward(self.x, self.codebook, self.tau, None, True, self.prepared[0])

    def gradients(self) -> Any:
        """Of the soft assignments, for rows and codes."""
        wanted, prepared = (True, True), self.prepared[0]
        return cuda.usage_backward(
            self.grad, self.x, self.codebook, self.tau, self.lse, wanted, prepared
        )

    def draw(self) -> Any:
        """Codes drawn from the soft assignment."""
        return cuda.sample_code(self.x, self.codebook, self.tau, *self.keys, self.prepared[0])

    def beam(self) -> Any:
        """Codes of a beam over three layers."""
        return cuda.beam_codes(self.x, self.books, BEAM, self.prepared)

    def sums(self) -> Any:
        """Rows summed by code, in order."""
        return cuda.code_sums(self.x, self.indices, self.size.K, None, self.counts, False)

    def atomic(self) -> Any:
        """Rows summed by code, as they come."""
        return cuda.code_sums(self.x, self.indices, self.size.K, None, None, True)

    def leave(self) -> Any:
        """What is left of the rows."""
        left = self.x.float().clone()
        errors = torch.zeros_like(left)
        total = cuda.leave(left, self.codebook, self.indices, None, errors)
        return left, errors, total

    def total(self) -> Any:
        """Codes summed over three layers."""
        codes = self.indices[:, None].expand(-1, LAYERS)
        return cuda.sum_codes(torch.stack(self.books), codes, None)

    def fault(self, operator: str, found: Any) -> str:
        """What is wrong with an operator's answer; empty if nothing is."""
        return getattr(self, f"_check_{operator}")(found)

    def _check_search(self, indices: Tensor, counts: Tensor, exact: bool) -> str:
        first, distances = indices[:CHECKED], self.truth["distances"]
        if not torch.equal(counts, torch.bincount(indices, minlength=self.size.K)):
            return "counts do not fit the indices"
        chosen = distances.gather(1, first[:, None])[:, 0]
        excess = float((chosen / distances.amin(dim=1).clamp(min=1e-9)).max()) - 1
        if excess > 5e-3:
            return f"a distance is {excess:.1e} too large"
        wrong = int((first != self.truth["nearest"]).sum()) if exact else 0
        return f"{wrong} indices differ from float64" if wrong else ""

    def _check_fast(self, found: Any) -> str:
        return self._check_search(*found, False)

    def _check_exact(self, found: Any) -> str:
        return self._check_search(*found, True)

    def _check_soft(self, found: Any) -> str:
        far = _apart(found[0], self.truth["usage"], 4e-3)
        return self._check_search(found[3], found[4], True) or far

    def _check_gradients(self, found: Any) -> str:
        wanted = self.truth["rows"], self.truth["pulled"]
        return _apart(found[0], wanted[0], 1e-2) or _apart(found[1], wanted[1], 1e-2)

    def _check_draw(self, found: Any) -> str:
        clear, index = self.truth["drawn"]
        wrong = int((found[0][:CHECKED] != index)[clear].sum())
        return f"{wrong} draws differ from float64" if wrong else ""

    def _check_beam(self, found: Any) -> str:
        if "beam" not in self.truth:
            self.truth["beam"] = reference.beam_codes(self.x[:64], self.books, BEAM)
        wrong = int((found[:64] != self.truth["beam"]).any(dim=1).sum())
        return f"{wrong} beams differ from float64" if wrong else ""

    def _check_sums(self, found: Any) -> str:
        return _apart(found[0], self.truth["sums"], 1e-5)

    _check_atomic = _check_sums

    def _check_leave(self, found: Any) -> str:
        left, errors, total = found
        squares = left.double().square().sum()
        return (
            _apart(left[:CHECKED], self.truth["left"], 1e-5)
            or _apart(errors, left.double(), 1e-6)
            or _apart(total, squares, 1e-5)
        )

    def _check_total(self, found: Any) -> str:
        weight = sum(0.6**q for q in range(LAYERS))
        return _apart(found, weight * self.codebook.double()[self.indices], 1e-5)

    def _check_prepare(self, found: Any) -> str:
        return self._check_exact(cuda.nearest_code(self.x, self.codebook, None, True, found[0]))


def _apart(found: Tensor, wanted: Tensor, bound: float) -> str:
    far = float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))
    return "" if far <= bound else f"{far:.1e} from float64"
