"""What the axes of all figures share: colours, courses over steps, phases, legends."""

import math
from typing import Any

import matplotlib
from matplotlib.axes import Axes

from b2t.model.objectives import COMPONENTS, OBJECTIVES
from b2t.report.run_data import RunData, is_number

COLOURS = ("#3b7dd8", "#cb7119", "#2b9566", "#c8553d", "#8a63c9", "#9c8420", "#2b8fa1", "#c2679f")
"""Each stands out from white and from the dark page by a contrast of 3 at least."""
SEVERITY = {"critical": "#d1372c", "warning": "#c07b08", "info": "#3b7dd8"}
_OWN_COLOUR = {
    name: COLOURS[index] for names in (OBJECTIVES, COMPONENTS) for index, name in enumerate(names)
}
"""Losses and components look the same in every figure of every run."""
_LARGEST_DECADES = 5.0
"""A logarithmic axis shows at most these below its largest value."""


def time_axis(axes: Axes, run: RunData) -> None:
    """Mark phases and alerts, and name the axis."""
    last = max([r["step"] for r in (*run.steps, *run.evaluations)], default=1)
    axes.set_xlim(-0.01 * last, 1.02 * last)
    axes.set_xlabel("applied step")
    axes.grid(axis="y", lw=0.5, alpha=0.6)
    top = axes.get_xaxis_transform()
    level, previous = 0, -math.inf
    for name, step in run.phases:
        level = (level + 1) % 3 if step - previous < 0.14 * last else 0
        previous = step
        axes.axvline(step, lw=0.7, ls=(0, (3, 3)), color=ink_of(axes), alpha=0.5)
        axes.text(
            step,
            1.01 + 0.06 * level,
            f" {name}",
            transform=top,
            fontsize=7,
            va="bottom",
            alpha=0.8,
        )
    for alert in run.alerts:
        colour = SEVERITY.get(str(alert.get("severity")), SEVERITY["info"])
        axes.plot(
            [alert["step"]], [0.0], "^", transform=top, color=colour, ms=6, clip_on=False, zorder=5
        )


def ink_of(axes: Axes) -> Any:
    """Colour of the text, which the page replaces by its own."""
    return axes.xaxis.label.get_color()


def pick_colour(index: int, many: int) -> Any:
    """Colour of a line among many: from the palette, or from a map where it is too short."""
    if many <= len(COLOURS):
        return COLOURS[index % len(COLOURS)]
    # From blue to magenta, the part of the map that stands out from light and from dark.
    return matplotlib.colormaps["cool"](0.47 + 0.53 * index / (many - 1))


def own_colour(name: str, index: int, many: int) -> Any:
    """Colour that a loss or a component has in every figure."""
    return _OWN_COLOUR.get(name) or pick_colour(index, many)


def course_of(run: RunData, name: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric of log steps, NaN where it was not measured in between.

    A component that a phase freezes has no learning rate there: no line may cross the phase.
    """
    steps: list[float] = []
    values: list[float] = []
    for record in run.steps:
        value = record.get(name, math.nan)
        if is_number(value) and value == value:
            steps.append(float(record["step"]))
            values.append(float(value))
        elif values and values[-1] == values[-1]:
            steps.append(float(record["step"]))
            values.append(math.nan)
    return steps, values


def plot_course(axes: Axes, steps: list[float], values: list[float], **style: Any) -> None:
    """A line; a point without neighbours is a dot, so that it can be seen."""
    there = [False, *(value == value for value in values), False]
    alone = [
        i - 1 for i in range(1, len(there) - 1) if there[i] and not (there[i - 1] or there[i + 1])
    ]
    axes.plot(steps, values, marker="o" if alone else None, markevery=alone, ms=3.5, **style)


def legend(axes: Axes, columns: int = 3, title: str | None = None) -> None:
    """Draw the legend below the axes, where it hides no line."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=min(columns, len(handles)),
            title=title,
            title_fontsize=8,
        )


def log_scale(axes: Axes, values: list[float]) -> None:
    """Logarithmic where nothing is negative, without the decades far below the largest value."""
    if values and min(values) > 0:
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(min(values) / 1.5, max(values) / 10**_LARGEST_DECADES))
