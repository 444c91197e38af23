"""A linear–nonlinear Poisson population driven by articulator movements.

Threshold crossings of electrode *i* in a bin are Poisson with rate
``exp(b_i + g_i · w_i · x(t + lead_i) + noise_i(t))``: log-baseline b, tuning strength g, unit
tuning direction w over movement positions and velocities x, and noise shared by many electrodes.
Spike-band power is a noise floor plus the energy of the crossings.
"""

from dataclasses import asdict, dataclass, replace

import numpy as np
from scipy.signal import lfilter

from b2t.data.articulation import BIN_SECONDS
from b2t.errors import UserError

ARRAYS = ("ventral 6v", "area 4", "55b", "dorsal 6v")
"""Arrays of the T15 participant in channel order; the electrodes are divided equally."""

_MAX_LEAD = 5
_HIGHEST_RATE = 1e6


@dataclass(frozen=True)
class PopulationConfig:
    """Statistics of the population; the defaults are calibrated on one real trial of T12.

    Attributes:
        rate_hz: median baseline rate of crossings in Hz.
        rate_spread: standard deviation of the log-baseline over electrodes.
        tuning: multiplies the strength of tuning of every electrode.
        tuning_mean: mean over electrodes of the standard deviation that speech gives the log-rate.
        tuning_shape: gamma shape of that strength; small = many weakly tuned electrodes.
        array_tuning: relative strength on the four arrays.
        velocity: share of movement velocities in the tuning directions.
        saturation: drive, in standard deviations, at which an electrode's response levels off.
        noise: multiplies all shared noise.
        noise_factors: number of latent noise sources.
        noise_seconds: shortest and longest time constant of the sources.
        rate_noise: standard deviation that they give the log-rate.
        power_noise: standard deviation that they give log-power.
        slow_noise: standard deviation of independent slow changes of each log-rate within a block.
        slow_seconds: their time constant.
        power_shape: gamma shape of the noise floor of power in a bin (mean 1).
        spike_energy: mean energy of one crossing, in units of the noise floor.
        energy_spread: standard deviation of the log of that energy over electrodes.
        spike_shape: gamma shape of the energy of one crossing.
        energy_lead: share of crossings whose energy falls into the bin before.
        block_spread: standard deviation of each log-baseline over the blocks of a session.
        session_spread: standard deviation of its change from session to session.
        drift_per_day: rate at which tuning directions lose their old orientation, per day.
        gain_spread: standard deviation of the log-gain of tuning over sessions.
    """

    rate_hz: float = 27.0
    rate_spread: float = 0.4
    tuning: float = 1.0
    tuning_mean: float = 0.4
    tuning_shape: float = 3.0
    array_tuning: tuple[float, float, float, float] = (1.2, 1.1, 0.7, 1.0)
    velocity: float = 0.3
    saturation: float = 2.5
    noise: float = 1.0
    noise_factors: int = 6
    noise_seconds: tuple[float, float] = (0.3, 1.0)
    rate_noise: float = 0.13
    power_noise: float = 0.135
    slow_noise: float = 0.08
    slow_seconds: float = 20.0
    power_shape: float = 16.0
    spike_energy: float = 0.55
    energy_spread: float = 0.3
    spike_shape: float = 2.0
    energy_lead: float = 0.38
    block_spread: float = 0.15
    session_spread: float = 0.15
    drift_per_day: float = 1 / 150
    gain_spread: float = 0.1

    def asdict(self) -> dict:
        """All values as plain types, for a file."""
        return asdict(self)


@dataclass(frozen=True)
class Population:
    """Electrodes of one session.

    Attributes:
        baseline: log of the expected crossings per bin, [E].
        strength: standard deviation that speech gives the log-rate, [E].
        direction: tuning over standardised movements, unit length, [E, X].
        lead: bins by which activity leads movement, [E].
        rate_loading: log-rate per unit of each noise source, [E, K].
        power_loading: log-power per unit of each noise source, [E, K].
        energy: mean energy of one crossing, [E].
    """

    baseline: np.ndarray
    strength: np.ndarray
    direction: np.ndarray
    lead: np.ndarray
    rate_loading: np.ndarray
    power_loading: np.ndarray
    energy: np.ndarray

    @property
    def electrodes(self) -> int:
        """Number of electrodes."""
        return len(self.baseline)

    def information(self) -> np.ndarray:
        """Signal variance over Poisson variance of each electrode, [E]: what speech it carries."""
        return np.exp(self.baseline) * self.strength**2

    def take(self, electrodes: np.ndarray) -> "Population":
        """The population of some electrodes only."""
        arrays = {name: value[electrodes] for name, value in vars(self).items()}
        return Population(**arrays)


def draw_population(
    config: PopulationConfig, electrodes: int, regressors: int, rng: np.random.Generator
) -> Population:
    """Draw the population of the first session."""
    baseline = np.log(config.rate_hz * BIN_SECONDS) + rng.normal(0, config.rate_spread, electrodes)
    shape = config.tuning_shape
    by_array = np.array(config.array_tuning) / np.mean(config.array_tuning)
    per_array = np.repeat(by_array, -(-electrodes // len(by_array)))[:electrodes]
    strength = config.tuning * per_array * rng.gamma(shape, config.tuning_mean / shape, electrodes)
    half = regressors // 2
    scale = np.r_[np.ones(half), np.full(regressors - half, config.velocity)]
    factors = config.noise_factors
    return Population(
        baseline=baseline,
        strength=strength,
        direction=_unit(scale * rng.normal(size=(electrodes, regressors))),
        lead=rng.integers(0, _MAX_LEAD + 1, electrodes),
        rate_loading=_loading(config.noise * config.rate_noise, electrodes, factors, rng),
        power_loading=_loading(config.noise * config.power_noise, electrodes, factors, rng),
        energy=config.spike_energy * np.exp(rng.normal(0, config.energy_spread, electrodes)),
    )


def best_tuned(population: Population, electrodes: int) -> Population:
    """Keep the electrodes that carry most of speech, equally many of each array, in order."""
    groups = np.array_split(np.arange(population.electrodes), len(ARRAYS))
    share = electrodes // len(ARRAYS)
    information = population.information()
    kept = [np.sort(group[np.argsort(-information[group])[:share]]) for group in groups]
    return population.take(np.concatenate(kept))


def drift(
    population: Population, days: float, config: PopulationConfig, rng: np.random.Generator
) -> Population:
    """The same electrodes some days later: directions rotated, gains and baselines changed."""
    kept = np.exp(-days * config.drift_per_day)
    scale = np.linalg.norm(population.direction, axis=0, keepdims=True)
    fresh = _unit(scale * rng.normal(size=population.direction.shape))
    size = population.electrodes
    return replace(
        population,
        direction=_unit(kept * population.direction + np.sqrt(1 - kept**2) * fresh),
        strength=population.strength * np.exp(rng.normal(0, config.gain_spread, size)),
        baseline=population.baseline + rng.normal(0, config.session_spread, size),
    )


def regressors(positions: np.ndarray) -> np.ndarray:
    """Positions [T, A] and their velocities (difference over two bins), [T, 2 A]."""
    return np.column_stack([positions, np.gradient(positions, axis=0)])


def log_rates(
    population: Population, movement: np.ndarray, config: PopulationConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Log of the expected crossings per bin, and the noise sources.

    Args:
        population: the electrodes.
        movement: standardised regressors of a block, [T, X].
        config: statistics of noise.
        rng: source of randomness.

    Returns:
        Log-rates [T, E], and noise sources [T, K] of unit variance.
    """
    bins = len(movement)
    drive = np.empty((bins, population.electrodes))
    for lead in range(_MAX_LEAD + 1):
        chosen = population.lead == lead
        ahead = movement[np.minimum(np.arange(bins) + lead, bins - 1)]
        drive[:, chosen] = ahead @ population.direction[chosen].T
    sources = noise_sources(bins, config, rng)
    baseline = population.baseline + rng.normal(0, config.block_spread, population.electrodes)
    slow = _slow_changes(bins, population.electrodes, config, rng)
    shared = sources @ population.rate_loading.T
    speech = config.saturation * np.tanh(drive / config.saturation)
    return baseline + population.strength * speech + shared + slow, sources


def noise_sources(bins: int, config: PopulationConfig, rng: np.random.Generator) -> np.ndarray:
    """Stationary first-order autoregressive sources of unit variance, [T, K]."""
    seconds = np.geomspace(*config.noise_seconds, config.noise_factors)
    columns = []
    for kept in np.exp(-BIN_SECONDS / seconds):
        white = rng.normal(size=bins)
        white[1:] *= np.sqrt(1 - kept**2)
        columns.append(lfilter([1.0], [1.0, -kept], white))
    return np.column_stack(columns)


def crossings(rates: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Poisson counts of expected ``rates`` [T, E] per bin.

    Raises:
        UserError: rates that overflow.
    """
    if not rates.max(initial=0.0) < _HIGHEST_RATE:
        raise UserError(
            f"simulated activity reaches {rates.max():g} crossings in a bin, where at most "
            f"{_HIGHEST_RATE:g} make sense: lower --tuning, --noise, --drift or --variability"
        )
    return rng.poisson(rates)


def spike_power(
    counts: np.ndarray,
    sources: np.ndarray,
    population: Population,
    config: PopulationConfig,
    rng: np.random.Generator,
) -> np.ndarray:
    """Spike-band power in units of the noise floor, [T, E].

    The energy of ``n`` crossings is gamma distributed with shape ``n · spike_shape``. Some
    crossings count for the power of the bin before, as if the two were binned with an offset: in
    the real trial power correlates with the crossings of its own bin and of the next.
    """
    floor = rng.standard_gamma(config.power_shape, counts.shape) / config.power_shape
    early = rng.binomial(counts, config.energy_lead)
    moved = counts - early
    moved[:-1] += early[1:]
    spikes = np.zeros(counts.shape)
    fired = moved > 0
    spikes[fired] = rng.standard_gamma(config.spike_shape * moved[fired]) / config.spike_shape
    spikes *= population.energy
    return (floor + spikes) * np.exp(sources @ population.power_loading.T)


def _slow_changes(
    bins: int, electrodes: int, config: PopulationConfig, rng: np.random.Generator
) -> np.ndarray:
    """Independent slow autoregressive changes, drawn once a second and joined by lines, [T, E]."""
    knots = int(np.ceil(bins * BIN_SECONDS)) + 1
    kept = np.exp(-1.0 / config.slow_seconds)
    white = rng.normal(0, config.slow_noise, (knots, electrodes))
    white[1:] *= np.sqrt(1 - kept**2)
    values = lfilter([1.0], [1.0, -kept], white, axis=0)
    seconds = np.arange(bins) * BIN_SECONDS
    left = np.minimum(seconds.astype(int), knots - 2)
    share = (seconds - left)[:, None]
    return (1 - share) * values[left] + share * values[left + 1]


def _loading(size: float, electrodes: int, factors: int, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(0, size / np.sqrt(factors), (electrodes, factors))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
