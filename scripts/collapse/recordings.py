"""The recordings of the study, split once and for all."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from b2t.data.simulate import SimulationConfig, Simulator, plan_blocks

Subjects = list[list[np.ndarray]]
"""Of each subject its units, what is never torn apart: some segments [S, T, C] float64 each."""


@dataclass
class Recording:
    """Segments of a recording, split once and for all, in units of the training part's deviation.

    Args:
        fit: [S, T, C] float32, to train on in a search.
        validation: [S, T, C], to choose settings on.
        held: [S, T, C], measured in final runs only.
        patch: bins per patch.
    """

    fit: Tensor
    validation: Tensor
    held: Tensor
    patch: int

    @property
    def train(self) -> Tensor:
        """All segments that are not held out."""
        return torch.cat([self.fit, self.validation])


def split(units: list[np.ndarray], order: np.ndarray) -> tuple[np.ndarray, ...]:
    """Segments of fit, validation and held part: three, one and one fifth of ``order``'s units."""
    fifth = len(order) // 5
    parts = order[2 * fifth :], order[fifth : 2 * fifth], order[:fifth]
    return tuple(np.concatenate([units[unit] for unit in np.sort(part)]) for part in parts)


def standardize(parts: tuple[np.ndarray, ...]) -> list[Tensor]:
    """Segments [S, T, C] without their own mean, over the first part's deviation, clipped at 8."""
    parts = tuple(part - part.mean(1, keepdims=True) for part in parts)
    scale = parts[0].std((0, 1))
    return [torch.from_numpy(np.clip(p / scale, -8, 8).astype(np.float32)) for p in parts]


def join(subjects: list[list[Tensor]], patch: int) -> Recording:
    """One recording of several subjects' parts."""
    return Recording(*(torch.cat(parts) for parts in zip(*subjects, strict=True)), patch=patch)


def _parts(units: list[np.ndarray]) -> list[Tensor]:
    return standardize(split(units, np.random.default_rng(0).permutation(len(units))))


def by_units(subjects: Subjects, patch: int) -> Recording:
    """Hold out a fifth of every subject's units."""
    return join([_parts(units) for units in subjects], patch)


def by_subjects(subjects: Subjects, patch: int) -> Recording:
    """Hold out the last subject whole, over its own deviation, and validate on the one before.

    Of two subjects the first is validated on a fifth of its units (another fifth stays out, so
    that nobody is trained on more than by units); one alone is split by units.
    """
    if len(subjects) == 1:
        return by_units(subjects, patch)
    whole = [standardize((np.concatenate(units),))[0] for units in subjects]
    if len(subjects) == 2:
        fit, validation, _ = _parts(subjects[0])
        return Recording(fit, validation, whole[1], patch)
    return Recording(torch.cat(whole[:-2]), whole[-2], whole[-1], patch)


def feis(folder: Path) -> Subjects:
    """FEIS: four subjects, one-second epochs of 14 channels at 256 Hz."""
    import pandas as pd

    subjects = []
    for path in sorted((folder / "feis").glob("*.zip")):
        table = pd.read_csv(path)
        epochs = table.groupby("Epoch", sort=True)
        channels = list(table.columns[2:16])
        subjects.append([epoch[channels].to_numpy(np.float64)[None] for _, epoch in epochs])
    return subjects


def p300_mat(folder: Path) -> Subjects:
    """P300 speller: two subjects, 8 channels at 250 Hz, blocks of ten one-second segments."""
    from scipy.io import loadmat

    signals = (loadmat(path)["y"] for path in sorted((folder / "p300_mat").glob("*.mat")))
    return [_blocks(signal.astype(np.float64), 10, 250) for signal in signals]


def p300_fif(folder: Path) -> Subjects:
    """P300 speller: three sessions, 14 channels at 256 Hz, blocks of four one-second segments.

    In the order of their names: training on the second and third, held out is the first, which was
    made with sounds in place of flashes.
    """
    import mne

    signals = []
    for path in sorted((folder / "p300_fif").glob("*.fif")):
        raw = mne.io.read_raw_fif(path, preload=True, verbose="error").pick("eeg")
        signals.append(_blocks(raw.filter(0.5, None, verbose="error").get_data().T, 4, 256))
    return [*signals[1:], signals[0]]


def wordpair(folder: Path) -> Subjects:
    """Words heard in pairs: one subject, 200 epochs of 32 channels at 50 Hz (1.2 s)."""
    import mne

    path = folder / "wordpair" / "subject04-epo.fif"
    epochs = mne.read_epochs(path, verbose="error").get_data(verbose="error")
    return [list(epochs.transpose(0, 2, 1)[:, None])]


def simulated(_: Path, seed: int = 0) -> Subjects:
    """`b2t simulate` in memory: 16 electrodes (32 features of 20 ms bins), units are trials."""
    config = SimulationConfig(
        sessions=1, trials=(240, 80, 80), electrodes=16, select_from=256, seed=seed
    )
    simulator = Simulator(config)
    trials = (t for block in plan_blocks(config) for t in simulator.record(block).features())
    return [[unit for trial in trials for unit in _blocks(trial.astype(np.float64), None, 96)]]


def _blocks(signal: np.ndarray, segments: int | None, bins: int) -> list[np.ndarray]:
    """A signal [T, C] as units of so many segments, None for all; its end is dropped."""
    segments = segments or len(signal) // bins
    whole = max(1, segments * bins)
    count = len(signal) // whole
    blocks = signal[: count * whole].reshape(count, segments, -1, signal.shape[1])
    return list(blocks) if segments else []


SOURCES: dict[str, tuple[Callable[[Path], Subjects], int]] = {
    "feis": (feis, 8),
    "p300_mat": (p300_mat, 16),
    "p300_fif": (p300_fif, 8),
    "wordpair": (wordpair, 4),
    "simulated": (simulated, 4),
    "simulated-7": (partial(simulated, seed=7), 4),
}
"""Who reads a recording, and its bins per patch."""


def load(name: str, folder: Path, hold_subjects: bool) -> Recording:
    """Read a recording and split it.

    Args:
        name: one of `SOURCES`.
        folder: with a folder for each recording.
        hold_subjects: hold out whole subjects where there are several, else units of each.
    """
    read, patch = SOURCES[name]
    return (by_subjects if hold_subjects else by_units)(read(folder), patch)
