from types import SimpleNamespace

import numpy as np
import pytest
import torch

from b2t.data.batches import Batch
from b2t.evaluate.controls import (
    noise_batch,
    noise_like,
    shuffled,
    shuffled_codes,
    spectrum_like,
)
from b2t.model import BrainToTextOutput


def batch_of(signal, mask, rows=None):
    size = len(signal)
    return Batch(
        signal=signal,
        target=signal.clone(),
        signal_mask=mask,
        session=torch.zeros(size, dtype=torch.int64),
        tokens=torch.full((size, 1), -100),
        phonemes=torch.zeros(size, 1, dtype=torch.int64),
        phoneme_lengths=torch.zeros(size, dtype=torch.int64),
        rows=rows or [f"s/0/{i}" for i in range(size)],
        texts=[None] * size,
    )


def two_trials():
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.5, 1.0, 4.0, 0.0])
    centre = torch.tensor([-3.0, 0.0, 7.0, 2.0])
    signal = torch.randn(2, 4000, 4, generator=generator) * spread + centre
    mask = torch.ones(2, 4000, dtype=torch.bool)
    mask[1, 2500:] = False
    return signal * mask[..., None], mask


def test_noise_has_each_trials_channel_moments_and_nothing_of_its_course():
    signal, mask = two_trials()
    noise = noise_like(signal, mask, [1, 2])
    for row in range(2):
        real, fake = signal[row, mask[row]].numpy(), noise[row, mask[row]].numpy()
        assert fake.mean(0) == pytest.approx(real.mean(0), abs=0.25)
        assert fake.std(0) == pytest.approx(real.std(0), rel=0.06, abs=1e-6)
        for channel in range(3):
            assert abs(np.corrcoef(real[:, channel], fake[:, channel])[0, 1]) < 0.07
    assert not noise[~mask].any()


def test_noise_of_two_bins_is_as_loud_as_they_are():
    """Their deviation is that of all there is, 1; as a sample's it would be the root of 2."""
    signal = torch.tensor([-1.0, 1.0])[None, :, None].expand(1, 2, 4000)
    noise = noise_like(signal, torch.ones(1, 2, dtype=torch.bool), [3])
    assert noise.square().mean().sqrt() == pytest.approx(1.0, abs=0.05)


def test_noise_of_a_row_does_not_depend_on_its_batch():
    signal, mask = two_trials()
    both = noise_batch(batch_of(signal, mask), seed=3)
    alone = noise_batch(batch_of(signal[1:, :2500], mask[1:, :2500], ["s/0/1"]), seed=3)
    assert torch.equal(both.signal[1, :2500], alone.signal[0])
    other = noise_batch(batch_of(signal, mask), seed=4)
    assert not torch.equal(both.signal, other.signal)
    assert both.rows == ["s/0/0", "s/0/1"]


def test_noise_of_an_all_masked_row_is_zero():
    signal, mask = two_trials()
    mask[0] = False
    noise = noise_like(signal, mask, [1, 2])
    assert not noise[0].any() and noise[1].any()


@pytest.mark.parametrize("size", [2, 3, 17])
def test_shuffling_leaves_nothing_in_place_and_loses_nothing(size):
    for seed in range(30):
        permuted = shuffled(range(size), seed)
        assert sorted(permuted) == list(range(size))
        assert all(i != item for i, item in enumerate(permuted))


def test_shuffling_is_seeded_and_survives_one_item():
    assert shuffled(range(9), 1) == shuffled(range(9), 1)
    assert shuffled(["a"]) == ["a"] and shuffled([]) == []


def test_surrogates_keep_each_channels_spectrum_and_lose_its_course():
    signal, mask = two_trials()
    signal = signal.cumsum(1).masked_fill(~mask[..., None], 0.0)
    noise = spectrum_like(signal, mask, [1, 2])
    for row in range(2):
        real, fake = signal[row, mask[row]].double(), noise[row, mask[row]].double()
        power = [torch.fft.rfft(some, dim=0).abs() for some in (real, fake)]
        assert torch.allclose(
            power[0], power[1], rtol=1e-2, atol=1e-2 * float(power[0].max()) / 100
        )
        assert torch.allclose(real.mean(0), fake.mean(0), atol=1e-3 * float(real.abs().max()))
        assert (real - fake).square().mean() > 0.3 * real.var(0).mean()
    assert not noise[~mask].any()
    alone = spectrum_like(signal[1:], mask[1:], [2])
    assert torch.equal(alone[0], noise[1])
    mask[0] = False
    assert not spectrum_like(signal, mask, [1, 2])[0].any()


def test_codes_change_their_order_and_nothing_else():
    """The heads hear the moved latents; what stands under the mask stays."""
    generator = torch.Generator().manual_seed(0)
    quantized = torch.randn(2, 7, 3, generator=generator)
    codes = torch.randint(0, 9, (2, 7, 2), generator=generator)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    model = SimpleNamespace(phoneme_head=lambda latents: 2 * latents)
    output = BrainToTextOutput(
        quantized=quantized, codes=codes, frame_mask=mask, phoneme_logits=2 * quantized
    )
    moved = shuffled_codes(model, output, ["a/0/1", "a/0/2"], seed=1)
    assert torch.equal(moved.phoneme_logits, 2 * moved.quantized)
    assert torch.equal(moved.quantized[1, 4:], quantized[1, 4:])
    for row, frames in ((0, 7), (1, 4)):
        places = [
            next(i for i in range(frames) if torch.equal(quantized[row, i], latent))
            for latent in moved.quantized[row, :frames]
        ]
        assert sorted(places) == list(range(frames)) != places
        assert torch.equal(moved.codes[row, :frames], codes[row, places])
    again = shuffled_codes(model, output, ["a/0/1", "a/0/2"], seed=1)
    assert torch.equal(again.quantized, moved.quantized)
    assert torch.equal(output.quantized, quantized), "the output itself stays as it is"
