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


def long_rows(device):
    """Logits [8, 500, 41], their mask, labels and their numbers."""
    torch.manual_seed(0)
    mask = torch.arange(500) < torch.randint(200, 501, (8, 1))
    labels, lengths = torch.randint(1, 41, (8, 60)), torch.randint(1, 61, (8,))
    logits = torch.randn(8, 500, 41).to(device).requires_grad_()
    return logits, mask.to(device), labels.to(device), lengths.to(device)


def too_far(gradient, logits, mask, labels, lengths):
    """How much farther than rounding allows a gradient is from float64's; at most 1 is right.

    An occupancy is e to a sum of logarithms as large as the negative log-likelihood, of two
    additions for each frame. Of n roundings u, as likely up as down, none lead farther than
    δ = 6 √n u times the largest (Higham & Mary 2019, with a probability of 1 − 2 e⁻¹⁸ for each).
    The gradient is p − occupancy, in both of which δ enters: δ (|gradient| + 2 p) bounds it.
    """
    wide = logits.detach().double().requires_grad_()
    log_probs = wide.log_softmax(-1).transpose(0, 1)
    nll = F.ctc_loss(log_probs, labels, mask.sum(1), lengths, reduction="none")
    (truth,) = torch.autograd.grad(nll.sum(), wide)
    delta = 6 * (2 * mask.sum(1).max()).sqrt() * 2.0**-24 * nll.detach().max()
    probability = wide.detach().softmax(-1) * mask[..., None]
    excess = (gradient - truth).abs() / (delta * (truth.abs() + 2 * probability)).clamp(min=1e-30)
    return float(excess.max())


def test_long_rows_in_float32_are_as_near_as_rounding_allows():
    given = long_rows("cpu")
    logits, mask, labels, lengths = given
    nll = repeatable_ctc(logits.log_softmax(-1).transpose(0, 1), labels, mask.sum(1), lengths, 0)
    (gradient,) = torch.autograd.grad(nll.sum(), logits)
    assert too_far(gradient, *given) < 1
    assert too_far(1.1 * gradient, *given) > 1
    assert too_far(gradient.roll(1, 1), *given) > 100


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_loss_takes_it_and_repeats_bit_for_bit(monkeypatch):
    # As `b2t.train.determinism` does: without it torch refuses products of matrices.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    given = long_rows("cuda")
    before = torch.is_deterministic_algorithms_warn_only_enabled()
    gradients = []
    for deterministic in (False, True, True, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            total = losses.ctc_sums(*given).negative_log_likelihood
            gradients += torch.autograd.grad(total, given[0])
        finally:
            torch.use_deterministic_algorithms(False, warn_only=before)
    again = [float((each - gradients[1]).abs().max()) for each in gradients[2:]]
    assert again == [0.0, 0.0], "largest difference of the same call, [8, 500, 41]"
    excess = [too_far(each, *given) for each in gradients[:2]]
    assert max(excess) < 1, f"beyond rounding, torch's own and ours, [8, 500, 41]: {excess}"
