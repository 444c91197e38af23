"""Masked and broken frames touch nothing; all others count once, however a batch is cut."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.quantize.small_quantizer import latents, same_state, started, state_of


def test_masked_frames_are_as_if_they_had_been_dropped():
    quantizer = started(revival_every=1)
    x, mask = latents(), torch.rand(4, 25) > 0.4
    garbage = torch.where(mask[..., None], x, torch.tensor(float("nan")))
    masked, dropped = quantizer(garbage, mask), quantizer(x[mask][None])
    for name in ("counts", "sums", "squared_error", "frames"):
        assert torch.equal(getattr(masked.stats, name), getattr(dropped.stats, name)), name
    assert torch.equal(masked.stats.pool.residuals, dropped.stats.pool.residuals)
    assert masked.stats.nonfinite == 0
    for name in masked.losses:
        assert torch.equal(masked.losses[name], dropped.losses[name]), name
    assert torch.equal(masked.codes[mask], dropped.codes[0])
    assert (masked.codes[~mask] == -1).all() and (masked.quantized[~mask] == 0).all()
    other = copy.deepcopy(quantizer)
    quantizer.update(masked.stats)
    other.update(dropped.stats)
    assert same_state(state_of(quantizer), state_of(other))


def test_masked_frames_get_no_gradient():
    quantizer = started(codebook_dim=6)
    x, mask = latents().requires_grad_(), torch.rand(4, 25) > 0.4
    out = quantizer(x, mask)
    (out.quantized.sum() + sum(out.losses.values())).backward()
    assert (x.grad[~mask] == 0).all() and (x.grad[mask] != 0).any(1).all()


def test_frames_with_nan_never_enter_and_are_counted():
    quantizer = started(codebook_dim=6)
    x = latents()
    x[0, 3, 2], x[2, 7, 0] = float("nan"), float("inf")
    clean = torch.isfinite(x).all(-1)
    x.requires_grad_()
    out, dropped = quantizer(x), quantizer(x.detach()[clean][None])
    assert out.stats.nonfinite == 2 and dropped.stats.nonfinite == 0
    assert torch.equal(out.stats.sums, dropped.stats.sums)
    assert (out.codes[~clean] == -1).all() and (out.quantized[~clean] == 0).all()
    (out.quantized.sum() + sum(out.losses.values())).backward()
    assert torch.isfinite(x.grad).all() and (x.grad[~clean] == 0).all()
    assert torch.isfinite(quantizer.project_in.weight.grad).all()
    quantizer.update(out.stats)
    assert all(torch.isfinite(value).all() for value in quantizer.state_dict().values())


@pytest.mark.parametrize("broken", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("width", [None, 6])
def test_frames_that_the_caller_has_counted_give_the_same_bits(broken, width):
    quantizer = started(codebook_dim=width)
    x, mask = latents(), torch.rand(4, 25) > 0.4
    if broken is not None:
        row, place = mask.nonzero()[5].tolist()
        x[row, place, 2] = broken
    found = {}
    for count in (None, int(mask.sum())):
        given = x.clone().requires_grad_()
        quantizer.zero_grad()
        out = quantizer(given, mask, count=count)
        (out.quantized.sum() + sum(out.losses.values())).backward()
        weights = [p.grad for p in quantizer.parameters() if p.grad is not None]
        tensors = [*out.stats.tensors().values(), *out.losses.values(), out.quantized, out.codes]
        usage = quantizer.soft_usage(x, mask, count=count)
        found[count] = [*tensors, given.grad, *weights, usage.sums, usage.frames]
    for theirs, ours in zip(*found.values(), strict=True):
        assert torch.equal(theirs, ours)
    assert int(out.stats.nonfinite) == int(broken is not None)


def test_frames_known_to_be_finite_give_the_same_bits():
    quantizer, mask = started(), torch.rand(4, 25) > 0.4
    x, count = latents(), int(mask.sum())
    known, own = quantizer(x, mask, count=count, finite=True), quantizer(x, mask)
    assert torch.equal(known.quantized, own.quantized) and torch.equal(known.codes, own.codes)
    for name in own.losses:
        assert torch.equal(known.losses[name], own.losses[name]), name
    with pytest.raises(ValueError, match="count"):
        quantizer(x, mask, finite=True)
    x[mask.nonzero()[0, 0], mask.nonzero()[0, 1], 0] = torch.nan
    assert quantizer(x, mask, count=count, finite=True).losses["commitment"].isnan()


def test_a_batch_with_every_frame_masked_leaves_the_state_alone():
    quantizer = started()
    x = latents().requires_grad_()
    out = quantizer(x, torch.zeros(4, 25, dtype=torch.bool))
    assert all(torch.isfinite(loss) for loss in out.losses.values())
    (out.quantized.sum() + sum(out.losses.values())).backward()
    assert (x.grad == 0).all()
    before = state_of(quantizer)
    assert quantizer.update(out.stats).applied
    after = state_of(quantizer)
    before.pop("codebooks.updates"), after.pop("codebooks.updates")
    assert same_state(before, after)


def test_a_single_frame_is_quantized_and_learnt_from():
    quantizer = started()
    out = quantizer(latents(1, 1))
    assert out.codes.shape == (1, 1, 4) and out.stats.frames.tolist() == [1] * 4
    quantizer.update(out.stats)
    assert torch.isfinite(quantizer.codebooks.embed).all()


def test_the_order_of_the_batch_axes_means_nothing():
    quantizer = started()
    x, mask = latents(), torch.rand(4, 25) > 0.3
    a, b = quantizer(x, mask), quantizer(x.transpose(0, 1), mask.T)
    assert torch.equal(a.stats.counts, b.stats.counts)
    torch.testing.assert_close(a.stats.sums, b.stats.sums)
    assert torch.equal(a.codes, b.codes.transpose(0, 1))
    for name in a.losses:
        torch.testing.assert_close(a.losses[name], b.losses[name])


def test_statistics_of_micro_batches_add_up():
    quantizer = started(revival_every=1)
    x = latents(8)
    whole = quantizer(x).stats
    parts = sum(quantizer(part).stats for part in x.split(3))
    assert torch.equal(whole.counts, parts.counts) and torch.equal(whole.frames, parts.frames)
    torch.testing.assert_close(whole.sums, parts.sums)
    assert torch.equal(whole.pool.residuals, parts.pool.residuals)
    assert torch.equal(whole.pool.codes, parts.pool.codes)


def test_a_checkpointed_forward_counts_once():
    quantizer = started()

    def forward(x):
        out = quantizer(x)
        return out.quantized, sum(out.losses.values()), out.stats

    plain, recomputed = latents().requires_grad_(), latents().requires_grad_()
    reference = forward(plain)
    (reference[0].sum() + reference[1]).backward()
    out = checkpoint(forward, recomputed, use_reentrant=False)
    before = state_of(quantizer)
    (out[0].sum() + out[1]).backward()
    assert same_state(before, state_of(quantizer))
    assert torch.equal(out[2].counts, reference[2].counts)
    assert torch.equal(plain.grad, recomputed.grad)
