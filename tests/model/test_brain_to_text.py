import copy
import math
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModel,
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from b2t.data.batches import Batch
from b2t.errors import UserError
from b2t.model import DEFAULT_WEIGHTS, BrainToText, BrainToTextConfig

CHANNELS, SESSIONS = 6, ["a", "b", "c"]
QUANTIZER = {"codebook_size": 16, "num_quantizers": 3, "kmeans_init": False}


def config(**change):
    sections = {
        "channels": CHANNELS,
        "sessions": SESSIONS,
        "encoder": {
            "patch_size": 4, "patch_stride": 3, "dim": 16, "depth": 2, "heads": 2, "dropout": 0.0,
        },
        "quantizer": QUANTIZER,
        "signal_decoder": {"depth": 1, "heads": 2},
        "phoneme_head": {"dropout": 0.0},
        "text_decoder": {
            "dim": 16, "depth": 2, "heads": 2, "ffn_dim": 32, "dropout": 0.0, "max_tokens": 12,
        },
        "vocab_size": 30,
    }  # fmt: skip
    for name, value in change.items():
        old = sections.get(name)
        both = isinstance(old, dict) and isinstance(value, dict)
        sections[name] = {**old, **value} if both else value
    return BrainToTextConfig(**sections)


def build(seed=0, **change):
    torch.manual_seed(seed)
    model = BrainToText(config(**change))
    if model.adapter is not None:
        torch.nn.init.normal_(model.adapter.bias)
    return model


def batch_of(lengths, seed=0, text=True, phonemes=True):
    generator = torch.Generator().manual_seed(seed)
    bins, rows = max(lengths), len(lengths)
    mask = torch.arange(bins) < torch.tensor(lengths)[:, None]
    signal = torch.randn(rows, bins, CHANNELS, generator=generator) * mask[..., None]
    tokens = torch.randint(2, 30, (rows, 7), generator=generator)
    sizes = torch.randint(2, 7, (rows,), generator=generator)
    for row, size in enumerate(sizes.tolist()):
        tokens[row, size] = 1
        tokens[row, size + 1 :] = -100
    ids = torch.randint(1, 41, (rows, 4), generator=generator)
    counts = torch.randint(1, 5, (rows,), generator=generator)
    ids[torch.arange(4) >= counts[:, None]] = 0
    return Batch(
        signal=signal,
        target=signal * 1.5,
        signal_mask=mask,
        session=torch.arange(rows) % 4 - 1,
        tokens=tokens if text else torch.full_like(tokens, -100),
        phonemes=ids if phonemes else torch.zeros_like(ids),
        phoneme_lengths=counts if phonemes else torch.zeros_like(counts),
        rows=[f"s/1/{row}" for row in range(rows)],
        texts=[None] * rows,
    )


def part(batch, start, stop, bins=None):
    """Some rows of a batch, as if loaded alone."""
    tensors = {k: v[start:stop] for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    for name in ("signal", "target", "signal_mask"):
        tensors[name] = tensors[name][:, :bins]
    rows = {"rows": batch.rows[start:stop], "texts": batch.texts[start:stop], "_counts": None}
    return replace(batch, **tensors, **rows)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bins", [1, 2, 23, 40])
def test_shapes(bins):
    out = build()(batch_of([bins, max(1, bins - 5)]))
    frames = max(0, -(-(bins - 4) // 3)) + 1
    assert out.reconstruction.shape == (2, bins, CHANNELS)
    assert out.latents.shape == out.quantized.shape == (2, frames, 16)
    assert out.codes.shape == (2, frames, 3)
    assert out.phoneme_logits.shape == (2, frames, 41)
    assert out.text_logits.shape == (2, 7, 30)
    assert set(out.losses) == set(DEFAULT_WEIGHTS)
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
    counts = {k: float(v) / 2 for k, v in model.counts(whole).items()}
    outs = [model(p, counts=counts, weights=weights) for p in parts]
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


@pytest.mark.parametrize("every", [1, 2])
def test_checkpointed_activations_give_the_same_gradients_and_statistics(every):
    dropout = {"dropout": 0.2}
    model = build(
        encoder=dropout, signal_decoder=dropout, text_decoder=dropout, adapter=dropout
    ).train()
    batch = batch_of([40, 23, 11])

    def step():
        torch.manual_seed(3)
        model.zero_grad()
        out = model(batch)
        out.loss.backward()
        return out, gradients(model)

    plain, expected = step()
    calls = count_calls(model)
    step()
    once = dict(calls)
    model.checkpoint_activations(encoder=every, signal_decoder=every, text_decoder=1)
    calls.clear()
    again, found = step()
    assert calls["quantizer"] == once["quantizer"] == 1
    assert calls["encoder"] == once["encoder"] + (2 if every == 1 else 1)
    assert calls["signal_decoder"] == once["signal_decoder"] + 1
    assert calls["text_decoder"] == once["text_decoder"] + 2
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name
    for name in ("counts", "sums", "squared_error", "frames"):
        assert torch.equal(getattr(again.stats, name), getattr(plain.stats, name)), name
    model.gradient_checkpointing_disable()
    calls.clear()
    step()
    assert calls == once


@pytest.mark.parametrize("component", ["encoder", "signal_decoder", "text_decoder"])
def test_checkpointing_a_component_keeps_fewer_bytes_for_backward(component):
    deep = {"depth": 4}
    model = build(encoder=deep, signal_decoder=deep, text_decoder=deep).train()
    batch = batch_of([40, 23, 11])
    off = dict.fromkeys(("encoder", "signal_decoder", "text_decoder"), 0)
    kept = {}
    for every in (0, 2, 1):
        model.checkpoint_activations(**{**off, component: every})
        kept[every] = bytes_kept(model, batch)
    assert kept[1] < kept[0]
    if component != "text_decoder":  # whose library knows all layers or none
        assert kept[1] < kept[2] < kept[0]
        saved = kept[0] - kept[1]
        assert kept[0] - kept[2] == pytest.approx(saved / 2, rel=0.1), "half of the layers"


def bytes_kept(model, batch):
    """Bytes that autograd holds between forward and backward, each storage once."""
    storages = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    alive = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(batch)
    return sum(storages.values())


def count_calls(model):
    calls = {}

    def hook(name):
        def note(*_):
            calls[name] = calls.get(name, 0) + 1

        return note

    model.quantizer.register_forward_pre_hook(hook("quantizer"))
    for name in ("encoder", "signal_decoder"):
        for block in getattr(model, name).transformer.blocks:
            block.mlp.register_forward_pre_hook(hook(name))
    for layer in model.text_decoder.seq2seq.get_decoder().layers:
        layer.fc1.register_forward_pre_hook(hook("text_decoder"))
    return calls


def test_frozen_components_get_no_gradients_no_dropout_and_no_graph():
    model = build(encoder={"dropout": 0.5}, adapter={"dropout": 0.5}).train()
    batch = batch_of([40, 23])
    model.freeze(["adapter", "encoder"])
    one, two = model(batch), model(batch)
    assert torch.equal(one.latents, two.latents)
    assert one.latents.grad_fn is None
    one.loss.backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("adapter.", "encoder."))
        assert (parameter.grad is None) == frozen, name
    model.eval()
    model.train()
    assert not model.encoder.training
    assert model.signal_decoder.training
    model.freeze(["signal_decoder"])
    assert model.encoder.training
    model.zero_grad(set_to_none=True)
    model(batch, weights={"reconstruction": 1.0}).loss.backward()
    assert model.encoder.embed.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in model.signal_decoder.parameters())
    model.freeze()
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="enocder"):
        model.freeze(["enocder"])


def states_equal(one, two):
    first, second = one.state_dict(), two.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"quantizer": {"update_rule": "gradient", "codebook_dim": 8}},
        {"quantizer": None},
        {"text_decoder": {"enabled": False}},
        {"text_decoder": {"config": {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32,
                                     "num_layers": 1, "num_heads": 2}}},
    ],
)  # fmt: skip
def test_save_and_load_is_bitwise(change, tmp_path):
    model, batch = build(**change), batch_of([40, 23, 11])
    if model.quantizer is not None:
        model.quantizer.update(model(batch).stats)
        model.quantizer.set_progress(1 / 3)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    for loaded in (BrainToText.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        states_equal(model, loaded)
        assert torch.equal(model.eval()(batch).loss, loaded(batch).loss)
        if loaded.text_decoder is not None:
            assert torch.equal(model.generate(batch), loaded.generate(batch))
            tied = loaded.text_decoder.seq2seq
            assert tied.lm_head.weight is tied.get_input_embeddings().weight
    assert loaded.config.sessions == SESSIONS
    assert loaded.config.simulated_data is False


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "float16"])
def test_half_precision_keeps_the_codebooks_exactly(dtype, tmp_path):
    model, batch = build(quantizer={"codebook_dim": 8}), batch_of([40, 23, 11])
    model.quantizer.update(model(batch).stats)
    model.save_pretrained(tmp_path)
    half = BrainToText.from_pretrained(tmp_path, dtype=dtype)
    states_equal(model.quantizer.codebooks, half.quantizer.codebooks)
    wanted = torch.float16 if dtype == "float16" else dtype
    assert half.encoder.embed.weight.dtype == wanted
    out = half.train()(batch)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert all(loss.dtype == torch.float32 for loss in out.losses.values())
    assert torch.isfinite(out.loss)
    assert all(torch.isfinite(g).all() for g in gradients(half).values())
    assert abs(float(out.losses["generation"].detach()) - math.log(30)) < 1.5
    half.save_pretrained(tmp_path / "half")
    states_equal(half, BrainToText.from_pretrained(tmp_path / "half"))
    states_equal(model.quantizer.codebooks, copy.deepcopy(model).half().quantizer.codebooks)


def test_broken_folders_say_so(tmp_path):
    with pytest.raises(UserError, match="no trained model"):
        BrainToText.from_pretrained(tmp_path / "nowhere")
    build(phoneme_head={"enabled": False}).save_pretrained(tmp_path)
    config().save_pretrained(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"lacks .*phoneme_head"):
        BrainToText.from_pretrained(tmp_path)


def tiny_checkpoint(folder, kind):
    torch.manual_seed(5)
    shape = {"d_model": 24, "vocab_size": 40, "pad_token_id": 0, "eos_token_id": 1}
    if kind == "bart":
        model = BartForConditionalGeneration(
            BartConfig(
                **shape, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
                max_position_embeddings=16, bos_token_id=2, decoder_start_token_id=1,
            )
        )  # fmt: skip
    else:
        model = T5ForConditionalGeneration(
            T5Config(**shape, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
        ).to(torch.bfloat16)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_a_local_checkpoint_is_loaded_once_and_saved_with_the_model(kind, tmp_path):
    original = tiny_checkpoint(tmp_path / "seq2seq", kind)
    asked = config(text_decoder={"checkpoint": str(tmp_path / "seq2seq")})
    model = BrainToText(asked)
    embedding = model.text_decoder.seq2seq.get_input_embeddings().weight
    assert torch.equal(embedding, original.get_input_embeddings().weight.float())
    assert asked.text_decoder["checkpoint"] is not None
    batch = batch_of([20, 13])
    assert model(batch).text_logits.shape == (2, 7, 40)
    model.save_pretrained(tmp_path / "model")
    for file in (tmp_path / "seq2seq").iterdir():
        file.unlink()
    loaded = BrainToText.from_pretrained(tmp_path / "model")
    states_equal(model, loaded)
    assert loaded.config.text_decoder["initialized_from"] == str(tmp_path / "seq2seq")
    assert torch.equal(model.generate(batch), loaded.generate(batch))


def test_what_cannot_work_is_said_at_once(tmp_path):
    with pytest.raises(UserError, match="tokenizer has 50 tokens"):
        tiny_checkpoint(tmp_path, "bart")
        BrainToText(config(text_decoder={"checkpoint": str(tmp_path)}, vocab_size=50))
    with pytest.raises(UserError, match="max_position_embeddings=16"):
        BrainToText(config(text_decoder={"checkpoint": str(tmp_path), "max_tokens": 20}))
    batch = batch_of([20, 13])
    batch.tokens = torch.full((2, 13), -100)
    build()(batch)
    batch.tokens[1] = 5
    with pytest.raises(UserError, match=r"s/1/1.*13 tokens.*takes 12"):
        build()(batch)
    with pytest.raises(ValueError, match="dpeth"):
        config(encoder={"dpeth": 3})


def test_same_seed_same_model():
    states_equal(build(seed=4), build(seed=4))
    one, two = build(seed=4).state_dict(), build(seed=5).state_dict()
    assert not torch.equal(one["encoder.embed.weight"], two["encoder.embed.weight"])
