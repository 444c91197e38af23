"""What an exact search on a CPU compares again, against float64 brute force."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operator makes, but views."""

    size = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                self.size = max(self.size, tensor.numel())
        return made


@pytest.mark.parametrize("scale", [1.0, 3e19])
def test_codes_that_are_all_as_near_are_compared_in_chunks(scale, monkeypatch):
    """All codes are the nearest of all rows: 51,200 pairs of width 64, in parts of a bound."""
    generator = torch.Generator().manual_seed(7)
    codebook, x = torch.zeros(128, 64), torch.zeros(400, 64)
    codebook[:64, :32] = torch.randint(2, (64, 32), generator=generator) * 2.0 - 1
    codebook[64:] = -codebook[:64]
    x[:, 32:] = torch.randn(400, 32, generator=generator)
    expected = reference.nearest_code(scale * x, scale * codebook)[0]
    monkeypatch.setattr(blocked, "RESCORE_ELEMENTS", 1 << 12)
    monkeypatch.setattr(blocked, "ROW_BLOCK", 128)
    with Largest() as largest:
        found, _ = blocked.nearest_code(scale * x, scale * codebook, None, True)
    assert torch.equal(found, expected)
    # The places of all scores of some rows.
    assert largest.size <= max(x.numel(), 8 * blocked.RESCORE_ELEMENTS)


def test_exact_doubts_the_best_code_of_an_earlier_block():
    """Rows halfway between codes of two blocks, of which float32 often takes the wrong one."""
    generator = torch.Generator().manual_seed(4)
    codebook = 100 + torch.randn(blocked.CODE_BLOCK + 64, 16, generator=generator)
    ours = torch.arange(64).repeat(5)
    codebook[blocked.CODE_BLOCK :] = codebook[:64] + 0.01
    x = codebook[ours] + 0.005 + 1e-6 * torch.randn(320, 16, generator=generator)
    indices, _ = blocked.nearest_code(x, codebook, None, True)
    expected, _ = reference.nearest_code(x, codebook)
    assert torch.equal(indices, expected)
    fast, _ = blocked.nearest_code(x, codebook, None, False)
    assert (fast[expected < 64] >= blocked.CODE_BLOCK).any(), "float32 was right about all of them"
