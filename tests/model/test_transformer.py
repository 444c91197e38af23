import math

import pytest
import torch

from b2t.model.encoder import Encoder
from b2t.model.options import EncoderOptions, SignalDecoderOptions
from b2t.model.signal_decoder import SignalDecoder
from b2t.model.transformer import Attention, Transformer, attention_mask, rotary_angles, rotate


def test_rotary_scores_depend_on_the_distance_alone():
    torch.manual_seed(0)
    query, key = torch.randn(8), torch.randn(8)
    cosine, sine = rotary_angles(40, 8, torch.device("cpu"))

    def score(i, j):
        turned = [rotate(v[None], cosine[p], sine[p])[0] for v, p in ((query, i), (key, j))]
        return float(turned[0] @ turned[1])

    assert score(3, 1) == pytest.approx(score(33, 31), abs=1e-4)
    assert score(3, 1) != pytest.approx(score(3, 2), abs=1e-2)
    assert score(0, 0) == pytest.approx(float(query @ key), abs=1e-5)


def test_attention_equals_the_formula_in_float64():
    torch.manual_seed(0)
    attention = Attention(8, 2).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    cosine, sine = (a.double() for a in rotary_angles(5, 4, x.device))
    out = attention(x, attention_mask(mask), cosine, sine)
    qkv = x @ attention.qkv.weight.T + attention.qkv.bias
    heads = []
    for head in range(2):
        part = [qkv[..., 8 * k + 4 * head : 8 * k + 4 * head + 4] for k in range(3)]
        query, key = (rotate(p[:, None], cosine, sine)[:, 0] for p in part[:2])
        scores = (query @ key.transpose(1, 2)) / math.sqrt(4)
        scores = scores.masked_fill(~mask[:, None], -math.inf)
        heads.append(scores.softmax(-1) @ part[2])
    expected = torch.cat(heads, -1) @ attention.out.weight.T + attention.out.bias
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("size", "stride"), [(4, 4), (5, 2), (7, 3)])
def test_encoder_and_decoder_do_not_see_padding(size, stride):
    torch.manual_seed(0)
    encoder = Encoder(
        3,
        EncoderOptions(patch_size=size, patch_stride=stride, dim=16, depth=2, heads=2, dropout=0.0),
    )
    decoder = SignalDecoder(3, 16, size, stride, SignalDecoderOptions(depth=1, heads=2))
    signal = torch.full((3, 41, 3), float("nan"))
    mask = torch.zeros(3, 41, dtype=torch.bool)
    lengths = [41, 17, 2]
    for row, length in enumerate(lengths):
        signal[row, :length] = torch.randn(length, 3)
        mask[row, :length] = True
    latents, frames = encoder(signal, mask)
    back = decoder(latents, frames, 41)
    assert back.shape == signal.shape
    assert latents[~frames].abs().max() == 0
    for row, length in enumerate(lengths):
        alone, _ = encoder(signal[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(latents[row, : alone.shape[1]], alone[0], atol=1e-5, rtol=1e-5)
        every = torch.ones(1, alone.shape[1], dtype=torch.bool)
        torch.testing.assert_close(
            back[row, :length], decoder(alone, every, length)[0], atol=1e-5, rtol=1e-5
        )


def test_every_row_has_a_key_to_attend_to():
    mask = torch.tensor([[False, True, False], [False] * 3])
    assert attention_mask(mask)[:, 0, 0].tolist() == [[False, True, False], [True, False, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_row_without_frames_stays_finite_forward_and_backward(dtype):
    torch.manual_seed(0)
    transformer = Transformer(16, 2, 2, 2.0, 0.0).to(dtype)
    x = torch.randn(2, 5, 16, dtype=dtype, requires_grad=True)
    mask = torch.tensor([[True] * 5, [False] * 5])
    out = transformer(x, mask)
    out.float().square().sum().backward()
    assert out[1].abs().max() == 0
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in transformer.parameters())


def test_large_half_precision_activations_stay_finite():
    transformer = Transformer(16, 2, 2, 2.0, 0.0).half()
    x = torch.full((1, 300, 16), 3000.0, dtype=torch.float16)
    x[:, ::2] *= -1
    assert torch.isfinite(transformer(x, torch.ones(1, 300, dtype=torch.bool))).all()


def test_geometry_is_checked():
    with pytest.raises(ValueError, match="patch_stride"):
        EncoderOptions(patch_size=4, patch_stride=5)
    with pytest.raises(ValueError, match="even whole number"):
        EncoderOptions(dim=10, heads=2)
