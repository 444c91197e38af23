"""CTC with a repeatable gradient, against torch's own."""

import pytest
import torch
from torch.nn import functional as F

from b2t.model import losses
from b2t.model.ctc_gradient import repeatable_ctc


def example(blank):
    torch.manual_seed(0)
    logits = torch.randn(30, 6, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(1, 7, (6, 9))
    labels[1, 1] = labels[1, 0]  # two equal ones in a row, and one class at several places
    labels = torch.where(labels == blank, 0, labels)
    frames = torch.tensor([30, 25, 1, 12, 9, 30])
    lengths = torch.tensor([9, 8, 0, 3, 1, 0])
    return logits, labels, frames, lengths


@pytest.mark.parametrize("blank", [0, 6])
def test_values_and_gradients_are_those_of_torch(blank):
    logits, *labelling = example(blank)
    weights = torch.tensor([1.0, 0.5, 2.0, -1.0, 0.0, 3.0], dtype=torch.float64)
    found = []
    for ctc in (repeatable_ctc, lambda *given: F.ctc_loss(*given, reduction="none")):
        nll = ctc(logits.log_softmax(-1), *labelling, blank)
        found.append((nll, *torch.autograd.grad((weights * nll).sum(), logits)))
    torch.testing.assert_close(*found)


def test_a_class_without_probability_takes_no_part():
    logits, *labelling = example(0)
    labelling[0][3, :3] = torch.tensor([1, 2, 3])
    found = []
    for least in (-torch.inf, -300.0):
        added = torch.zeros_like(logits)
        added[4:20, 3, 5] = least
        nll = repeatable_ctc((logits + added).log_softmax(-1), *labelling, 0)[3]
        found.append((nll, *torch.autograd.grad(nll, logits)))
    torch.testing.assert_close(*found)
    nll = F.ctc_loss((logits + added).log_softmax(-1), *labelling, reduction="none")[3]
    torch.testing.assert_close(found[1], (nll, *torch.autograd.grad(nll, logits)))


def test_what_does_not_fit_is_infinite_and_pulls_nothing():
    logits, labels, frames, lengths = example(0)
    frames[0], labels[1, 8] = 5, -100  # what stands beyond the lengths does not count
    nll = repeatable_ctc(logits.log_softmax(-1), labels, frames, lengths, 0)
    (gradient,) = torch.autograd.grad(nll[nll.isfinite()].sum() + 0 * nll[0], logits)
    assert nll.isinf().tolist() == [True] + 5 * [False]
    assert not gradient[:, 0].any() and gradient[:, 1].any() and gradient.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_loss_takes_it_and_repeats_bit_for_bit():
    torch.manual_seed(0)
    logits = torch.randn(8, 500, 41, device="cuda", requires_grad=True)
    mask = torch.arange(500, device="cuda") < torch.randint(200, 501, (8, 1), device="cuda")
    labels = torch.randint(1, 41, (8, 60), device="cuda")
    lengths = torch.randint(0, 61, (8,), device="cuda")
    before = torch.is_deterministic_algorithms_warn_only_enabled()
    gradients = []
    for deterministic in (False, True, True, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            total = losses.ctc_sums(logits, mask, labels, lengths).negative_log_likelihood
            gradients += torch.autograd.grad(total, logits)
        finally:
            torch.use_deterministic_algorithms(False, warn_only=before)
    assert gradients[1].equal(gradients[2]) and gradients[1].equal(gradients[3])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)
