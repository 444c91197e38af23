"""Deterministic algorithms in the backward on a GPU, tried on a CPU with an operation without."""

import logging

import pytest
import torch

from b2t.train import determinism
from b2t.train.determinism import NotRepeatable, ask_for_determinism, put_up_with, strict_backward

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setattr(determinism, "_allowed", set())
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before = torch.get_deterministic_debug_mode()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.set_deterministic_debug_mode(before)
    torch.utils.deterministic.fill_uninitialized_memory = filled


class Put(torch.autograd.Function):
    """Goes backward through `put_`, which is deterministic nowhere."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone().put_(torch.tensor([0]), torch.tensor([7.0]))


def gradient_on(device):
    x = torch.ones(2, requires_grad=True)
    with strict_backward(device):
        Put.apply(x).sum().backward()
    return x.grad.tolist()


@pytest.mark.filterwarnings("ignore:put_ does not have")
def test_what_has_no_deterministic_version_is_refused_on_a_gpu_until_it_is_put_up_with(caplog):
    ask_for_determinism()
    assert gradient_on(CPU) == [7.0, 1.0]
    with pytest.raises(NotRepeatable, match=r"deterministic put_ .*run.deterministic=false"):
        gradient_on(GPU)
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    with caplog.at_level(logging.WARNING):
        put_up_with(NotRepeatable("put_"))
    assert "no deterministic put_" in caplog.text
    assert gradient_on(GPU) == [7.0, 1.0]


def test_attention_may_not_warn_instead_of_being_deterministic():
    ask_for_determinism()
    with strict_backward(GPU):
        assert torch.get_deterministic_debug_mode() == 2
    assert torch.get_deterministic_debug_mode() == 1
    with strict_backward(CPU):
        assert torch.get_deterministic_debug_mode() == 1


def test_nothing_is_refused_where_nobody_asked():
    torch.set_deterministic_debug_mode(0)
    assert gradient_on(GPU) == [7.0, 1.0]
    assert torch.get_deterministic_debug_mode() == 0


def test_other_failures_stay_what_they_are():
    ask_for_determinism()
    with pytest.raises(RuntimeError, match="some other"), strict_backward(GPU):
        raise RuntimeError("some other")
    assert torch.is_deterministic_algorithms_warn_only_enabled()
