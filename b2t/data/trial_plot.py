"""One trial as a picture: every channel as colour, the liveliest as traces."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRACES = 8
_MOST_NAMED = 40


def plot_trial(
    path: Path,
    signal: np.ndarray,
    sampling_rate: float,
    *,
    title: str,
    subtitle: str = "",
    channel_names: Sequence[str] | None = None,
    unit: str = "z-score",
) -> None:
    """Draw one trial to ``path`` (PNG, or what its extension says).

    Args:
        path: the picture's file.
        signal: [T, C].
        sampling_rate: in Hz.
        title: the sentence, or the trial's name where it has none.
        subtitle: what else to know.
        channel_names: C names; names such as ``power-area4-7`` are grouped by all but the last
            part.
        unit: of the values.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(channel_names or [f"channel {index}" for index in range(signal.shape[1])])
    figure = Figure(figsize=(11, 7), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    image, traces = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    figure.suptitle(title, fontsize=13, fontweight="semibold", x=0.01, ha="left", wrap=True)
    image.set_title(subtitle, fontsize=9, color="0.35", loc="left")
    _draw_channels(figure, image, signal, sampling_rate, names, unit)
    _draw_traces(traces, signal, sampling_rate, names)
    figure.savefig(path, dpi=150)


def _draw_channels(
    figure: "Figure", axes: "Axes", signal: np.ndarray, rate: float, names: Sequence[str], unit: str
) -> None:
    bins, channels = signal.shape
    # One wild electrode must not turn all others white: 99 % of the values span the colours.
    limit = float(np.quantile(np.abs(signal), 0.99)) or 1.0
    picture = axes.imshow(
        signal.T,
        aspect="auto",
        interpolation="nearest",
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
        extent=(0, bins / rate, channels, 0),
    )
    figure.colorbar(picture, ax=axes, pad=0.01, label=unit, extend="both")
    groups = _groups(names)
    if groups:
        axes.set_yticks([(first + last) / 2 for _, first, last in groups])
        axes.set_yticklabels([label for label, _, _ in groups], fontsize=8)
        for _, first, _ in groups[1:]:
            axes.axhline(first, color="0.2", linewidth=0.6)
    elif channels <= _MOST_NAMED:
        axes.set_yticks(np.arange(channels) + 0.5, names, fontsize=7)
    else:
        axes.set_ylabel("channel")
    axes.tick_params(axis="y", length=0)


def _draw_traces(axes: "Axes", signal: np.ndarray, rate: float, names: Sequence[str]) -> None:
    chosen = np.sort(np.argsort(-signal.std(axis=0), kind="stable")[:TRACES])
    step = 4 * float(np.median(signal[:, chosen].std(axis=0))) or 1.0
    # The middle of each bin, as the picture above shows it.
    time = (np.arange(len(signal)) + 0.5) / rate
    traces = signal[:, chosen] - signal[:, chosen].mean(axis=0) - step * np.arange(len(chosen))
    axes.plot(time, traces, color="#1f4e79", linewidth=0.8)
    axes.set_yticks(-step * np.arange(len(chosen)), [names[index] for index in chosen], fontsize=8)
    axes.set_xlim(0, len(signal) / rate)
    axes.set_ylim(traces.min() - 0.2 * step, traces.max() + 0.2 * step)
    axes.set_xlabel("time (s)")
    axes.set_title(
        f"the {len(chosen)} channels that vary most", fontsize=9, color="0.35", loc="left"
    )
    axes.grid(axis="x", color="0.9")
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _groups(names: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return (label, first, one after the last) of runs of channels with a common prefix."""
    groups = []
    first = 0
    for label, members in groupby(names, key=lambda name: name.rpartition("-")[0]):
        last = first + len(list(members))
        groups.append((label.replace("-", " "), first, last))
        first = last
    named = all(label for label, _, _ in groups)
    return groups if named and 1 < len(groups) <= len(names) // 4 else []
