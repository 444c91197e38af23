"""The Triton kernels on a GPU: the checks that the interpreter runs elsewhere, and CUDA graphs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import b2t_kernels

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
