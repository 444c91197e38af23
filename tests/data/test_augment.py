"""Augmentation against closed forms on ramps, sines and constants."""

import numpy as np
import pytest

from b2t.data.augment import Augment, row_generator, smooth

OFF = {
    "time_shift_ms": 0,
    "channel_dropout": 0,
    "noise_std": 0,
    "scale": (1, 1),
    "time_masks": 0,
    "frequency_masks": 0,
}


def only(**fields) -> Augment:
    return Augment(**{**OFF, **fields})


def noise(T: int = 200, C: int = 8) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((T, C)).astype(np.float32)


def generators(count: int = 200):
    return [row_generator(1, 0, epoch, "s/0/0") for epoch in range(count)]


def test_everything_off_returns_the_signal():
    signal = noise()
    augmented = only()(signal, 50.0, row_generator(0, 0, 0, "a"))
    np.testing.assert_array_equal(augmented.signal, signal)
    np.testing.assert_array_equal(augmented.target, signal)
    assert augmented.mask.all()


def test_shift_moves_by_at_most_the_time_it_was_given_and_masks_what_it_leaves():
    signal = np.arange(1, 101, dtype=np.float32)[:, None]
    shifts = set()
    for generator in generators():
        _, target, mask = only(time_shift_ms=100)(signal, 50.0, generator)
        values = target[mask, 0]
        first = int(np.flatnonzero(mask)[0])
        shift = first if first else -int(values[0] - 1)
        expected = [
            signal[bin_ - shift, 0] if 0 <= bin_ - shift < 100 else 0.0 for bin_ in range(100)
        ]
        np.testing.assert_array_equal(target[:, 0], expected)
        np.testing.assert_array_equal(mask, np.asarray(expected) > 0)
        shifts.add(shift)
    assert shifts == set(range(-5, 6))


def test_shift_keeps_at_least_one_bin():
    for bins in (1, 2, 3):
        for generator in generators(30):
            augmented = Augment(time_shift_ms=1000)(noise(bins), 50.0, generator)
            assert augmented.mask.any()
            assert np.isfinite(augmented.signal).all()


def test_one_scale_for_the_trial_and_for_the_target():
    signal = noise()
    factors = []
    for generator in generators():
        augmented = only(scale=(0.9, 1.1))(signal, 50.0, generator)
        ratio = augmented.target / signal
        assert np.ptp(ratio) < 1e-5
        np.testing.assert_array_equal(augmented.signal, augmented.target)
        factors.append(ratio[0, 0])
    assert 0.9 <= min(factors) < 0.92 and 1.08 < max(factors) <= 1.1


def test_noise_has_its_deviation_and_leaves_the_target():
    signal = noise(2000, 16)
    augmented = only(noise_std=0.01)(signal, 50.0, row_generator(0, 0, 0, "a"))
    assert np.std(augmented.signal - signal) == pytest.approx(0.01, rel=0.02)
    np.testing.assert_array_equal(augmented.target, signal)


def test_offset_is_constant_along_time_and_differs_by_channel():
    signal = noise(50, 512)
    difference = only(offset_std=0.2)(signal, 50.0, row_generator(0, 0, 0, "a")).signal - signal
    assert np.ptp(difference, axis=0).max() < 1e-5
    assert np.std(difference[0]) == pytest.approx(0.2, rel=0.1)


def test_channel_dropout_share_and_the_last_channel_stays():
    dropped = []
    for generator in generators():
        augmented = only(channel_dropout=0.1)(noise(20, 64), 50.0, generator)
        silent = ~augmented.signal.any(axis=0)
        kept = augmented.signal[:, ~silent]
        np.testing.assert_array_equal(kept, noise(20, 64)[:, ~silent])
        dropped.append(silent.mean())
    assert np.mean(dropped) == pytest.approx(0.1, abs=0.01)
    for generator in generators(20):
        assert only(channel_dropout=0.99)(noise(5, 3), 50.0, generator).signal.any()


def test_time_masks_are_short_and_silence_every_channel():
    shares = []
    for generator in generators():
        signal = only(time_masks=1, time_mask_fraction=0.1)(noise(), 50.0, generator).signal
        silent = ~signal.any(axis=1)
        np.testing.assert_array_equal(signal[~silent], noise()[~silent])
        assert np.count_nonzero(np.diff(silent.astype(int))) <= 2
        shares.append(silent.sum())
    assert max(shares) == 20 and min(shares) == 0


def test_frequency_mask_removes_one_band_and_nothing_else():
    signal = noise(256, 4) + 3
    widths = []
    for generator in generators(100):
        augment = only(frequency_masks=1, frequency_mask_fraction=0.1)
        spectrum = np.fft.rfft(augment(signal, 50.0, generator).signal.astype(np.float64), axis=0)
        reference = np.fft.rfft(signal.astype(np.float64), axis=0)
        removed = np.abs(spectrum).max(axis=1) < 1e-3
        np.testing.assert_allclose(spectrum[~removed], reference[~removed], atol=1e-3)
        assert not removed[0]
        indices = np.flatnonzero(removed)
        assert len(indices) == 0 or len(indices) == np.ptp(indices) + 1
        widths.append(len(indices))
    assert max(widths) == 12


@pytest.mark.parametrize("bins", [255, 256])
def test_frequency_mask_can_reach_the_highest_frequency(bins):
    reached = False
    for generator in generators(400):
        augment = only(frequency_masks=1, frequency_mask_fraction=0.3)
        spectrum = np.fft.rfft(augment(noise(bins), 50.0, generator).signal, axis=0)
        reached |= bool(np.abs(spectrum[-1]).max() < 1e-3)
    assert reached


def test_masked_bins_stay_zero_with_everything_on():
    augment = Augment(offset_std=1.0, noise_std=1.0, smoothing_bins=2.0, time_shift_ms=400)
    for generator in generators(50):
        augmented = augment(noise(), 50.0, generator)
        assert not augmented.signal[~augmented.mask].any()
        assert not augmented.target[~augmented.mask].any()


def test_smoothing_is_the_normalised_gaussian_and_belongs_to_evaluation():
    impulse = np.zeros((101, 1), np.float32)
    impulse[50] = 1
    offsets = np.arange(-50, 51)
    expected = np.exp(-(offsets**2) / (2 * 2.0**2))
    np.testing.assert_allclose(smooth(impulse, 2.0)[:, 0], expected / expected.sum(), atol=1e-4)
    augmented = Augment(smoothing_bins=2.0).evaluation(impulse)
    np.testing.assert_array_equal(augmented.signal, smooth(impulse, 2.0))
    np.testing.assert_array_equal(augmented.target, impulse)


def test_disabled_leaves_the_signal():
    augmented = Augment(enabled=False)(noise(), 50.0, row_generator(0, 0, 0, "a"))
    np.testing.assert_array_equal(augmented.signal, noise())


def test_generator_depends_on_each_of_its_four_parts_and_on_nothing_else():
    def draw(*parts):
        return row_generator(*parts).random()

    reference = draw(1, 2, 3, "s/4/5")
    assert draw(1, 2, 3, "s/4/5") == reference
    others = {draw(0, 2, 3, "s/4/5"), draw(1, 0, 3, "s/4/5"), draw(1, 2, 0, "s/4/5")}
    others |= {draw(1, 2, 3, "s/4/6"), draw(2, 1, 3, "s/4/5")}
    assert reference not in others and len(others) == 5


def test_the_input_is_not_changed():
    signal = noise()
    before = signal.copy()
    Augment(offset_std=1.0)(signal, 50.0, row_generator(0, 0, 0, "a"))
    np.testing.assert_array_equal(signal, before)
