"""Figures of signals: original and reconstruction, and their spectra."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from b2t.report.figures.axes import COLOURS, ink_of, legend
from b2t.report.figures.draw import on_paper
from b2t.report.run_data import RunData


def traces_png(trial: dict[str, Any], sampling_rate: float) -> bytes:
    """Draw one trial as `b2t.evaluate.traces.collect_traces` describes it."""
    return on_paper("traces", lambda axes: draw_traces(axes, trial, sampling_rate))


def trial_shown(run: RunData) -> str:
    """Name of the trial, for a heading."""
    trials = run.traces.get("trials")
    row = trials[0].get("row") if trials else None
    return f", trial {row}" if row else ""


def draw_traces(axes: Axes, trial: dict[str, Any], sampling_rate: float) -> None:
    """Channels of one trial below each other, original and reconstruction."""
    spread = float(np.max([np.ptp(channel) for channel in trial["target"]] or [1.0])) or 1.0
    rows = len(trial["channels"])
    for row, (truth, output) in enumerate(
        zip(trial["target"], trial["reconstruction"], strict=True)
    ):
        seconds = np.arange(len(truth)) / sampling_rate
        shift = -row * spread
        first = row == 0
        axes.plot(
            seconds,
            np.array(truth) + shift,
            color=ink_of(axes),
            alpha=0.45,
            lw=1,
            label="original" if first else None,
        )
        axes.plot(
            seconds,
            np.array(output) + shift,
            color=COLOURS[1],
            lw=1.4,
            label="reconstruction" if first else None,
        )
    axes.set_yticks([-row * spread for row in range(rows)], trial["channels"])
    axes.tick_params(axis="y", length=0)
    axes.set_ylabel("channel")
    axes.plot([1.01, 1.01], [0, -spread], color=ink_of(axes), lw=1.5, clip_on=False,
              transform=axes.get_yaxis_transform())  # fmt: skip
    axes.text(1.02, -0.5 * spread, f"{spread:.2g} (as prepared)", rotation=90, fontsize=7.5,
              va="center", transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set_xlabel("time, s")
    axes.margins(x=0.01)
    legend(axes)


def draw_spectra(axes: Axes, spectrum: dict[str, list[float]]) -> None:
    """Power density of original and reconstruction."""
    axes.plot(spectrum["hz"], spectrum["target"], color=ink_of(axes), alpha=0.6, label="original")
    axes.plot(spectrum["hz"], spectrum["reconstruction"], color=COLOURS[1], label="reconstruction")
    axes.set_xlabel("frequency, Hz")
    axes.set_ylabel("power density, dB per Hz")
    axes.grid(lw=0.5, alpha=0.6)
    legend(axes)
