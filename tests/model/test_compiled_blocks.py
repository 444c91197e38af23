"""Compiled blocks compute what the blocks compute, under the names that weights have always had."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from b2t.model import block_calls
from b2t.model.convolution import Convolution
from b2t.model.transformer import Transformer
from tests.model.small_model import build

STACKS = {
    "transformer": lambda: Transformer(8, 2, 2, 2.0, 0.2),
    "conv": lambda: Convolution(8, 2, 3, 2.0, 0.2),
}


@pytest.fixture
def graphs(monkeypatch):
    """Compiles without a C++ compiler, and counts what it compiles."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(block_calls, "BACKEND", counter)
    yield counter
    torch._dynamo.reset()


def gradients(stack, lengths):
    generator = torch.Generator().manual_seed(len(lengths))
    x = torch.randn(len(lengths), max(lengths), 8, generator=generator, requires_grad=True)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    torch.manual_seed(3)
    stack.zero_grad()
    stack(x, mask).square().sum().backward()
    return [x.grad, *(parameter.grad.clone() for parameter in stack.parameters())]


@pytest.mark.parametrize("kind", STACKS)
def test_gradients_are_those_of_the_blocks_with_dropout_kept_or_recomputed(graphs, kind):
    stack, lengths = STACKS[kind](), [13, 8, 3]
    names, expected = list(stack.state_dict()), gradients(stack, lengths)
    stack.compiled = True
    for stack.checkpoint_every in (0, 1):
        for found, wanted in zip(gradients(stack, lengths), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert graphs.frame_count > 0
    assert list(stack.state_dict()) == list(copy.deepcopy(stack).state_dict()) == names


def test_a_stack_compiles_once_for_all_blocks_and_lengths_and_not_in_evaluation(graphs):
    stack = STACKS["transformer"]()
    stack.compiled = True
    gradients(stack.eval(), [13, 8, 3])
    assert graphs.frame_count == 0
    gradients(stack.train(), [13, 8, 3])
    made = graphs.frame_count
    gradients(stack, [21, 5])
    assert graphs.frame_count == made > 0


def test_a_model_compiles_the_stacks_that_have_blocks():
    for kind, compiled in (("transformer", True), ("conv", True), ("gru", None)):
        model = build(encoder={"kind": kind})
        model.compile_blocks()
        assert getattr(model.encoder.body, "compiled", None) is compiled
        assert model.signal_decoder.transformer.compiled
