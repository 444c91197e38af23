import math

import pytest
import torch

from b2t.quantize import ResidualVQ, StepNorms
from b2t.quantize.objectives import diversity_loss, perplexity_loss


def latents(B=4, P=25, D=6, seed=0, offset=0.0):
    return torch.randn(B, P, D, generator=torch.Generator().manual_seed(seed)) + offset


def started(**options):
    options = {"codebook_size": 12, "num_quantizers": 3, **options}
    quantizer = ResidualVQ(6, **options)
    quantizer.initialize([(latents(8, seed=9), None)], progress=False)
    return quantizer


def dense(quantizer, x, mask, books):
    """Both losses by plain autograd in float64 over whole N × K matrices."""
    codes = quantizer.encode(x.float(), mask)[mask]
    residual, losses = x[mask], {"diversity": 0.0, "perplexity": 0.0}
    for q, book in enumerate(books):
        distance = (residual[:, None] - book[None]).square().sum(-1)
        width = quantizer.temperature * quantizer.codebooks.distance_scale[q].double()
        usage = torch.softmax(-distance / width, 1).mean(0)
        entropy = -(usage * usage.log()).sum()
        losses["diversity"] = losses["diversity"] + (math.log(12) - entropy) / 3
        losses["perplexity"] = losses["perplexity"] + (1 - entropy.exp() / 12) / 3
        residual = residual - book.detach()[codes[:, q]]
    return losses


@pytest.mark.parametrize("name", ["diversity", "perplexity"])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_values_and_gradients_are_those_of_whole_matrices(name, offset):
    quantizer = started(update_rule="gradient", codebook_gradient_scale=1.0)
    quantizer.codebooks.embed[0] += offset
    quantizer.codebooks.push()
    quantizer.set_temperature(0.7)
    x = latents(offset=offset).requires_grad_()
    mask = torch.rand(4, 25, generator=torch.Generator().manual_seed(2)) > 0.3
    loss = quantizer(x, mask, losses=(name,)).losses[name]
    loss.backward()
    y = x.detach().double().requires_grad_()
    books = quantizer.codebooks.embed.double().requires_grad_()
    expected = dense(quantizer, y, mask, books)[name]
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-3, atol=1e-6)
    grad = quantizer.codebooks.weight.grad.double()
    torch.testing.assert_close(grad, books.grad, rtol=1e-3, atol=1e-6)


def test_bounds_at_uniform_use_and_at_a_single_code():
    uniform, single = torch.full((2, 8), 1 / 8), torch.eye(8)[:2]
    assert abs(diversity_loss(uniform)) < 1e-6 and abs(perplexity_loss(uniform)) < 1e-6
    assert abs(diversity_loss(single) - math.log(8)) < 1e-6
    assert abs(perplexity_loss(single) - 7 / 8) < 1e-6
    assert diversity_loss(torch.zeros(1, 8)) == 0 and perplexity_loss(torch.zeros(1, 8)) == 0


def test_the_gradient_spreads_frames_over_codes():
    x = 0.1 * latents() + started().codebooks.embed[0, 0]
    quantizer = started(num_quantizers=1)
    quantizer.set_temperature(1.0)
    x = x.clone().requires_grad_()
    first = quantizer(x, losses=("diversity",)).losses["diversity"]
    for _ in range(50):
        loss = quantizer(x, losses=("diversity",)).losses["diversity"]
        (grad,) = torch.autograd.grad(loss, x)
        x = (x - 20.0 * grad).detach().requires_grad_()
    assert loss < 0.8 * first


def test_both_losses_are_exact_over_micro_batches():
    quantizer = started()
    x = latents(6).requires_grad_()
    mask = torch.rand(6, 25, generator=torch.Generator().manual_seed(2)) > 0.5
    whole = quantizer(x, mask).losses
    (whole["diversity"] + whole["perplexity"]).backward()
    parts = [(x.detach()[i : i + 2].requires_grad_(), mask[i : i + 2]) for i in (0, 2, 4)]
    norms = StepNorms(usage=sum(quantizer.soft_usage(*part) for part in parts), micro_batches=3)
    for part in parts:
        losses = quantizer(*part, norms=norms).losses
        for name in ("diversity", "perplexity"):
            torch.testing.assert_close(losses[name], whole[name])
        ((losses["diversity"] + losses["perplexity"]) / 3).backward()
    found = torch.cat([part[0].grad for part in parts])
    torch.testing.assert_close(found, x.grad, rtol=1e-4, atol=1e-7)


def test_micro_batches_with_sampled_codes_and_dropped_layers_are_exact_too():
    quantizer = started(stochastic_sample_codes=True, quantize_dropout=True)
    x = latents(4)
    whole = quantizer(x).losses
    usage = quantizer.soft_usage(x[:1]) + quantizer.soft_usage(x[1:])
    losses = quantizer(x[1:], norms=StepNorms(usage=usage, micro_batches=2)).losses
    torch.testing.assert_close(losses["diversity"], whole["diversity"])
    torch.testing.assert_close(losses["perplexity"], whole["perplexity"])


def test_a_lower_temperature_sharpens_the_assignments():
    quantizer, x = started(num_quantizers=1), latents()
    entropies = []
    for temperature in (2.0, 1.0, 0.5, 0.01):
        quantizer.set_temperature(temperature)
        usage = quantizer.soft_usage(x[:1, :1]).sums[0]
        entropies.append(float(torch.special.entr(usage).sum()))
    assert entropies == sorted(entropies, reverse=True)
    assert entropies[0] > 0.5 and entropies[-1] < 1e-3


def test_only_the_losses_asked_for_are_computed():
    quantizer, x = started(), latents()
    assert quantizer(x, losses=()).losses == {}
    assert list(quantizer(x, losses=("perplexity",)).losses) == ["perplexity"]
    assert set(quantizer(x).losses) == {"commitment", "diversity", "perplexity"}


def test_no_matrix_of_frames_by_codes_is_held(monkeypatch):
    """The largest tensor alive in forward and backward stays well under N × K."""
    N, K = 20_000, 2048
    quantizer = ResidualVQ(6, K, 1, kmeans_init=False)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    x = latents(1, N).requires_grad_()
    with Watch():
        losses = quantizer(x).losses
        sum(losses.values()).backward()
    assert 0 < largest < N * K / 8
