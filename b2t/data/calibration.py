"""Statistics of a recording, to compare the simulation with real ones.

All statistics are of one stretch of crossings and spike-band power as a release holds them
(transformed and z-scored), so that a real trial and a simulated one are treated alike. Counts of
crossings are recovered from the levels of the z-scored values where these allow it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np

from b2t.data.articulation import BIN_SECONDS
from b2t.data.sentence_source import load_source
from b2t.data.simulate import Block, SimulationConfig, Simulator
from b2t.errors import UserError

LAGS = range(1, 11)
"""Lags, in bins, of the autocorrelation."""

_LEVEL_TOLERANCE = 0.05
_RECOVERABLE_SHARE = 0.5
_GROUPS_OF_T12_FIGURE = 4
_MOST_BINS = 3000


@dataclass(frozen=True)
class Recording:
    """A stretch of activity.

    Attributes:
        crossings: z-scored threshold crossings, [T, E].
        power: z-scored spike-band power of the same electrodes, [T, E].
    """

    crossings: np.ndarray
    power: np.ndarray

    def __post_init__(self) -> None:
        if self.crossings.shape != self.power.shape or self.crossings.ndim != 2:
            raise UserError(
                f"crossings {self.crossings.shape} and power {self.power.shape} differ in shape: "
                "expected [bins, electrodes] for both"
            )
        if not (np.isfinite(self.crossings).all() and np.isfinite(self.power).all()):
            raise UserError("the recording holds NaN or infinite values: cut them out first")


def autocorrelation(values: np.ndarray, lag: int) -> np.ndarray:
    """Autocorrelation of each channel of [T, C] at a lag in bins, [C]."""
    centred = values - values.mean(axis=0)
    return (centred[lag:] * centred[:-lag]).sum(axis=0) / (centred**2).sum(axis=0)


def participation_ratio(values: np.ndarray) -> float:
    """Effective number of dimensions (Σλ)² / Σλ² of the channel covariance of [T, C]."""
    covariance = np.atleast_2d(np.cov(values, rowvar=False))
    return float(np.trace(covariance) ** 2 / (covariance**2).sum())


def kurtosis(values: np.ndarray) -> np.ndarray:
    """Kurtosis of each channel of [T, C] (3 for a Gaussian), [C]."""
    centred = values - values.mean(axis=0)
    return (centred**4).mean(axis=0) / (centred**2).mean(axis=0) ** 2


def paired_correlation(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Correlation of channel i of one array [T, C] with channel i of the other, [C]."""
    left, right = left - left.mean(axis=0), right - right.mean(axis=0)
    product = (left * right).sum(axis=0)
    return product / np.sqrt((left**2).sum(axis=0) * (right**2).sum(axis=0))


def fano_factor(counts: np.ndarray) -> np.ndarray:
    """Variance over mean of the counts of each channel of [T, C], [C]."""
    return counts.var(axis=0) / counts.mean(axis=0)


def recover_counts(values: np.ndarray) -> np.ndarray | None:
    """Counts behind z-scored crossings [T, C], where the levels of each channel tell them.

    A channel with counts 0, 1, 2 … has equally spaced levels after z-scoring, or levels spaced as
    log(1 + n) where the logarithm was taken first. The lowest two levels of a channel are taken
    for 0 and 1; a channel whose other levels fit neither rule is left out.

    Returns:
        Counts [T, C'] of the channels that could be recovered, or None if fewer than half could.
    """
    channels = [_recover_channel(column) for column in values.astype(float).T]
    found = [channel for channel in channels if channel is not None]
    if len(found) < _RECOVERABLE_SHARE * len(channels):
        return None
    return np.column_stack(found)


def _recover_channel(column: np.ndarray) -> np.ndarray | None:
    levels = np.unique(np.round(column, 4))
    if not 3 <= len(levels) <= len(column) // 4:
        return None
    step = levels[1] - levels[0]
    rules: tuple[Callable, ...] = (
        lambda values: (values - levels[0]) / step,
        lambda values: np.expm1((values - levels[0]) / step * np.log(2)),
    )
    for rule in rules:
        counts = np.round(rule(levels))
        if np.abs(rule(levels) - counts).max() < _LEVEL_TOLERANCE:
            return np.round(rule(column))
    return None


def statistics(recording: Recording) -> dict[str, float]:
    """All statistics of a recording by name, with units; NaN where not recoverable.

    Channels are summarised by their median, and by their mean where the name says so.
    """
    crossings = recording.crossings[:, recording.crossings.std(axis=0) > 0]
    active = (recording.crossings.std(axis=0) > 0) & (recording.power.std(axis=0) > 0)
    power = recording.power[:, recording.power.std(axis=0) > 0]
    paired = paired_correlation(recording.crossings[:, active], recording.power[:, active])
    found: dict[str, float] = {}
    counts = recover_counts(crossings)
    for name, summary in (("", np.median), (", mean", np.mean)):
        rate, fano = np.nan, np.nan
        if counts is not None:
            rate = summary(counts.mean(axis=0)) / BIN_SECONDS
            fano = summary(fano_factor(counts))
        found[f"rate (Hz){name}"] = float(rate)
        found[f"Fano factor{name}"] = float(fano)
        found[f"kurtosis, crossings{name}"] = float(summary(kurtosis(crossings)))
        found[f"kurtosis, power{name}"] = float(summary(kurtosis(power)))
        found[f"correlation crossings–power{name}"] = float(summary(paired))
    found["participation ratio, crossings"] = participation_ratio(crossings)
    found["participation ratio, power"] = participation_ratio(power)
    both = np.concatenate([crossings, power], axis=1)
    found["participation ratio, both"] = participation_ratio(both)
    for lag in LAGS:
        for name, values in (("crossings", crossings), ("power", power)):
            key = f"autocorrelation lag {lag}, {name}"
            found[key] = float(np.median(autocorrelation(values, lag)))
    return found


def simulated_recording(config: SimulationConfig, bins: int) -> Recording:
    """One simulated stretch of ``bins`` bins: trials end to end out of one z-scored block."""
    block = _one_block(config)
    features = Simulator(config).record(block).features()
    start = len(features) // 2
    values = np.concatenate(features[start:] + features[:start])
    if len(values) < bins:
        raise UserError(
            f"a simulated block has {len(values)} bins, fewer than the {bins} asked for"
        )
    crossings, power = np.split(values[:bins], 2, axis=1)
    return Recording(crossings, power)


def _one_block(config: SimulationConfig) -> Block:
    rng = np.random.default_rng(config.seed)
    texts = load_source(config.vocabulary).draw_different(config.block_trials, rng)
    return Block(0, 1, "train", tuple(texts))


@dataclass(frozen=True)
class Comparison:
    """One statistic of a recording beside the simulation's.

    Attributes:
        name: of the statistic, with its unit.
        recorded: value of the recording.
        simulated: mean over simulations with different seeds.
        low: smallest value of the simulations.
        high: largest value of the simulations.
    """

    name: str
    recorded: float
    simulated: float
    low: float
    high: float

    @property
    def factor(self) -> float:
        """Ratio of simulated and recorded value, at least 1 where both have the same sign."""
        ratio = self.simulated / self.recorded
        return max(ratio, 1 / ratio) if ratio > 0 else float("nan")


def compare(recording: Recording, config: SimulationConfig, seeds: int = 4) -> list[Comparison]:
    """Compare a recording with simulations of as many electrodes and bins.

    Args:
        recording: what to compare with.
        config: what to simulate; its number of electrodes is replaced.
        seeds: simulations, with seeds counted from the configuration's.
    """
    bins, electrodes = recording.crossings.shape
    configs = [
        replace(config, electrodes=electrodes, seed=config.seed + offset) for offset in range(seeds)
    ]
    simulated = [statistics(simulated_recording(item, bins)) for item in configs]
    rows = []
    for name, value in statistics(recording).items():
        values = np.array([found[name] for found in simulated])
        rows.append(Comparison(name, value, values.mean(), values.min(), values.max()))
    return rows


def table(rows: list[Comparison]) -> str:
    """The comparison as text, a statistic in each line."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}}  recorded  simulated (lowest … highest)  factor"]
    for row in rows:
        span = f"({row.low:.3f} … {row.high:.3f})"
        lines.append(
            f"{row.name:{width}}  {row.recorded:8.3f}  {row.simulated:9.3f} {span:20}  "
            f"{row.factor:6.2f}"
        )
    return "\n".join(lines)


def load_recording(path: Path | str) -> Recording:
    """Read a recording to compare with.

    Args:
        path: an ``.hdf5`` file of the T15 release (its first trials, up to 3,000 bins), or an
            ``.npy`` array [features, bins] whose rows are four equal groups: crossings, power,
            crossings, power (the two arrays of T12).

    Raises:
        UserError: the file is missing or has another layout.
    """
    path = Path(path)
    if not path.is_file():
        found = "it is a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {found}; name a recording (.hdf5 of T15, or .npy)")
    if path.suffix == ".npy":
        return _load_array(path)
    if path.suffix in (".hdf5", ".h5"):
        return _load_trials(path)
    raise UserError(f"{path}: unknown kind of recording {path.suffix!r}, expected .hdf5 or .npy")


def _load_array(path: Path) -> Recording:
    values = np.load(path, allow_pickle=False)
    if values.ndim != 2 or values.shape[0] % (4 * _GROUPS_OF_T12_FIGURE):
        raise UserError(
            f"{path}: shape {values.shape}, expected [features, bins] with features in four equal "
            "groups (crossings, power, crossings, power), each a multiple of 4 electrodes"
        )
    first, first_power, second, second_power = np.split(values.T, _GROUPS_OF_T12_FIGURE, axis=1)
    return Recording(np.hstack([first, second]), np.hstack([first_power, second_power]))


def _load_trials(path: Path) -> Recording:
    trials: list[np.ndarray] = []
    with h5py.File(path) as file:
        for name in sorted(file):
            if sum(map(len, trials)) >= _MOST_BINS:
                break
            if "input_features" not in file[name]:
                raise UserError(f"{path}: {name} has no input_features, expected the T15 layout")
            trials.append(file[name]["input_features"][:])
    if not trials:
        raise UserError(f"{path}: no trials, expected groups trial_0000, trial_0001 …")
    values = np.concatenate(trials)[:_MOST_BINS]
    if values.shape[1] % 8:
        raise UserError(
            f"{path}: {values.shape[1]} features, expected crossings and power of a multiple of 4 "
            "electrodes"
        )
    crossings, power = np.split(values, 2, axis=1)
    return Recording(crossings, power)
