"""The whole model: losses, padding, labels, decoding."""

import math
from dataclasses import replace

import pytest
import torch

from b2t.errors import UserError
from b2t.model import DEFAULT_WEIGHTS
from b2t.quantize import StepNorms
from tests.model.small_model import CHANNELS, batch_of, build, gradients, part


@pytest.mark.parametrize("bins", [1, 2, 23, 40])
def test_shapes(bins):
    out = build()(batch_of([bins, max(1, bins - 5)]))
    frames = max(0, -(-(bins - 4) // 3)) + 1
    assert out.reconstruction.shape == (2, bins, CHANNELS)
    assert out.latents.shape == out.quantized.shape == (2, frames, 16)
    assert out.codes.shape == (2, frames, 3)
    assert out.phoneme_logits.shape == (2, frames, 41)
    assert out.text_logits.shape == (2, 7, 30)
    assert set(out.losses) == {name for name, weight in DEFAULT_WEIGHTS.items() if weight}
    assert torch.equal(out.codes[..., 0] >= 0, out.frame_mask)
    total = sum(DEFAULT_WEIGHTS[name] * loss.item() for name, loss in out.losses.items())
    assert float(out.loss.detach()) == pytest.approx(total, rel=1e-5)


def test_a_trial_does_not_see_the_padding_around_it():
    model = build().eval()
    batch = batch_of([40, 23, 11, 40])
    hidden = ~batch.signal_mask
    batch.signal[hidden], batch.target[hidden] = float("nan"), float("inf")
    together = model(batch)
    assert torch.isfinite(together.loss)
    for row, length in enumerate([40, 23, 11, 40]):
        alone = model(part(batch, row, row + 1, length))
        frames = alone.latents.shape[1]
        close = {"atol": 2e-5, "rtol": 1e-4}
        torch.testing.assert_close(together.latents[row, :frames], alone.latents[0], **close)
        assert torch.equal(together.codes[row, :frames], alone.codes[0])
        assert (together.codes[row, frames:] == -1).all()
        torch.testing.assert_close(
            together.reconstruction[row, :length], alone.reconstruction[0], **close
        )
        tokens = int((batch.tokens[row] >= 0).sum())
        torch.testing.assert_close(
            together.text_logits[row, :tokens], alone.text_logits[0, :tokens], **close
        )
        torch.testing.assert_close(
            together.phoneme_logits[row, :frames], alone.phoneme_logits[0], **close
        )


def test_mean_over_micro_batches_is_the_global_loss_and_gradient():
    weights = {**DEFAULT_WEIGHTS, "diversity": 0.0, "perplexity": 0.0}
    model, whole = build(), batch_of([40, 23, 11, 31, 8])
    out = model(whole, weights=weights)
    out.loss.backward()
    expected, losses = gradients(model), {k: v.detach() for k, v in out.losses.items()}
    model.zero_grad()
    parts = [part(whole, 0, 1), part(whole, 1, 5, 31)]
    norms = StepNorms({k: float(v) / 2 for k, v in model.counts(whole).items()})
    outs = [model(p, norms, weights=weights) for p in parts]
    (sum(o.loss for o in outs) / 2).backward()
    for name, loss in losses.items():
        mean = sum(o.losses[name].detach() for o in outs) / 2
        torch.testing.assert_close(mean, loss, rtol=1e-4, atol=1e-6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    pooled = outs[0].stats + outs[1].stats
    assert torch.equal(pooled.counts, out.stats.counts)


def test_metrics_are_sums_that_pool_to_the_snr():
    model, whole = build().eval(), batch_of([40, 23, 11])
    out = model(whole)
    real = whole.signal_mask
    error = (out.reconstruction.double() - whole.target.double())[real].square().sum()
    power = whole.target.double()[real].square().sum()
    snr = 10 * math.log10((power / error).item())
    pieces = [model(part(whole, row, row + 1)).metrics for row in range(3)]
    pooled = {name: sum(float(p[name]) for p in pieces) for name in pieces[0]}
    assert 10 * math.log10(pooled["signal_power"] / pooled["squared_error"]) == pytest.approx(
        snr, abs=1e-4
    )
    assert pooled["bins"] == float(real.sum()) * CHANNELS == whole.counts()["bins"]
    assert pooled["tokens"] == whole.counts()["tokens"]
    assert pooled["frames"] == float(out.frame_mask.sum())
    assert not any(value.requires_grad for value in out.metrics.values())


def test_rows_without_labels_contribute_nothing():
    model = build()
    empty = batch_of([20, 13], text=False, phonemes=False)
    out = model(empty, weights={"generation": 1.0, "phoneme": 1.0})
    assert float(out.loss.detach()) == 0.0
    out.loss.backward()
    for component in (model.text_decoder, model.phoneme_head):
        for name, parameter in component.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() == 0, name
    width_zero = replace(
        empty, tokens=empty.tokens[:, :0], phonemes=empty.phonemes[:, :0], _counts=None
    )
    assert float(model(width_zero).losses["generation"].detach()) == 0.0


def test_phonemes_that_do_not_fit_count_neither_above_nor_below_the_line():
    model, batch = build(), batch_of([40, 2, 31])
    batch.phonemes[:] = torch.tensor([3, 3, 5, 5])
    batch.phoneme_lengths[:] = torch.tensor([4, 4, 3])
    out = model(batch, weights={"phoneme": 1.0})
    assert int(out.metrics["phoneme_rows"]) == 2
    assert int(out.metrics["phoneme_rows_too_short"]) == 1
    assert float(model.counts(batch)["phonemes"]) == 4 + 3
    alone = [model(part(batch, row, row + 1), weights={"phoneme": 1.0}).loss for row in (0, 2)]
    torch.testing.assert_close(out.loss, (4 * alone[0] + 3 * alone[1]) / 7)
    none = model(part(batch, 1, 2), weights={"phoneme": 1.0})
    assert (
        float(none.loss.detach()) == 0.0 and float(model.counts(part(batch, 1, 2))["phonemes"]) == 0
    )


def test_a_wholly_masked_row_changes_nothing():
    model = build()
    batch = batch_of([20, 13, 17])
    batch.signal_mask[1] = False
    batch.tokens[1] = -100
    batch.phoneme_lengths[1] = 0
    out = model(batch)
    out.loss.backward()
    first = gradients(model)
    assert all(torch.isfinite(g).all() for g in first.values())
    model.zero_grad()
    keep = torch.tensor([0, 2])
    rest = {k: v[keep] for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    few = replace(batch, **rest, rows=["a", "b"], texts=[None] * 2, _counts=None)
    without = model(few)
    without.loss.backward()
    torch.testing.assert_close(out.loss, without.loss, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(first[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_weights_choose_what_is_computed():
    model, batch = build(), batch_of([20, 13])
    out = model(batch, weights={"reconstruction": 2.0, "generation": 0.0})
    assert set(out.losses) == {"reconstruction"}
    assert out.text_logits is None
    assert out.phoneme_logits is None
    torch.testing.assert_close(out.loss, 2 * out.losses["reconstruction"])
    out.loss.backward()
    assert model.text_decoder.project.weight.grad is None
    with pytest.raises(ValueError, match="reconstuction"):
        model(batch, weights={"reconstuction": 1.0})


def test_generate_alone_equals_generate_in_a_batch():
    dropout = {"dropout": 0.3}
    model = build(encoder=dropout, adapter=dropout, text_decoder=dropout).train()
    lengths = [40, 23, 11]
    batch = batch_of(lengths)
    together = model.generate(batch, max_new_tokens=8, min_new_tokens=8)
    assert model.training
    assert together.shape == (3, 9)
    for row, length in enumerate(lengths):
        single = part(batch, row, row + 1, length)
        alone = model.generate(
            single.signal, single.signal_mask, single.session, max_new_tokens=8, min_new_tokens=8
        )
        assert torch.equal(alone[0], together[row])
    beams = model.generate(batch, num_beams=3)
    assert beams.shape[0] == 3
    assert beams.shape[1] <= 13


def test_learning_a_few_trials_by_heart_decodes_them():
    model, batch = build(quantizer={"enabled": False}), batch_of([24, 24, 24, 24])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        model(batch, weights={"generation": 1.0, "reconstruction": 0.5}).loss.backward()
        optimizer.step()
    out = model.generate(batch)[:, 1:]
    for row in range(4):
        expected = batch.tokens[row][batch.tokens[row] >= 0]
        assert torch.equal(out[row, : len(expected)], expected)


def test_without_a_quantizer_the_latents_go_through():
    for section in ({"enabled": False}, None):
        model = build(quantizer=section)
        out = model(batch_of([20, 13]))
        assert out.codes is None
        assert out.stats is None
        assert out.quantized is out.latents
        assert set(out.losses) == {"reconstruction", "phoneme", "generation"}


def test_without_text_decoder_phoneme_head_and_adapter():
    off = {"enabled": False}
    model = build(text_decoder=off, phoneme_head=off, adapter=off)
    out = model(batch_of([20, 13]))
    assert set(out.losses) == {"reconstruction", "commitment", "diversity", "perplexity"}
    assert model.text_decoder is model.phoneme_head is model.adapter is None
    with pytest.raises(UserError, match="no text decoder"):
        model.generate(batch_of([20]))
    model.checkpoint_activations(encoder=1, signal_decoder=1, text_decoder=1)
    model.freeze(["text_decoder", "encoder"])


def test_gradient_rule_adds_the_codebook_loss():
    model = build(quantizer={"update_rule": "gradient"})
    out = model(batch_of([20, 13]), weights={"commitment": 1.0})
    assert set(out.losses) == {"commitment", "codebook"}
    torch.testing.assert_close(out.loss, out.losses["commitment"] + out.losses["codebook"])
    out.loss.backward()
    assert model.quantizer.codebooks.weight.grad.abs().max() > 0
