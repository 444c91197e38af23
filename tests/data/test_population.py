from dataclasses import replace

import numpy as np
import pytest

from b2t.data.population import (
    PopulationConfig,
    best_tuned,
    crossings,
    draw_population,
    drift,
    log_rates,
    noise_sources,
    spike_power,
)

CONFIG = PopulationConfig()
QUIET = replace(CONFIG, noise=0.0, slow_noise=0.0, block_spread=0.0)


def population(config=CONFIG, electrodes=64, size=36, seed=0):
    return draw_population(config, electrodes, size, np.random.default_rng(seed))


def test_counts_are_poisson():
    rates = np.tile([0.05, 0.6, 3.0], (40_000, 1))
    counts = crossings(rates, np.random.default_rng(0))
    np.testing.assert_allclose(counts.mean(axis=0), rates[0], rtol=0.05)
    np.testing.assert_allclose(counts.var(axis=0) / counts.mean(axis=0), 1.0, atol=0.03)
    np.testing.assert_allclose((counts == 0).mean(axis=0), np.exp(-rates[0]), atol=0.01)


def test_modulated_counts_have_the_fano_factor_of_a_mixed_poisson():
    rng = np.random.default_rng(0)
    rates = rng.gamma(2.0, 0.5, (200_000, 1))
    counts = crossings(rates, rng)
    # Var = E[rate] + Var[rate] = 1 + 0.5 for a gamma rate of mean 1 and shape 2.
    assert counts.var() / counts.mean() == pytest.approx(1.5, rel=0.02)


def test_log_rate_is_linear_in_movement_up_to_saturation():
    config = replace(QUIET, saturation=1e6)
    drawn = population(config)
    rng = np.random.default_rng(1)
    movement = rng.normal(size=(50, 36))
    found, _ = log_rates(drawn, movement, config, rng)
    expected = np.empty((50, 64))
    for electrode in range(64):
        for time in range(50):
            seen = movement[min(time + drawn.lead[electrode], 49)]
            drive = seen @ drawn.direction[electrode]
            expected[time, electrode] = (
                drawn.baseline[electrode] + drawn.strength[electrode] * drive
            )
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_saturation_bounds_the_response():
    drawn = population(QUIET)
    found, _ = log_rates(drawn, np.full((3, 36), 1e3), QUIET, np.random.default_rng(0))
    assert (np.abs(found - drawn.baseline) <= CONFIG.saturation * drawn.strength + 1e-9).all()


def test_tuning_scales_strength_and_zero_tuning_ignores_movement():
    assert np.allclose(population(replace(CONFIG, tuning=2.0)).strength, 2 * population().strength)
    deaf = replace(QUIET, tuning=0.0)
    found, _ = log_rates(population(deaf), np.ones((9, 36)), deaf, np.random.default_rng(0))
    np.testing.assert_allclose(found.std(axis=0), 0, atol=1e-12)


def test_noise_sources_have_unit_variance_and_their_time_constants():
    sources = noise_sources(200_000, CONFIG, np.random.default_rng(0))
    np.testing.assert_allclose(sources.std(axis=0), 1.0, atol=0.1)
    lagged = (sources[10:] * sources[:-10]).mean(axis=0)
    expected = np.exp(-0.2 / np.geomspace(0.3, 1.0, CONFIG.noise_factors))
    np.testing.assert_allclose(lagged, expected, atol=0.1)


def test_slow_changes_have_their_size_and_time_constant():
    config = replace(CONFIG, tuning=0.0, noise=0.0, block_spread=0.0, slow_noise=0.1)
    drawn = population(config, electrodes=40)
    found, _ = log_rates(drawn, np.zeros((60_000, 36)), config, np.random.default_rng(0))
    seconds = (found - drawn.baseline)[::50]
    assert seconds.std() == pytest.approx(0.1, rel=0.05)
    later = (seconds[20:] * seconds[:-20]).mean() / (seconds**2).mean()
    assert later == pytest.approx(np.exp(-20 / config.slow_seconds), abs=0.05)


def test_block_offsets_move_the_baseline():
    config = replace(CONFIG, tuning=0.0, noise=0.0, slow_noise=0.0, block_spread=0.2)
    drawn = population(config, electrodes=2000)
    found, _ = log_rates(drawn, np.zeros((2, 36)), config, np.random.default_rng(0))
    assert (found - drawn.baseline)[0].std() == pytest.approx(0.2, rel=0.1)


def test_power_is_floor_plus_energy_of_crossings():
    config = replace(CONFIG, power_noise=0.0)
    drawn = population(config, electrodes=4)
    counts = np.random.default_rng(0).poisson(0.7, (100_000, 4))
    power = spike_power(counts, np.zeros((100_000, 6)), drawn, config, np.random.default_rng(1))
    np.testing.assert_allclose(power.mean(axis=0), 1 + 0.7 * drawn.energy, rtol=0.02)
    own = [np.cov(power[:, i], counts[:, i])[0, 1] for i in range(4)]
    ahead = [np.cov(power[:-1, i], counts[1:, i])[0, 1] for i in range(4)]
    behind = [np.cov(power[1:, i], counts[:-1, i])[0, 1] for i in range(4)]
    np.testing.assert_allclose(own, 0.7 * drawn.energy * (1 - config.energy_lead), rtol=0.1)
    np.testing.assert_allclose(ahead, 0.7 * drawn.energy * config.energy_lead, rtol=0.1)
    np.testing.assert_allclose(behind, 0, atol=0.02)


def test_best_tuned_keeps_the_most_informative_of_each_array():
    drawn = population(electrodes=64)
    kept = best_tuned(drawn, 16)
    information = drawn.information().reshape(4, 16)
    expected = np.sort(information, axis=1)[:, -4:]
    np.testing.assert_array_equal(np.sort(kept.information().reshape(4, 4), axis=1), expected)
    np.testing.assert_array_equal(best_tuned(drawn, 64).baseline, drawn.baseline)


def test_drift_rotates_slowly_and_keeps_unit_directions():
    drawn = population(electrodes=256)
    still = replace(CONFIG, drift_per_day=0.0, gain_spread=0.0, session_spread=0.0)
    same = drift(drawn, 30, still, np.random.default_rng(0))
    np.testing.assert_allclose(same.direction, drawn.direction, atol=1e-12)
    np.testing.assert_allclose(same.strength, drawn.strength)
    for days in (5, 50, 150):
        later = drift(drawn, days, CONFIG, np.random.default_rng(0))
        np.testing.assert_allclose(np.linalg.norm(later.direction, axis=1), 1)
        cosine = (later.direction * drawn.direction).sum(axis=1)
        assert cosine.mean() == pytest.approx(np.exp(-days * CONFIG.drift_per_day), abs=0.04)
