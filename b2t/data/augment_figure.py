"""A trial before and after augmentation: each alone, and all of them."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from b2t.data.augment import Augment, row_generator
from b2t.data.options import AugmentOptions
from b2t.data.ramps import Ramp, values_at

OFF: dict[str, Any] = {
    "time_shift_ms": 0.0,
    "channel_dropout": 0.0,
    "noise_std": 0.0,
    "scale": (1.0, 1.0),
    "time_masks": 0,
    "frequency_masks": 0,
    "random_walk_std": 0.0,
    "random_cut_ms": 0.0,
    "time_stretch": (1.0, 1.0),
    "array_dropout": 0.0,
    "session_mixing": 0.0,
    "offset_std": 0.0,
    "smoothing_bins": 0.0,
}
"""Values with which an augmentation, or the smoothing, does nothing."""
_UNSEEN = ("session_mixing",)
"""What does not show in the signal."""
_PHASE = 1_000_000
"""Steps of a phase that stands for any."""


def variants(
    options: AugmentOptions, ramps: Mapping[str, Ramp] = MappingProxyType({})
) -> dict[str, Augment]:
    """Return the augmentations that are on, each alone and all together, by name.

    Args:
        options: at the end of the ramps.
        ramps: by key: each is shown at its beginning, its middle and its end.
    """
    given = options.model_dump()
    alone = {
        f"{name} = {_shown(value)}{when}": Augment(**{**given, **OFF, name: value})
        for name, nothing in OFF.items()
        if name not in _UNSEEN
        for when, value in _values(name, given[name], ramps.get(name))
        if value != nothing or when
    }
    return {**alone, "all together": Augment(**given)}


def _values(name: str, value: Any, ramp: Ramp | None) -> list[tuple[str, Any]]:
    if ramp is None:
        return [("", value)]
    long = ramp.length(_PHASE)
    given = {name: ramp.model_dump(by_alias=True)}
    return [
        (f" at {_when(ramp, part)}", values_at(given, part * long // 2, _PHASE)[name])
        for part in range(3)
    ]


def _when(ramp: Ramp, part: int) -> str:
    if ramp.steps is not None:
        return f"step {part * ramp.steps // 2}"
    return f"{50 * part * (ramp.share or 1.0):g} % of the phase"


def plot_augmented(
    file: Path,
    signal: np.ndarray,
    sampling_rate: float,
    options: AugmentOptions,
    row: str,
    ramps: Mapping[str, Ramp] = MappingProxyType({}),
) -> None:
    """Draw a trial as recorded, then with every augmentation that is on.

    Args:
        file: PNG, PDF or SVG.
        signal: [T, C].
        sampling_rate: in Hz.
        options: of the augmentation, with smoothing in bins.
        ramps: of those that change within a phase, see `variants`.
        row: its name; chance is that of training with seed 0 in its first epoch.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {"as recorded": signal}
    for name, augment in variants(options, ramps).items():
        shown[name] = augment(signal, sampling_rate, row_generator(0, 0, 0, row)).signal
    figure = Figure(figsize=(11, 1.9 * len(shown)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(shown), 1, squeeze=False, sharex=True)[:, 0]
    limit = float(np.quantile(np.abs(signal), 0.99)) or 1.0
    for axes, (name, values) in zip(panels, shown.items(), strict=True):
        axes.imshow(
            values.T, aspect="auto", interpolation="nearest", cmap="RdBu_r",
            vmin=-limit, vmax=limit, extent=(0, len(values) / sampling_rate, values.shape[1], 0),
        )  # fmt: skip
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_ylabel("channel", fontsize=8)
    panels[-1].set_xlabel("time (s)")
    panels[-1].set_xlim(0, max(map(len, shown.values())) / sampling_rate)
    figure.suptitle(f"trial {row}: what augmentation makes of it", fontsize=10)
    figure.savefig(file, dpi=110)


def _shown(value: Any) -> str:
    return "–".join(f"{each:g}" for each in value) if isinstance(value, tuple) else f"{value:g}"
