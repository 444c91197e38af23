import math

import h5py
import numpy as np
import pytest

from b2t.data.calibration import (
    Comparison,
    Recording,
    autocorrelation,
    compare,
    fano_factor,
    kurtosis,
    load_recording,
    paired_correlation,
    participation_ratio,
    recover_counts,
    simulated_recording,
    statistics,
    table,
)
from b2t.data.simulate import SimulationConfig, Simulator, plan_blocks, simulate, zscore
from b2t.errors import UserError

FACTOR = 1.5
"""Largest allowed ratio of a statistic of the simulation and of the real trial."""


def test_autocorrelation_of_an_autoregressive_process():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(50_000, 1))
    for index in range(1, len(values)):
        values[index] += 0.8 * values[index - 1]
    for lag in (1, 3, 10):
        assert autocorrelation(values, lag)[0] == pytest.approx(0.8**lag, abs=0.03)


def test_participation_ratio_counts_dimensions():
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(20_000, 6))
    assert participation_ratio(flat) == pytest.approx(6, rel=0.01)
    line = rng.normal(size=(1000, 1)) @ rng.normal(size=(1, 6))
    assert participation_ratio(line) == pytest.approx(1)
    eigenvalues = np.array([4.0, 1.0, 1.0])
    values = rng.normal(size=(200_000, 3)) * np.sqrt(eigenvalues)
    assert participation_ratio(values) == pytest.approx(36 / 18, rel=0.02)


def test_kurtosis_fano_and_correlation_closed_forms():
    rng = np.random.default_rng(0)
    assert kurtosis(np.array([[1.0], [-1.0]] * 9))[0] == pytest.approx(1)
    assert kurtosis(rng.normal(size=(300_000, 1)))[0] == pytest.approx(3, abs=0.1)
    assert fano_factor(np.array([[1.0], [3.0]]))[0] == pytest.approx(0.5)
    left = rng.normal(size=(100, 3))
    expected = [np.corrcoef(left[:, i], left[:, i] ** 3)[0, 1] for i in range(3)]
    np.testing.assert_allclose(paired_correlation(left, left**3), expected)


@pytest.mark.parametrize("transform", [np.log1p, lambda counts: counts.astype(float)])
def test_counts_are_recovered_from_their_levels(transform):
    counts = np.random.default_rng(0).poisson([0.2, 0.6, 1.7], (600, 3))
    found = recover_counts(zscore(transform(counts)).astype(np.float32))
    np.testing.assert_array_equal(found, counts)


def test_counts_of_smoothed_activity_are_not_guessed():
    values = np.random.default_rng(0).normal(size=(500, 8))
    assert recover_counts(values) is None
    found = statistics(Recording(values, values))
    assert math.isnan(found["rate (Hz)"]) and math.isnan(found["Fano factor"])
    assert found["correlation crossings–power"] == pytest.approx(1)


def test_recovered_counts_are_the_simulated_ones():
    config = SimulationConfig(sessions=1, trials=(5, 1, 1), electrodes=16)
    block = Simulator(config).record(plan_blocks(config)[0])
    features = np.concatenate(block.features())
    np.testing.assert_array_equal(recover_counts(features[:, :16]), block.counts)


def test_silent_channels_are_left_out():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(300, 5))
    silent = values.copy()
    silent[:, 2] = 0
    found = statistics(Recording(silent, values))
    assert all(
        np.isfinite(value)
        for name, value in found.items()
        if "Hz" not in name and "Fano" not in name
    )
    kept = [0, 1, 3, 4]
    assert found["participation ratio, crossings"] == pytest.approx(
        participation_ratio(values[:, kept])
    )


def test_simulation_is_calibrated_on_the_real_trial(real_data):
    recording = load_recording(real_data / "t12_trial" / "figure1_neural_data.npy")
    assert recording.crossings.shape == (591, 128)
    rows = compare(recording, SimulationConfig(), seeds=4)
    assert len(rows) == 13 + 20
    for row in rows:
        assert row.factor <= FACTOR, table([row])


def test_calibration_notices_a_wrong_simulation(real_data):
    from dataclasses import replace

    recording = load_recording(real_data / "t12_trial" / "figure1_neural_data.npy")
    plain = SimulationConfig()
    wrong = {
        "tuning": (0.0, "autocorrelation lag 3, crossings"),
        "rate_hz": (60.0, "rate (Hz)"),
        "noise": (4.0, "participation ratio, power"),
        "spike_energy": (0.05, "correlation crossings–power"),
    }
    for name, (value, statistic) in wrong.items():
        changed = replace(plain, population=replace(plain.population, **{name: value}))
        rows = {row.name: row for row in compare(recording, changed, seeds=1)}
        assert not rows[statistic].factor <= FACTOR, name


def test_simulated_recording_has_the_asked_shape():
    config = SimulationConfig(electrodes=8, block_trials=6)
    recording = simulated_recording(config, 300)
    assert recording.crossings.shape == recording.power.shape == (300, 8)
    with pytest.raises(UserError, match="fewer than"):
        simulated_recording(config, 10_000)


def test_factor_is_symmetric_and_undefined_across_signs():
    assert Comparison("x", 2.0, 1.0, 1.0, 1.0).factor == 2
    assert Comparison("x", 1.0, 2.0, 2.0, 2.0).factor == 2
    assert math.isnan(Comparison("x", 1.0, -1.0, 0.0, 0.0).factor)


def test_trials_of_the_release_are_read(tmp_path):
    folder = simulate(SimulationConfig(sessions=1, trials=(4, 1, 1), electrodes=8), tmp_path)
    path = folder / "t15.2023.08.11" / "data_train.hdf5"
    recording = load_recording(path)
    with h5py.File(path) as file:
        first = file["trial_0000"]["input_features"][:]
    np.testing.assert_array_equal(recording.crossings[: len(first)], first[:, :8])
    np.testing.assert_array_equal(recording.power[: len(first)], first[:, 8:])


def test_bad_recordings(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_recording(tmp_path / "absent.npy")
    with pytest.raises(UserError, match="it is a folder"):
        load_recording(tmp_path)
    (tmp_path / "x.mat").write_text("")
    with pytest.raises(UserError, match="unknown kind"):
        load_recording(tmp_path / "x.mat")
    np.save(tmp_path / "odd.npy", np.zeros((10, 50)))
    with pytest.raises(UserError, match="four equal groups"):
        load_recording(tmp_path / "odd.npy")
    np.save(tmp_path / "nan.npy", np.full((16, 50), np.nan))
    with pytest.raises(UserError, match="NaN"):
        load_recording(tmp_path / "nan.npy")
    with h5py.File(tmp_path / "empty.hdf5", "w"):
        pass
    with pytest.raises(UserError, match="no trials"):
        load_recording(tmp_path / "empty.hdf5")
