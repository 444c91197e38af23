"""Packed frames see what padded frames see; the attention itself takes a GPU, and is lent here."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from b2t.model import packing, transformer
from b2t.model.transformer import Transformer
from tests.model.small_model import batch_of, build, gradients


def row_by_row(query, key, value, starts, longest, causal):
    """What attention of packed rows is: each row by itself."""
    mixed = torch.empty_like(query)
    for first, last in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        assert last - first <= longest
        q, k, v = (x[first:last].transpose(0, 1)[None] for x in (query, key, value))
        if last > first:
            one = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
            mixed[first:last] = one[0].transpose(0, 1)
    return mixed


@pytest.fixture
def lent(monkeypatch):
    monkeypatch.setattr(transformer, "can_pack", lambda x, window: window is None)
    monkeypatch.setattr(transformer, "packed_attention", row_by_row)


def a_batch():
    """Frames [4, 9, 8]: one row that begins masked, one whole, one short, one without any."""
    x = torch.randn(4, 9, 8, generator=torch.Generator().manual_seed(1))
    place = torch.arange(9)
    mask = (place >= torch.tensor([2, 0, 0, 9])[:, None]) & (
        place < torch.tensor([7, 9, 3, 9])[:, None]
    )
    return x, mask


def passed(stack, x, mask, count):
    """Output and gradients by name, of a loss that the last norm does not hold constant."""
    x = x.clone().requires_grad_()
    stack.zero_grad()
    out = stack(x, mask, count)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weights.to(out)).sum().backward()
    found = {name: p.grad.clone() for name, p in stack.named_parameters()}
    return {"output": out.detach(), "input": x.grad, **found}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("every", [0, 1])
def test_outputs_and_gradients_are_those_of_padded_frames(lent, causal, every):
    torch.manual_seed(0)
    stack = Transformer(8, 2, 2, 2.0, 0.0, causal=causal)
    stack.checkpoint_every = every
    x, mask = a_batch()
    expected = passed(stack, x, mask, int(mask.sum()))
    stack.packs = True
    found = passed(stack, torch.where(mask[..., None], x, torch.nan), mask, int(mask.sum()))
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        assert theirs.norm() > 0.01, f"{name}: nothing to compare"
        torch.testing.assert_close(found[name], theirs, rtol=1e-5, atol=5e-6)
    assert (found["output"][~mask] == 0).all()


def test_a_model_whose_batch_was_counted_packs_and_gives_the_same(lent, monkeypatch):
    model = build().train()
    batch = batch_of([40, 23, 11])
    model(batch).loss.backward()
    expected = gradients(model)
    sizes, attend = [], transformer.packed_attention
    monkeypatch.setattr(
        transformer, "packed_attention", lambda q, *rest: sizes.append(len(q)) or attend(q, *rest)
    )
    model.pack_frames()
    model(batch)
    assert not sizes  # nobody has counted
    model.counts(batch)
    model.zero_grad()
    model(batch).loss.backward()
    assert sizes == 3 * [batch.frames]  # two blocks of the encoder, one of the decoder
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_padding_stays_where_attention_cannot_take_rows_and_the_log_says_why(caplog, monkeypatch):
    monkeypatch.setattr("b2t.log._said", set())
    x, mask = a_batch()
    stack = Transformer(8, 1, 2, 2.0, 0.0)
    expected = stack(x, mask)
    stack.packs = True
    for _ in range(2):
        assert torch.equal(stack(x, mask, int(mask.sum())), expected)
    assert [r.getMessage() for r in caplog.records].count(
        "model.pack_frames: frames are padded, that takes a GPU and 16 bit, and these are "
        "torch.float32 on cpu"
    ) == (packing._VARLEN is not None)


def test_a_causal_row_is_asked_for_as_this_torch_has_it():
    assert packing.causal_options(lambda query, is_causal=False: 0) == {"is_causal": True}
    assert packing.causal_options(lambda query, window_size=0: 0) == {"window_size": (-1, 0)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention takes a GPU")
@pytest.mark.parametrize("causal", [False, True])
def test_a_gpu_gives_what_padded_frames_give(causal):
    torch.manual_seed(0)
    stack = Transformer(128, 2, 2, 2.0, 0.0, causal=causal).cuda().half()
    mask = torch.arange(67, device="cuda") < torch.tensor([67, 31, 5], device="cuda")[:, None]
    x = torch.randn(3, 67, 128, device="cuda", dtype=torch.float16)
    assert packing.can_pack(x, None)
    expected = passed(stack, x, mask, None)
    stack.packs = True
    found, far = passed(stack, x, mask, int(mask.sum())), {}
    # Some twenty roundings of 2⁻¹¹ lie between a gradient and the output: √20 · 2⁻¹¹ on each side
    # (on a CPU either is 0.2 % from float64 at most), and three times that is let pass.
    for name, theirs in expected.items():
        distance = (found[name].float() - theirs.float()).norm() / theirs.float().norm()
        if not distance < 0.01:
            far[f"{name} {list(theirs.shape)}"] = float(distance)
    assert not far


def test_a_batch_that_moves_keeps_its_count_and_one_made_of_it_does_not():
    model, batch = build(), batch_of([40, 23, 11])
    model.counts(batch)
    assert batch.frames == int(model.frame_mask(batch.signal_mask).sum())
    assert batch.to("cpu", torch.float64).frames == batch.frames
    assert batch.with_channels([1, 0]).frames is None
    assert replace(batch, signal_mask=batch.signal_mask & False).frames is None
