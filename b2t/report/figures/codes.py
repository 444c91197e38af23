"""Figures of the codebooks: use and perplexity by layer, use of each code, sizes."""

import math

import numpy as np
from matplotlib.axes import Axes

from b2t.report.figures.axes import (
    COLOURS,
    course_of,
    ink_of,
    legend,
    pick_colour,
    plot_course,
    time_axis,
)
from b2t.report.figures.draw import Plot, on_paper, render
from b2t.report.run_data import RunData
from b2t.report.sizing import Sizing

_MOST_LAYERS = 16
_HEAT_COLUMNS = 256


def usage_png(usage: list[list[int]]) -> bytes:
    """Draw how often each code of each layer is used: usage [Q][K] frames."""
    return on_paper("usage", lambda axes: draw_usage(axes, usage))


def correlation_png(matrix: list[list[float]]) -> bytes:
    """Draw the correlation [Q][Q] between layers' usage."""
    return on_paper("correlation", lambda axes: _correlation(axes, matrix))


def draw_layers(axes: Axes, run: RunData, prefix: str, factor: float, unit: str) -> None:
    """One line per layer, of 16 layers at most; ``factor`` scales the metric to ``unit``."""
    names = run.names(prefix)
    names = names[:: math.ceil(len(names) / _MOST_LAYERS)]
    for index, name in enumerate(names):
        steps, values = course_of(run, name)
        colour = pick_colour(index, len(names))
        label = name.rsplit("/", 1)[-1]
        plot_course(axes, steps, [factor * v for v in values], color=colour, label=label)
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0, top=105 if factor == 100.0 else None)
    legend(axes, 8, "layer")
    time_axis(axes, run)


def draw_usage(axes: Axes, usage: list[list[int]]) -> None:
    """Use of each code over uniform use, from the most to the least used: usage [Q][K] frames."""
    counts = np.array(usage, dtype=float)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1) * counts.shape[1]
    ordered = -np.sort(-share, axis=1)
    if ordered.shape[1] > _HEAT_COLUMNS:
        parts = np.array_split(ordered, _HEAT_COLUMNS, axis=1)
        ordered = np.stack([part.mean(1) for part in parts], axis=1)
    logs = np.log10(np.maximum(ordered, 1e-2))
    image = axes.imshow(
        logs,
        aspect="auto",
        cmap="viridis",
        vmin=-2,
        vmax=1,
        interpolation="nearest",
        extent=(0, counts.shape[1], len(counts) - 0.5, -0.5),
    )
    axes.set_xlabel("codes, from the most to the least used")
    axes.set_ylabel("quantizer layer")
    axes.set_yticks(range(0, len(counts), max(1, len(counts) // 8)))
    bar = axes.figure.colorbar(image, ax=axes, ticks=[-2, -1, 0, 1])
    bar.ax.set_yticklabels(["≤ 0.01", "0.1", "1", "≥ 10"])
    bar.set_label("use over uniform use")
    bar.outline.set_visible(False)  # type: ignore[operator]  # a spine, whatever the stub says


def _correlation(axes: Axes, matrix: list[list[float]]) -> None:
    image = axes.imshow(np.array(matrix), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    ticks = range(0, len(matrix), max(1, len(matrix) // 8))
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    axes.set_xlabel("quantizer layer")
    axes.set_ylabel("quantizer layer")
    bar = axes.figure.colorbar(image, ax=axes, label="correlation of usage")
    bar.outline.set_visible(False)  # type: ignore[operator]  # a spine, whatever the stub says


def of_codes(run: RunData) -> str:
    """How many codes a layer has, for a heading."""
    size = run.setting("model.quantizer.codebook_size")
    return f" (of {size:,} codes)" if isinstance(size, int) else ""


def sizing_plot(sizing: Sizing) -> Plot:
    """Draw perplexity against codes: what was measured, the fitted curve, and use of all codes."""
    return render("sizing", "Perplexity against codes", lambda axes: _sizing(axes, sizing))


def _sizing(axes: Axes, sizing: Sizing) -> None:
    sizes = sizing.sizes
    reach = np.geomspace(sizes[0] / 4, 4 * max(sizes[-1], sizing.suggestion / 2), 100)
    axes.plot(reach, reach, color=ink_of(axes), alpha=0.5, lw=0.9, ls="--", label="all codes alike")
    fitted = [sizing.perplexity(size) for size in reach]
    axes.plot(reach, fitted, color=COLOURS[0], label="fitted curve")
    axes.plot(*zip(*sizing.points, strict=True), "o", color=COLOURS[1], ms=5, label="measured")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("codes K")
    axes.set_ylabel("perplexity, least used layer")
    axes.grid(lw=0.5, alpha=0.6)
    legend(axes)
