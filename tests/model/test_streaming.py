"""Bins one by one against the whole signal at once."""

import pytest
import torch

from b2t.config import Config
from b2t.errors import UserError
from b2t.model.streaming import Stream
from tests.model.small_model import CHANNELS, build

KINDS = [
    {"kind": "transformer", "causal": True},
    {"kind": "transformer", "causal": True, "window": 3},
    {"kind": "conv", "causal": True, "kernel_size": 5},
    {"kind": "gru"},
]


def model_of(encoder, size=4, stride=3, smoothing=1.0, **change):
    model = build(
        encoder={**encoder, "patch_size": size, "patch_stride": stride, "depth": 2},
        signal={"smoothing_bins": smoothing},
        **change,
    ).eval()
    torch.nn.init.normal_(model.adapter.weight)
    for parameter in model.encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def streamed(model, signal, session, pieces):
    stream = Stream(model, session)
    found = [stream.push(piece) for piece in signal.split(pieces)]
    found.append(stream.finish())
    parts = [torch.cat(part) for part in zip(*found, strict=True) if part[0] is not None]
    assert stream.bins == len(signal) and stream.frames == len(parts[0])
    return parts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bins", [1, 3, 40])
@pytest.mark.parametrize("patch", [(4, 4), (5, 2)])
def test_streamed_is_offline(kind, bins, patch):
    model = model_of(kind, *patch)
    signal = torch.randn(bins, CHANNELS, generator=torch.Generator().manual_seed(bins))
    offline = model.encode(signal, session="b")
    logits = model.phoneme_head(offline.quantized[None])[0]
    for pieces in (1, 7, bins):
        quantized, codes, phonemes = streamed(model, signal, "b", pieces)
        assert torch.equal(codes, offline.codes)
        torch.testing.assert_close(quantized, offline.quantized, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(phonemes, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_frame_looks_ahead_and_a_window_is_bounded(kind):
    """By gradients: of each frame with respect to each bin."""
    model = model_of(kind, smoothing=0.0, quantizer={"enabled": False})
    signal = torch.randn(1, 40, CHANNELS, requires_grad=True)
    latents, _ = model.latents(signal)
    for frame in range(latents.shape[1]):
        (gradient,) = torch.autograd.grad(
            latents[0, frame].square().sum(), signal, retain_graph=True
        )
        seen = gradient[0].abs().sum(-1).nonzero().flatten()
        assert seen.max() == min(frame * 3 + 3, 39)
        reach = {"window": 2 * 2, "kernel_size": 2 * 4}
        back = next((frames for key, frames in reach.items() if key in kind), frame)
        assert seen.min() == max(frame - back, 0) * 3


def test_a_long_stream_keeps_a_bounded_state():
    model = model_of({"kind": "transformer", "causal": True, "window": 3})
    stream = Stream(model)
    for bins in torch.randn(300, CHANNELS).split(10):
        stream.push(bins)
    assert {keys.shape[2] for keys, _ in stream._state.caches} == {2}
    assert len(stream._recorded) <= 2 * stream._ahead + 10 and len(stream._waiting) < 4


def test_what_cannot_stream_says_why():
    for encoder in ({"kind": "conv"}, {"kind": "gru", "bidirectional": True}, {}):
        with pytest.raises(UserError, match=r"model\.encoder\.causal=true"):
            Stream(build(encoder=encoder))
    stream = Stream(model_of(KINDS[0]))
    with pytest.raises(UserError, match="2×5, expected n×6"):
        stream.push(torch.zeros(2, 5))
    with pytest.raises(UserError, match="NaN"):
        stream.push(torch.full((1, 6), float("nan")))
    with pytest.raises(UserError, match="was not trained on"):
        Stream(model_of(KINDS[0]), "elsewhere")
    for encoder in (
        {"kind": "gru", "bidirectional": True, "causal": True},
        {"window": 4},
        {"kind": "conv", "causal": True, "window": 4},
    ):
        with pytest.raises(ValueError, match="causal"):
            Config.model_validate({"model": {"encoder": encoder}})
    assert not Stream(model_of(KINDS[0])).finish().quantized.numel()
