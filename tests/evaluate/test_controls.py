import numpy as np
import pytest
import torch

from b2t.data.batches import Batch
from b2t.evaluate.controls import noise_batch, noise_like, shuffled


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
