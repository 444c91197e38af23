"""Augmentation of batches on the device: a row is the same wherever it lies, and closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from b2t.cli import main
from b2t.config import load_config
from b2t.data.augment import Augment, row_generator
from b2t.data.augment_figure import OFF, variants
from b2t.data.batches import BatchPlan, TrialRows, collate, train_batches
from b2t.data.options import AugmentOptions
from b2t.data.trials import signal_lengths
from b2t.errors import UserError
from b2t.smoothing import smooth, smooth_rows
from tests.data.test_augment import generators, noise, only
from tests.data.test_batches import SESSIONS, Bytes, take, trials

EVERYTHING = {
    "noise_std": 0.5,
    "offset_std": 0.3,
    "random_walk_std": 0.1,
    "random_cut_ms": 60,
    "time_stretch": (0.8, 1.25),
    "array_dropout": 0.3,
    "array_size": 1,
    "session_mixing": 0.5,
    "smoothing_bins": 1.5,
    "time_masks": 2,
    "time_mask_fraction": 0.2,
    "frequency_masks": 1,
    "frequency_mask_fraction": 0.3,
}


@settings(deadline=None, max_examples=25)
@given(order=st.permutations(range(24)), size=st.integers(1, 9), epoch=st.integers(0, 3))
def test_a_row_comes_out_the_same_in_any_batch(order, size, epoch):
    rows = TrialRows(trials(), Bytes(), SESSIONS, Augment(**EVERYTHING), seed=3)
    alone = {}
    for index in order[:size]:
        batch = collate([rows.example(epoch, index)]).to("cpu")
        alone[batch.rows[0]] = batch
    together = collate([rows.example(epoch, index) for index in order[:size]]).to("cpu")
    for place, name in enumerate(together.rows):
        one, bins = alone[name], alone[name].signal.shape[1]
        assert torch.equal(together.signal[place, :bins], one.signal[0])
        assert torch.equal(together.target[place, :bins], one.target[0])
        assert torch.equal(together.signal_mask[place, :bins], one.signal_mask[0])
        assert together.session[place] == one.session[0]
        rest = together.signal[place, bins:], together.target[place, bins:]
        assert not any(part.any() for part in rest) and not together.signal_mask[place, bins:].any()
        assert not together.signal[place][~together.signal_mask[place]].any()
        assert not together.target[place][~together.signal_mask[place]].any()


def test_workers_and_ranks_augment_alike():
    dataset = trials()
    plan = BatchPlan(signal_lengths(dataset), 8)
    common = (dataset, plan, Bytes(), SESSIONS, Augment(**EVERYTHING))
    rows = {}
    for options in ({"micro_batch": 8}, {"micro_batch": 4, "world": 2, "workers": 2}):
        for rank in range(options.get("world", 1)):
            for *_, batches in take(train_batches(*common, seed=1, rank=rank, **options), 2):
                for batch in (batch.to("cpu") for batch in batches):
                    for name, signal, mask in zip(
                        batch.rows, batch.signal, batch.signal_mask, strict=True
                    ):
                        rows.setdefault(name, []).append(signal[mask])
    assert len(rows) == 16 and all(torch.equal(*pair) for pair in rows.values())


def test_counts_of_a_batch_are_those_of_its_augmented_form():
    rows = TrialRows(trials(), Bytes(), SESSIONS, Augment(**EVERYTHING), seed=3)
    batch = collate([rows.example(0, index) for index in range(9)])
    moved = batch.to("cpu", torch.bfloat16)
    assert moved.signal.shape[:2] == moved.signal_mask.shape and moved.pending is None
    assert moved.signal.dtype == torch.bfloat16 and moved.to("cpu").pending is None
    recorded = float(moved.signal_mask.sum() * 3)
    assert batch.counts()["bins"] == moved.counts()["bins"] == recorded


def test_channels_are_chosen_before_or_after_augmentation_alike():
    quiet = {"noise_std": 0.0, "offset_std": 0.0, "random_walk_std": 0.0, "channel_dropout": 0.5}
    augment = Augment(**{**EVERYTHING, **quiet})
    rows = TrialRows(trials(), Bytes(), SESSIONS, augment, seed=3)
    batch = collate([rows.example(0, index) for index in range(9)])
    before, after = batch.with_channels([2, 0]).to("cpu"), batch.to("cpu").with_channels([2, 0])
    torch.testing.assert_close(before.signal, after.signal)
    assert torch.equal(before.target, after.target)


def test_switching_one_augmentation_leaves_the_others_as_they_were():
    draws = [
        Augment(**options).draw((90, 8), 50.0, row_generator(0, 0, 0, "a"))
        for options in ({}, {"time_masks": 0, "noise_std": 3.0, "random_walk_std": 1.0})
    ]
    assert draws[0].shift == draws[1].shift and draws[0].scale == draws[1].scale
    assert draws[0].noise_seed == draws[1].noise_seed
    np.testing.assert_array_equal(draws[0].kept, draws[1].kept)


def test_a_cut_leaves_out_the_beginning():
    signal, cuts = noise(100), set()
    for generator in generators():
        augmented = only(random_cut_ms=60)(signal, 50.0, generator)
        cut = 100 - len(augmented.signal)
        np.testing.assert_array_equal(augmented.signal, signal[cut:])
        cuts.add(cut)
    assert cuts == {0, 1, 2, 3}


def test_a_stretched_ramp_is_a_slower_ramp():
    ramp = np.linspace(0, 1, 101, dtype=np.float32)[:, None]
    lengths = []
    for generator in generators():
        found = only(time_stretch=(0.5, 2.0))(ramp, 50.0, generator).signal
        np.testing.assert_allclose(found[:, 0], np.linspace(0, 1, len(found)), atol=1e-5)
        lengths.append(len(found))
    assert min(lengths) < 56 and max(lengths) > 196


def test_a_random_walk_spreads_with_the_root_of_time():
    silence = np.zeros((400, 600), np.float32)
    walk = only(random_walk_std=0.2)(silence, 50.0, row_generator(0, 0, 0, "a")).signal
    for bins in (1, 100, 400):
        assert walk[bins - 1].std() == pytest.approx(0.2 * np.sqrt(bins), rel=0.12)
    steps = np.diff(walk, axis=0)
    assert abs((steps[1:] * steps[:-1]).mean()) < 0.001


def test_arrays_fall_silent_whole_in_all_their_features():
    signal, lost = np.abs(noise(20, 24)) + 1, []
    augment = only(array_dropout=0.4, array_size=4, array_features=2)
    for generator in generators():
        alive = augment(signal, 50.0, generator).signal.any(axis=0)
        arrays = alive.reshape(2, 3, 4)  # features, arrays, electrodes
        assert (arrays == arrays[:1, :, :1]).all() and alive.any()
        lost.append(1 - alive.mean())
    assert np.mean(lost) == pytest.approx(0.4, abs=0.07)  # one of three always stays


def test_sessions_mix_at_the_rate_asked_for_and_unseen_ones_stay():
    augment = only(session_mixing=0.3)
    drawn = [augment.mixed(1, 4, generator) for generator in generators(2000)]
    assert np.mean([session != 1 for session in drawn]) == pytest.approx(0.3, abs=0.03)
    others = np.bincount(drawn, minlength=4)[[0, 2, 3]]
    assert others.min() > 0.8 * others.max()
    assert all(augment.mixed(-1, 4, generator) == -1 for generator in generators(20))
    assert all(augment.mixed(0, 1, generator) == 0 for generator in generators(20))


@settings(deadline=None, max_examples=30)
@given(bins=st.integers(1, 60), width=st.floats(0.2, 6.0))
def test_smoothing_is_that_of_scipy(bins, width):
    ndimage = pytest.importorskip("scipy.ndimage")
    signal = noise(bins, 3)
    expected = ndimage.gaussian_filter1d(
        signal.astype(np.float64), width, axis=0, mode="nearest", truncate=4.0
    )
    np.testing.assert_allclose(smooth(signal, width), expected, atol=2e-6)


def test_smoothing_sees_nothing_outside_the_recorded_bins():
    rows = torch.full((2, 40, 3), 1e6)
    stretches = noise(17, 3), noise(30, 3)
    first, count = torch.tensor([9, 4]), torch.tensor([17, 30])
    for row, start, stretch in zip(rows, first, stretches, strict=True):
        row[start : start + len(stretch)] = torch.from_numpy(stretch)
    found = smooth_rows(rows, first, count, 2.0)
    for row, start, stretch in zip(found, first, stretches, strict=True):
        np.testing.assert_array_equal(row[start : start + len(stretch)], smooth(stretch, 2.0))


def test_smoothing_in_milliseconds_is_in_bins_of_the_rate():
    assert Augment(smoothing_ms=40).at_rate(50.0).smoothing_bins == 2.0
    assert Augment(smoothing_ms=40).at_rate(1000.0).smoothing_bins == 40.0
    with pytest.raises(ValueError, match="give one of them"):
        Augment(smoothing_ms=40, smoothing_bins=2)


def test_the_figure_knows_how_to_switch_every_augmentation_off():
    values = AugmentOptions(**OFF).model_dump()
    modes = {"enabled", "time_mask_fraction", "frequency_mask_fraction", "smoothing_ms"}
    assert set(values) - set(OFF) - modes == {"array_size", "array_features"}
    signal = noise()
    np.testing.assert_array_equal(Augment(**OFF)(signal, 50.0, generators(1)[0]).signal, signal)
    on = variants(AugmentOptions(**{**OFF, "noise_std": 0.5, "session_mixing": 0.2}))
    assert list(on) == ["noise_std = 0.5", "all together"]


def test_inspect_draws_a_trial_before_and_after(tiny_trials, tmp_path, capsys):
    file = tmp_path / "after.png"
    command = ["inspect", str(tiny_trials), "--plot", str(file), "--augment"]
    assert main([*command, "noise_std=1.0", "time_stretch=[0.9,1.1]", "smoothing_ms=40"]) == 0
    assert file.stat().st_size > 20_000
    assert main([*command, "noize_std=1"]) == 2
    assert "--augment noize_std=1: expected KEY=VALUE" in capsys.readouterr().err


def test_a_phase_changes_augmentation_and_not_smoothing():
    config = load_config(
        "demo", ["data.augment.noise_std=0.2", "phases.1.augment={noise_std: 0.5, time_masks: 0}"]
    )
    assert config.augment_of(0) == config.data.augment
    assert (config.augment_of(1).noise_std, config.augment_of(1).time_masks) == (0.5, 0)
    with pytest.raises(UserError, match=r"phases\.1\.augment\.noize_std"):
        load_config("demo", ["phases.1.augment={noize_std: 0.5}"])
    with pytest.raises(UserError, match="the same in all phases"):
        load_config("demo", ["phases.1.augment={smoothing_ms: 5}"])
