"""Components that are frozen, and activations that are computed again instead of kept."""

import pytest
import torch

from tests.model.small_model import batch_of, build, gradients


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
