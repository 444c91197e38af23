"""The quantizer against brute force, closed forms and vector-quantize-pytorch."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from b2t.errors import UserError
from b2t.quantize import ResidualVQ, StepNorms
from tests.quantize.small_quantizer import brute_force, latents, same_state, started, state_of


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_codes_are_the_nearest_in_float64(offset):
    x = latents(16, offset=offset)
    quantizer = started(x).eval()
    out = quantizer(x)
    codes, quantized = brute_force(quantizer, x.flatten(0, 1))
    assert torch.equal(out.codes.flatten(0, 1), codes)
    torch.testing.assert_close(out.quantized.flatten(0, 1).double(), quantized, atol=1e-4, rtol=0)


def test_forward_changes_nothing():
    quantizer = started(stochastic_sample_codes=True, quantize_dropout=True, revival_every=1)
    before, random = state_of(quantizer), torch.get_rng_state()
    first = quantizer(latents())
    assert same_state(before, state_of(quantizer))
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(first.codes, quantizer(latents()).codes)


@pytest.mark.parametrize("options", [{}, {"codebook_dim": 5}, {"use_cosine_sim": True}])
@pytest.mark.parametrize("training", [True, False])
def test_codes_and_quantized_round_trip_exactly(options, training):
    quantizer = started(**options).train(training)
    x, mask = latents(), torch.rand(4, 25) > 0.3
    out = quantizer(x, mask)
    assert torch.equal(quantizer.decode(out.codes), out.quantized)
    assert torch.equal(quantizer.encode(x, mask), out.codes)
    prefix = out.codes.clone()
    prefix[..., 2:] = -1
    assert torch.equal(quantizer.decode(out.codes[..., :2]), quantizer.decode(prefix))


def test_each_layer_of_the_prefix_brings_the_sum_closer():
    quantizer, x = started().eval(), latents()
    codes = quantizer.encode(x)
    parts = [quantizer.decode(codes[..., :layers]) for layers in (1, 2, 3, 4)]
    errors = [float((x - part).square().mean()) for part in parts]
    assert errors == sorted(errors, reverse=True)


def test_decode_refuses_codes_that_do_not_exist():
    quantizer = started()
    with pytest.raises(ValueError, match="expected −1 to 15"):
        quantizer.decode(torch.full((1, 1, 4), 16))
    with pytest.raises(ValueError, match="at most 4"):
        quantizer.decode(torch.zeros(1, 1, 5, dtype=torch.int64))


def test_gradient_of_ones_through_eight_stages_is_ones():
    quantizer = started(num_quantizers=8, rotation_trick=False)
    x = latents().requires_grad_()
    quantizer(x, losses=()).quantized.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_rotation_trick_multiplies_by_the_scaled_rotation():
    quantizer = started(rotation_trick=True)
    x = latents(1, 6).requires_grad_()
    out = quantizer(x, losses=())
    weight = latents(1, 6, seed=5)
    (out.quantized * weight).sum().backward()
    for frame, code, upstream, grad in zip(
        x[0].detach().double(),
        out.quantized[0].double(),
        weight[0].double(),
        x.grad[0],
        strict=True,
    ):
        u, v = frame / frame.norm(), code / code.norm()
        # Rotation in the plane of u and v that carries u to v, identity elsewhere.
        generator = torch.outer(v, u) - torch.outer(u, v)
        rotation = torch.eye(8).double() + generator + generator @ generator / (1 + u @ v)
        torch.testing.assert_close(rotation @ u, v)
        expected = (code.norm() / frame.norm()) * rotation.T @ upstream
        torch.testing.assert_close(grad.double(), expected, atol=1e-5, rtol=1e-4)


def test_rotation_without_a_direction_passes_the_gradient_straight():
    quantizer = started(rotation_trick=True)
    x = torch.zeros(1, 2, 8, requires_grad=True)
    quantizer(x, losses=()).quantized.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_rotation_and_single_layer_agree_with_vector_quantize_pytorch():
    vqp = pytest.importorskip("vector_quantize_pytorch")
    ours = started(num_quantizers=1, rotation_trick=True)
    peer = vqp.ResidualVQ(dim=8, codebook_size=16, num_quantizers=1, rotation_trick=True).eval()
    peer.layers[0]._codebook.embed.copy_(ours.codebooks.embed)
    weight = latents(seed=3)
    grads = []
    for module in (ours, peer):
        x = latents().requires_grad_()
        out = (
            module.train(module is ours)(x)
            if module is ours
            else module.train()(x, freeze_codebook=True)
        )
        assert torch.equal(out[1].squeeze(-1), ours.encode(x).squeeze(-1))
        (out[0] * weight).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-4)


def test_commitment_is_the_mean_over_frames_layers_and_width():
    quantizer = started()
    x, mask = latents(), torch.rand(4, 25) > 0.3
    x.requires_grad_()
    loss = quantizer(x, mask, losses=("commitment",)).losses["commitment"]
    loss.backward()
    y = x.detach().double().requires_grad_()
    residual, total = y[mask], 0.0
    codes = quantizer.encode(x, mask)[mask]
    for q, book in enumerate(quantizer.codebooks.embed.double()):
        left = residual - book[codes[:, q]]
        total = total + left.square().mean() / 4
        residual = left
    total.backward()
    torch.testing.assert_close(loss.double(), total)
    torch.testing.assert_close(x.grad.double(), y.grad)


def test_commitment_with_a_given_number_of_frames_averages_to_the_whole():
    quantizer = started()
    x = latents()
    mask = torch.ones(4, 25, dtype=torch.bool)
    mask[1:, 3:] = False
    whole = quantizer(x, mask).losses["commitment"]
    mean = StepNorms({"frames": mask.sum() / 2})
    parts = [
        quantizer(x[i : i + 2], mask[i : i + 2], norms=mean).losses["commitment"] for i in (0, 2)
    ]
    torch.testing.assert_close(sum(parts) / 2, whole)


def test_projections_carry_the_gradient_both_ways():
    quantizer = started(codebook_dim=5)
    x = latents().requires_grad_()
    out = quantizer(x)
    (out.quantized.square().sum() + out.losses["commitment"]).backward()
    for parameter in quantizer.parameters():
        assert parameter.grad.abs().sum() > 0
    projected = quantizer.project_in(x.detach())
    inner = started(latents(16, D=5))
    inner.codebooks.embed.copy_(quantizer.codebooks.embed)
    assert torch.equal(inner.encode(projected), quantizer.encode(x.detach()))


def test_before_the_start_the_input_passes_through():
    quantizer = ResidualVQ(8, 16, 4)
    x, mask = latents().requires_grad_(), torch.rand(4, 25) > 0.4
    out = quantizer(x, mask)
    assert torch.equal(out.quantized[mask], x[mask]) and (out.quantized[~mask] == 0).all()
    assert (out.codes == -1).all() and all(loss == 0 for loss in out.losses.values())
    out.quantized.sum().backward()
    assert torch.equal(x.grad, mask[..., None].float().expand_as(x))
    assert out.stats.empty and not quantizer.update(out.stats).applied
    with pytest.raises(RuntimeError, match="have not started"):
        quantizer.encode(x)


def test_dropout_keeps_a_prefix_and_repeats_itself():
    quantizer = started(quantize_dropout=True, quantize_dropout_cutoff_index=1, revival=None)
    seen = set()
    for _ in range(40):
        out = quantizer(latents())
        kept = (out.codes[0, 0] >= 0).sum().item()
        assert (out.codes[..., :kept] >= 0).all() and (out.codes[..., kept:] == -1).all()
        assert torch.equal(out.quantized, quantizer.decode(out.codes))
        assert out.stats.frames.tolist() == [100] * kept + [0] * (4 - kept)
        dropped = quantizer.codebooks.embed[kept:].clone()
        quantizer.update(out.stats)
        assert torch.equal(dropped, quantizer.codebooks.embed[kept:])
        seen.add(kept)
    assert seen == {2, 3, 4}
    assert (quantizer.eval()(latents()).codes >= 0).all()


def test_stochastic_codes_follow_the_soft_assignment_and_only_in_training():
    x = latents(1, 1).expand(1, 4000, 8) + 1e-6 * latents(1, 4000)
    quantizer = started(num_quantizers=1, stochastic_sample_codes=True)
    codes = quantizer(x).codes.flatten()
    distance = (x[0, 0] - quantizer.codebooks.embed[0]).double().square().sum(-1)
    width = quantizer.temperature * quantizer.codebooks.distance_scale[0].double()
    expected = torch.softmax(-distance / width, 0)
    found = torch.bincount(codes, minlength=16) / 4000
    # Four standard deviations of a frequency over 4,000 draws.
    assert ((found - expected).abs() < 4 * (expected / 4000).sqrt() + 1e-3).all()
    assert quantizer.eval()(x).codes.unique().tolist() == [int(distance.argmin())]


def test_stochastic_codes_change_with_the_step_and_not_with_the_place():
    quantizer = started(stochastic_sample_codes=True)
    x = latents()
    first = quantizer(x).codes
    assert torch.equal(quantizer(x.flip(0)).codes.flip(0), first)
    quantizer.codebooks.updates += 1
    assert not torch.equal(quantizer(x).codes, first)


def test_scaling_the_data_leaves_dimensionless_losses_alone():
    x = latents(16)
    small = started(x)
    large = copy.deepcopy(small)
    large.codebooks.embed *= 64
    for quantizer, frames in ((small, x), (large, 64 * x)):
        quantizer.codebooks.move_scales(quantizer(frames).stats, 0.0, cosine=False)
    a, b = small(x).losses, large(64 * x).losses
    for name in ("diversity", "perplexity"):
        torch.testing.assert_close(a[name], b[name])
    torch.testing.assert_close(64.0**2 * a["commitment"], b["commitment"])


def test_reference_backend_gives_the_same():
    x = latents(16)
    quantizer = started(x)
    naive = started(x, backend="reference")
    naive.load_state_dict(quantizer.state_dict())
    a, b = quantizer(x), naive(x)
    assert torch.equal(a.codes, b.codes)
    torch.testing.assert_close(a.stats.sums, b.stats.sums)
    for name in a.losses:
        torch.testing.assert_close(a.losses[name], b.losses[name])


def test_a_shared_codebook_serves_every_layer():
    quantizer = started(shared_codebook=True)
    assert quantizer.codebooks.embed.shape == (1, 16, 8)
    x = latents()
    for _ in range(3):
        out = quantizer(x)
        quantizer.update(out.stats)
    assert out.stats.counts.shape == (4, 16) and out.stats.counts.sum(1).tolist() == [100] * 4
    assert torch.equal(quantizer.decode(out.codes[:0]), out.quantized[:0])
    residuals = [float((x - quantizer.decode(out.codes[..., :q])).norm()) for q in (1, 4)]
    assert residuals[1] < residuals[0]


def test_codes_of_later_layers_have_the_length_of_what_is_left():
    """Unit codes would overshoot the residuals, and each layer make things worse."""
    x = latents(16)
    quantizer = ResidualVQ(8, 16, 4, use_cosine_sim=True)
    report = quantizer.initialize([(x, None)], progress=False)
    assert report.squared_error == sorted(report.squared_error, reverse=True)
    gains = quantizer.codebooks.gain
    assert (gains[1:] < gains[:-1]).all() and gains[3] < 0.7


def test_cosine_similarity_finds_codes_by_angle():
    quantizer = started(use_cosine_sim=True, num_quantizers=2).eval()
    norms = quantizer.codebooks.embed.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    x = latents()
    cosine = torch.nn.functional.cosine_similarity(
        x[..., None, :].double(), quantizer.codebooks.embed[0].double(), dim=-1
    )
    codes = quantizer(x).codes
    assert torch.equal(codes[..., 0], cosine.argmax(-1))
    assert torch.equal(quantizer(7 * x).codes, codes)
    quantizer.train()
    for _ in range(5):
        quantizer.update(quantizer(x).stats)
    norms = quantizer.codebooks.embed.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


@settings(max_examples=30, deadline=None)
@given(
    B=st.integers(1, 3),
    P=st.integers(1, 9),
    dim=st.integers(1, 6),
    K=st.integers(1, 9),
    Q=st.integers(1, 4),
    width=st.sampled_from([None, 2]),
    keep=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_any_shape_works(B, P, dim, K, Q, width, keep, seed):
    x = latents(B, P, dim, seed).requires_grad_()
    mask = torch.rand(B, P, generator=torch.Generator().manual_seed(seed)) < keep
    quantizer = ResidualVQ(dim, K, Q, codebook_dim=width, kmeans_init=False, revival_every=1)
    out = quantizer(x, mask)
    assert out.quantized.shape == x.shape and out.codes.shape == (B, P, Q)
    assert ((out.codes >= 0).all(-1) == mask).all()
    (out.quantized.sum() + sum(out.losses.values())).backward()
    assert torch.isfinite(x.grad).all()
    report = quantizer.update(out.stats)
    assert report.frames.tolist() == [int(mask.sum())] * Q
    assert all(torch.isfinite(value).all() for value in quantizer.state_dict().values())
    assert torch.equal(
        quantizer.eval()(x, mask).quantized, quantizer.decode(quantizer.encode(x, mask))
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update_rule": "sgd"}, "update_rule is 'sgd'"),
        ({"revival": "often"}, "revival is 'often'"),
        ({"decay": 1.0}, "decay is 1.0"),
        ({"codebook_size": 0}, "codebook_size is 0"),
        ({"temperature_end": 0.0}, "temperature_end"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        ResidualVQ(**{"dim": 8, "codebook_size": 16, "num_quantizers": 4, **options})


def test_shapes_that_do_not_fit_are_named():
    quantizer = started()
    with pytest.raises(ValueError, match="width 7"):
        quantizer(torch.zeros(1, 2, 7))
    with pytest.raises(ValueError, match="does not fit"):
        quantizer(torch.zeros(1, 2, 8), torch.ones(2, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="unknown losses"):
        quantizer(torch.zeros(1, 2, 8), losses=("divesity",))
