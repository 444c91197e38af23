"""The recordings of the study, split once and for all."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from b2t.data.simulate import SimulationConfig, Simulator, plan_blocks


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


def split(segments: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit, validation and held part: three, one and one fifth of ``order``'s units."""
    fifth = len(order) // 5
    parts = order[2 * fifth :], order[fifth : 2 * fifth], order[:fifth]
    return tuple(segments[np.sort(part)] for part in parts)  # type: ignore[return-value]


def standardize(parts: tuple[np.ndarray, ...]) -> list[Tensor]:
    """Segments [S, T, C] without their own mean, over the first part's deviation, clipped at 8."""
    parts = tuple(part - part.mean(1, keepdims=True) for part in parts)
    scale = parts[0].std((0, 1))
    return [torch.from_numpy(np.clip(p / scale, -8, 8).astype(np.float32)) for p in parts]


def join(subjects: list[list[Tensor]], patch: int) -> Recording:
    """One recording of several subjects' parts."""
    return Recording(*(torch.cat(parts) for parts in zip(*subjects, strict=True)), patch=patch)


def feis(folder: Path) -> Recording:
    """FEIS: one-second epochs of 14 channels at 256 Hz, split by epoch."""
    import pandas as pd

    subjects = []
    for path in sorted((folder / "feis").glob("*.zip")):
        table = pd.read_csv(path)
        epochs = table.groupby("Epoch", sort=True)
        channels = list(table.columns[2:16])
        segments = np.stack([epoch[channels].to_numpy(np.float64) for _, epoch in epochs])
        order = np.random.default_rng(0).permutation(len(segments))
        subjects.append(standardize(split(segments, order)))
    return join(subjects, patch=8)


def p300_mat(folder: Path) -> Recording:
    """P300 speller: 8 channels at 250 Hz, one-second segments, split by blocks of ten seconds."""
    from scipy.io import loadmat

    subjects = []
    for path in sorted((folder / "p300_mat").glob("*.mat")):
        signal = loadmat(path)["y"].astype(np.float64)
        blocks = signal[: len(signal) // 2500 * 2500].reshape(-1, 10, 250, signal.shape[1])
        order = np.random.default_rng(0).permutation(len(blocks))
        parts = split(blocks, order)
        subjects.append(standardize(tuple(part.reshape(-1, 250, part.shape[3]) for part in parts)))
    return join(subjects, patch=16)


def simulated(_: Path) -> Recording:
    """`b2t simulate` in memory: 16 electrodes (32 features of 20 ms bins), split by trial."""
    config = SimulationConfig(sessions=1, trials=(240, 80, 80), electrodes=16, select_from=256)
    simulator, parts = Simulator(config), {"train": [], "val": [], "test": []}
    for block in plan_blocks(config):
        for trial in simulator.record(block).features():
            whole = trial[: len(trial) // 96 * 96].reshape(-1, 96, trial.shape[1])
            parts[block.split].append(whole.astype(np.float64))
    return join([standardize(tuple(np.concatenate(p) for p in parts.values()))], patch=4)


DATA: dict[str, Callable[[Path], Recording]] = {
    "feis": feis,
    "p300_mat": p300_mat,
    "simulated": simulated,
}
