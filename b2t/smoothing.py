"""Gaussian smoothing along time: one code for training, evaluation, streams, a model's input."""

import numpy as np
import torch
from torch import Tensor

_TRUNCATE = 4.0
"""Standard deviations after which the Gaussian is cut off."""


def smooth(signal: np.ndarray, bins: float) -> np.ndarray:
    """Smooth ``signal`` [T, C] along time with a Gaussian of standard deviation ``bins``."""
    if not bins or not len(signal):
        return np.array(signal, dtype=np.float32)
    # torch warns of memory that is read-only, as that of bins from a pipe
    rows = torch.from_numpy(np.require(signal, np.float32, ("C", "W")))[None]
    first, count = torch.zeros(1, dtype=torch.int64), torch.tensor([len(signal)])
    return smooth_rows(rows, first, count, bins)[0].numpy()


def smooth_rows(signal: Tensor, first: Tensor, count: Tensor, bins: float) -> Tensor:
    """Smooth the recorded stretch of every row, beyond whose ends its last bins go on.

    A row comes out the same in whatever batch it lies.

    Args:
        signal: [B, T, C].
        first: [B] first recorded bin.
        count: [B] recorded bins, at least 1.
        bins: standard deviation of the Gaussian, above 0.
    """
    far = reach(bins)
    taps = torch.arange(-far, far + 1, dtype=torch.float64)
    gaussian = torch.exp(-taps.square() / (2 * bins**2))
    weights = (gaussian / gaussian.sum()).tolist()
    time = torch.arange(-far, signal.shape[1] + far, device=signal.device)
    last = (first + count - 1)[:, None]
    places = torch.minimum(torch.maximum(time[None], first[:, None]), last)
    wide = signal[torch.arange(len(signal), device=signal.device)[:, None], places]
    length = signal.shape[1]
    found = wide[:, :length] * weights[0]
    for tap, weight in enumerate(weights[1:], 1):
        found.add_(wide[:, tap : tap + length], alpha=weight)
    return found


def reach(bins: float) -> int:
    """Bins that `smooth` looks at on either side of a bin."""
    return int(_TRUNCATE * bins + 0.5)
