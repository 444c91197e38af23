"""Gaussian smoothing along time, which training, evaluation and the model's own input share."""

import numpy as np
from scipy.ndimage import gaussian_filter1d


def smooth(signal: np.ndarray, bins: float) -> np.ndarray:
    """Smooth ``signal`` [T, C] along time with a Gaussian of standard deviation ``bins``."""
    if not bins:
        return np.array(signal)
    return gaussian_filter1d(signal, bins, axis=0, mode="nearest").astype(np.float32)
