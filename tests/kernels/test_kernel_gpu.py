"""The Triton kernels on a GPU: the checks that the interpreter runs elsewhere, and CUDA graphs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import b2t_kernels
from b2t_kernels import reference
from tests.kernels.apart import assert_near

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_kernels_on_the_gpu(repository):
    checks = [str(Path(__file__).with_name(f"{name}_checks.py")) for name in ("kernel", "draw")]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *checks],
        cwd=repository,
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-2000:]


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("N", [1500, 20_000])
def test_a_graph_of_search_and_usage_replays(N, precision):
    """Nothing is timed or read back: after one warm-up call a graph can be captured."""
    x = torch.randn(N, 64, device="cuda")
    codebook = torch.randn(1024, 64, device="cuda")
    prepared = b2t_kernels.prepare_codes(codebook[None])[0]

    def step():
        return b2t_kernels.search_usage(x, codebook, 20.0, None, precision, prepared)

    expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(found, step())
    assert not torch.equal(found.indices, expected.indices)


def test_usage_and_its_gradients_in_training():
    """As `code_usage` is called, which goes past torch's dispatcher here."""
    x, codebook = torch.randn(300, 20, device="cuda"), torch.randn(90, 20, device="cuda")
    weights = torch.randn(90, device="cuda")
    wide = [each.double().requires_grad_() for each in (x, codebook)]
    expected = reference.code_usage(*wide, 6.0)
    found = b2t_kernels.code_usage(x.requires_grad_(), codebook.requires_grad_(), 6.0)
    torch.testing.assert_close(found.double(), expected, rtol=4e-3, atol=1e-4)
    ours = torch.autograd.grad(found @ weights, (x, codebook))
    for one, other in zip(
        ours, torch.autograd.grad(expected @ weights.double(), wide), strict=True
    ):
        assert_near(one, other, 4e-3)


def test_beams_of_many_draws_are_those_of_float64():
    """A few codes repeat, two are not finite and one lies far out, as in draw_checks."""
    wrong = {}
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(4, 20, generator=generator).cuda()
        first, second = torch.randn(2, 90, 20, generator=generator).cuda()
        first[40:80], first[5], second[0] = first[:40].clone(), torch.nan, -torch.inf
        first[60] *= 30
        books = [first, 0.6 * second]
        expected = reference.beam_codes(x, books, 6)
        found = b2t_kernels.beam_codes(x, books, 6)
        distances = [
            (x - books[0][codes[:, 0]] - books[1][codes[:, 1]]).square().sum(dim=1).tolist()
            for codes in (found, expected)
        ]
        if not torch.equal(found, expected):
            wrong[seed] = found.tolist(), expected.tolist(), distances
    assert not wrong
