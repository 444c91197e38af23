"""Courses of a training: losses, gradients, rates, loss scale, SNR, error rates."""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from b2t.report.figures.axes import (
    COLOURS,
    course_of,
    ink_of,
    legend,
    log_scale,
    own_colour,
    pick_colour,
    plot_course,
    time_axis,
)
from b2t.report.run_data import RunData


def draw_losses(axes: Axes, run: RunData, names: list[str]) -> None:
    """All losses, unweighted, and their total, smoothed within each phase."""
    parts = [name for name in names if name != "loss/total"]
    for index, name in enumerate(parts):
        steps, values = course_of(run, name)
        label = name.removeprefix("loss/")
        colour = own_colour(label, index, len(parts))
        # Diversity and perplexity measure much the same: one may lie on the other.
        style = {"ls": "--"} if label == "perplexity" else {}
        values = [v or math.nan for v in values]
        plot_course(axes, steps, values, color=colour, label=label, **style)
    steps, values = run.series("loss/total")
    if steps:
        axes.plot(steps, values, color=ink_of(axes), alpha=0.35, lw=0.9, label="total")
        smooth_steps, smooth = _smooth_by_phase(run, steps, values)
        plot_course(axes, smooth_steps, smooth, color=ink_of(axes), lw=1.9, label="total, smoothed")
    log_scale(axes, [v for name in names for v in run.series(name)[1] if v])
    axes.set_ylabel("loss, unweighted")
    time_axis(axes, run)
    legend(axes)


def _smooth_by_phase(
    run: RunData, steps: list[float], values: list[float]
) -> tuple[list[float], list[float]]:
    """Running means that do not reach into another phase, apart by NaN."""
    starts = [start for _, start in run.phases]
    phases = np.searchsorted(starts, steps, side="left")
    found_steps: list[float] = []
    found: list[float] = []
    for phase in np.unique(phases):
        inside = [i for i, number in enumerate(phases) if number == phase]
        found_steps += [*(steps[i] for i in inside), steps[inside[-1]]]
        found += [*_smooth([values[i] for i in inside]), math.nan]
    return found_steps, found


def _smooth(values: list[float]) -> list[float]:
    """Centred running mean over a twentieth of the course."""
    reach = max(1, len(values) // 40)
    padded = np.pad(np.array(values, dtype=float), reach, mode="edge")
    return np.convolve(padded, np.ones(2 * reach + 1) / (2 * reach + 1), mode="valid").tolist()


def draw_shares(axes: Axes, run: RunData) -> None:
    """Share of each loss in the weighted total."""
    names = run.names("loss_share/")
    steps = sorted({step for name in names for step in run.series(name)[0]})
    rows = []
    for name in names:
        known = dict(zip(*run.series(name), strict=True))
        rows.append([100 * known.get(step, 0.0) for step in steps])
    labels = [name.removeprefix("loss_share/") for name in names]
    colours = [own_colour(label, i, len(names)) for i, label in enumerate(labels)]
    axes.stackplot(steps, rows, labels=labels, colors=colours, alpha=0.85)
    axes.set_ylabel("share of the weighted total, %")
    axes.set_ylim(0, 100)
    time_axis(axes, run)
    legend(axes)


def draw_gradients(axes: Axes, run: RunData) -> None:
    """Gradient norms before clipping, of each component and of all."""
    names = run.names("optim/grad_norm")
    for index, name in enumerate(names):
        steps, values = course_of(run, name)
        label = name.removeprefix("optim/grad_norm").strip("/")
        colour = own_colour(label, index, len(names)) if label else ink_of(axes)
        plot_course(
            axes, steps, values, color=colour, label=label or "all", lw=1.3 if label else 1.9
        )
    log_scale(axes, [v for name in names for v in run.series(name)[1] if v])
    axes.set_ylabel("Euclidean norm")
    time_axis(axes, run)
    legend(axes)


def draw_learning_rates(axes: Axes, run: RunData) -> None:
    """One line for all components with the same course; later ones are thinner, so none hides."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name in run.names("optim/lr/"):
        steps, values = course_of(run, name)
        key = tuple(zip(steps, [None if v != v else v for v in values], strict=True))
        alike.setdefault(key, []).append(name.removeprefix("optim/lr/"))
    largest = max((v for course in alike for _, v in course if v), default=1.0)
    power = math.floor(math.log10(largest))
    widths = np.linspace(1.2 + 1.3 * (len(alike) > 1), 1.2, len(alike))
    for index, (course, components) in enumerate(alike.items()):
        steps = [step for step, _ in course]
        values = [math.nan if value is None else value / 10.0**power for _, value in course]
        label = ", ".join(components)
        plot_course(
            axes, steps, values, color=pick_colour(index, len(alike)), label=label, lw=widths[index]
        )
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"learning rate, $10^{{{power}}}$")
    time_axis(axes, run)
    legend(axes, 1)


def scale_moves(run: RunData) -> bool:
    """Whether there is a loss scale to draw (without fp16 it is 1 for ever) or a skipped step."""
    scale, skipped = (run.series(f"optim/{name}")[1] for name in ("loss_scale", "skipped_steps"))
    return any(value != 1 for value in scale) or any(skipped)


def draw_scale(axes: Axes, run: RunData) -> None:
    """Loss scale and skipped steps."""
    steps, values = course_of(run, "optim/loss_scale")
    if steps:
        style = {"color": COLOURS[0], "drawstyle": "steps-post"}
        plot_course(axes, steps, values, label="loss scale", **style)
        axes.set_yscale("log", base=2)
        axes.set_ylabel("loss scale")
    steps, values = run.series("optim/skipped_steps")
    if steps:
        other = axes.twinx()
        plot_course(other, steps, values, color=COLOURS[3])
        axes.plot([], [], color=COLOURS[3], label="skipped steps so far (right)")
        other.set_ylabel("skipped steps")
        other.set_ylim(bottom=0, top=max(1.0, 1.1 * max(values)))
    time_axis(axes, run)
    legend(axes)


def draw_snr(axes: Axes, run: RunData) -> None:
    """SNR of the reconstruction in training and validation."""
    steps, values = course_of(run, "reconstruction/snr_db")
    if steps:
        plot_course(axes, steps, values, color=COLOURS[0], label="training")
    steps, values = run.series("val/snr_db", True)
    if steps:
        axes.plot(steps, values, "o-", ms=3.5, color=COLOURS[1], label="validation")
    axes.set_ylabel("SNR, dB")
    time_axis(axes, run)
    legend(axes)


def draw_movement(axes: Axes, run: RunData) -> None:
    """Movement of codes, and how many are revived."""
    steps, values = course_of(run, "ema/movement")
    lines = [("movement", "movement, % of norm", steps, [100 * v for v in values])]
    steps, values = course_of(run, "ema/revived_per_step")
    unit = "codes revived per step"
    if not steps:
        steps, values = course_of(run, "codebook/revived")
        unit = "codes revived since last log"
    lines.append(("revived", unit, steps, values))
    there = [line for line in lines if line[2]]
    right = axes.twinx() if len(there) > 1 else axes
    for index, (label, unit, steps, values) in enumerate(there):
        one, colour = (axes, right)[index], COLOURS[index]
        plot_course(one, steps, values, color=colour)
        axes.plot([], [], color=colour, label=label + (" (right)" if one is not axes else ""))
        one.set_ylabel(unit)
        one.set_ylim(bottom=0, top=1.1 * float(np.nanmax(values)) or 1.0)
    time_axis(axes, run)
    legend(axes)


def draw_decoding(axes: Axes, run: RunData) -> None:
    """Error rates of words, characters and phonemes."""
    for index, name in enumerate(("val/wer", "val/cer", "val/per")):
        steps, values = run.series(name, evaluations=True)
        if steps:
            percent = [100 * v for v in values]
            axes.plot(steps, percent, "o-", color=COLOURS[index], label=name[4:].upper(), ms=3.5)
    axes.set_ylabel("error rate, %")
    axes.set_ylim(bottom=0)
    time_axis(axes, run)
    legend(axes)
