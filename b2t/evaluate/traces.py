"""A few original and reconstructed signals, to look at."""

from typing import Any

import numpy as np
from scipy import signal as scipy_signal
from torch import Tensor

TRIALS, CHANNELS, BINS, SEGMENT = 2, 3, 400, 64


def collect_traces(
    rows: list[str], reconstruction: Tensor, target: Tensor, mask: Tensor, sampling_rate: float
) -> dict[str, Any]:
    """Return traces of the first trials and the power spectra of all, as JSON values.

    Args:
        rows: B row ids.
        reconstruction: [B, T, C].
        target: [B, T, C].
        mask: [B, T] bool, True = real.
        sampling_rate: in Hz.

    Returns:
        `trials`: for each of at most 2 trials its `row`, the 3 `channels` of greatest variance,
        and their `target` and `reconstruction` [channels][bins]; `spectrum`: `hz`, `target`,
        `reconstruction`, Welch's estimate averaged over trials and channels, in dB per Hz.
    """
    keep = mask.cpu().numpy()
    output = reconstruction.detach().double().cpu().numpy()
    truth = target.detach().double().cpu().numpy()
    trials = [
        trial_traces(row, output[i, keep[i]], truth[i, keep[i]])
        for i, row in enumerate(rows[:TRIALS])
    ]
    long = [i for i in range(len(rows)) if keep[i].sum() >= SEGMENT]
    found: dict[str, Any] = {"sampling_rate": sampling_rate, "trials": trials}
    if long:
        pairs = [(output[i, keep[i]], truth[i, keep[i]]) for i in long]
        spectra = [[_spectrum(x, sampling_rate) for x in pair] for pair in pairs]
        hz = np.fft.rfftfreq(SEGMENT, 1 / sampling_rate)[1:]
        mean = np.mean(spectra, axis=0)
        decibels = 10 * np.log10(np.maximum(mean, 1e-20))
        found["spectrum"] = {
            "hz": hz.round(4).tolist(),
            "reconstruction": decibels[0].round(3).tolist(),
            "target": decibels[1].round(3).tolist(),
        }
    return found


def trial_traces(row: str, output: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Return the traces of one trial (output and truth [T, C]) as `collect_traces` does."""
    chosen = np.sort(np.argsort(-truth.var(0), kind="stable")[:CHANNELS])
    return {
        "row": row,
        "channels": chosen.tolist(),
        "target": truth[:BINS, chosen].T.round(4).tolist(),
        "reconstruction": output[:BINS, chosen].T.round(4).tolist(),
    }


def _spectrum(x: np.ndarray, sampling_rate: float) -> np.ndarray:
    """Power by frequency [SEGMENT / 2], mean over channels, without the constant."""
    _, power = scipy_signal.welch(x, fs=sampling_rate, nperseg=SEGMENT, axis=0)
    return power.mean(1)[1:]
