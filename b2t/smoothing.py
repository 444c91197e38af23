"""Gaussian smoothing along time, which training, evaluation and the model's own input share."""

import numpy as np
from scipy.ndimage import gaussian_filter1d

_TRUNCATE = 4.0
"""Standard deviations after which the Gaussian is cut off."""


def smooth(signal: np.ndarray, bins: float) -> np.ndarray:
    """Smooth ``signal`` [T, C] along time with a Gaussian of standard deviation ``bins``."""
    if not bins:
        return np.array(signal)
    smoothed = gaussian_filter1d(signal, bins, axis=0, mode="nearest", truncate=_TRUNCATE)
    return smoothed.astype(np.float32)


def reach(bins: float) -> int:
    """Bins that `smooth` looks at on either side of a bin."""
    return int(_TRUNCATE * bins + 0.5)
