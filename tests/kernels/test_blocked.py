"""What an exact search on a CPU compares again, against float64 brute force."""

import torch

import b2t_kernels
from b2t_kernels import blocked, reference


def test_exact_compares_few_codes_beside_one_far_out(monkeypatch):
    """Rows halfway between two codes, one of them now and then the one far out."""
    generator = torch.Generator().manual_seed(3)
    codebook = 0.02 * torch.randn(300, 64, generator=generator)
    codebook[100] = 5.0 * torch.randn(64, generator=generator)
    first, second = torch.randint(300, (2, 2000), generator=generator)
    first[:200] = 100
    x = (codebook[first] + codebook[second]) / 2
    compared, wide = [], []
    nearest_of, search_wide = blocked._nearest_of, blocked._search_wide
    monkeypatch.setattr(
        blocked, "_nearest_of", lambda *a: compared.append(len(a[2])) or nearest_of(*a)
    )
    monkeypatch.setattr(blocked, "_search_wide", lambda *a: wide.append(a) or search_wide(*a))
    indices, _ = b2t_kernels.nearest_code(x, codebook, precision="exact")
    assert torch.equal(indices, reference.nearest_code(x, codebook)[0])
    assert 0 < sum(compared) < 3 * len(x)
    assert not wide, "no row overflows, yet a float64 search ran"


def test_a_code_at_the_origin_is_no_repeat_of_one_that_is_not_finite():
    codebook = torch.tensor([[torch.nan, 0.0], [0.0, 0.0], [3.0, 3.0], [0.0, 0.0]])
    indices, counts = blocked.nearest_code(torch.zeros(5, 2), codebook, None, True)
    assert (indices.tolist(), counts.tolist()) == ([1] * 5, [0, 5, 0, 0])
