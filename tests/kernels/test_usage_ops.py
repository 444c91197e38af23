"""Soft assignment as a CUDA tensor runs it, past torch's dispatcher; blocked torch stands in."""

import pytest
import torch

import b2t_kernels
from b2t_kernels import blocked, blocked_codes, cuda, usage_ops


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """What is prepared; the dispatched operators are out of reach."""
    prepared, centre_codes = [], blocked_codes.centre_codes

    def refuse(*_):
        raise AssertionError("torch's dispatcher was asked")

    def centre(codebook, dtype):
        prepared.append(codebook)
        return centre_codes(codebook, dtype)

    monkeypatch.setattr(usage_ops, "undispatched", lambda x: True)
    monkeypatch.setattr(usage_ops, "_usage_forward", refuse)
    monkeypatch.setattr(usage_ops, "_usage_backward", refuse)
    monkeypatch.setattr(cuda, "obstacle", lambda *_, **__: "a stand-in for the kernels")
    for module in (blocked, blocked_codes):
        monkeypatch.setattr(module, "centre_codes", centre)
    return prepared


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_usage_past_the_dispatcher_is_the_same(as_on_a_gpu, wanted, reduction, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 5, generator=generator, requires_grad=wanted[0])
    codebook = torch.randn(12, 5, generator=generator, requires_grad=wanted[1])
    mask, weights = torch.arange(30) % 3 > 0, torch.randn(12, generator=generator)

    def run():
        usage = b2t_kernels.code_usage(x, codebook, 2.0, mask, reduction)
        needed = [each for each in (x, codebook) if each.requires_grad]
        return usage.detach(), *torch.autograd.grad(usage @ weights, needed)

    found = run()
    assert len(as_on_a_gpu) == 1, "backward prepared the codes again"
    monkeypatch.undo()
    for ours, expected in zip(found, run(), strict=True):
        assert torch.equal(ours, expected)
