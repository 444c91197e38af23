"""Figures of the report: each as SVG that follows the page's colours, and as PNG."""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from b2t.report.run_data import RunData, is_number
from b2t.report.sizing import Sizing

_INK, _LINE = "#010203", "#040506"
"""Stand-ins in the SVG for the page's text and line colours."""
_PAPER_INK, _PAPER_LINE = "#1b1f24", "#c9ced6"

COLOURS = ("#3b7dd8", "#cb7119", "#2b9566", "#c8553d", "#8a63c9", "#9c8420", "#2b8fa1", "#c2679f")
"""Each stands out from white and from the dark page by a contrast of 3 at least."""
SEVERITY = {"critical": "#d1372c", "warning": "#c07b08", "info": "#3b7dd8"}
_OWN_COLOUR = {
    name: COLOURS[index]
    for names in (
        ("reconstruction", "commitment", "generation", "phoneme", "diversity", "perplexity"),
        ("encoder", "adapter", "text_decoder", "phoneme_head", "quantizer", "signal_decoder"),
    )
    for index, name in enumerate(names)
}
"""Losses and components look the same in every figure of every run."""
_MOST_LAYERS = 16
_HEAT_COLUMNS = 256
_LARGEST_DECADES = 5.0
"""A logarithmic axis shows at most these below its largest value."""


@dataclass(frozen=True)
class Plot:
    """A figure of the report.

    Attributes:
        name: file name without ending.
        title: heading.
        svg: inline SVG without width and height.
        png: file content.
    """

    name: str
    title: str
    svg: str
    png: bytes


def plots_of(run: RunData) -> list[Plot]:
    """Draw everything that the run has data for."""
    losses = [n for n in run.names("loss/") if n != "loss/vq_ratio"]
    candidates: list[tuple[str, str, bool, Callable[[Axes], None]]] = [
        (
            "utilization",
            "Codes in use, by layer",
            bool(run.names("codebook/utilization/")),
            lambda axes: _layers(axes, run, "codebook/utilization/", 100.0, "codes in use, %"),
        ),
        (
            "perplexity",
            "Perplexity, by layer" + _of_codes(run),
            bool(run.names("codebook/perplexity/")),
            lambda axes: _layers(axes, run, "codebook/perplexity/", 1.0, "codes"),
        ),
        (
            "usage",
            f"Usage of each code on {run.evaluation.get('split', 'the evaluated split')}",
            bool(run.usage),
            lambda axes: _heatmap(axes, run.usage),
        ),
        ("losses", "Losses", bool(losses), lambda axes: _losses(axes, run, losses)),
        (
            "loss_shares",
            "Shares of the total loss",
            bool(run.names("loss_share/")),
            lambda axes: _shares(axes, run),
        ),
        (
            "gradients",
            "Gradient norms before clipping",
            bool(run.names("optim/grad_norm")),
            lambda axes: _gradients(axes, run),
        ),
        (
            "learning_rates",
            "Learning rates",
            bool(run.names("optim/lr/")),
            lambda axes: _learning_rates(axes, run),
        ),
        (
            "loss_scale",
            "Loss scale and skipped steps",
            _scale_moves(run),
            lambda axes: _scale(axes, run),
        ),
        (
            "snr",
            "Reconstruction SNR",
            bool(run.names("reconstruction/snr_db") or run.names("val/snr_db", True)),
            lambda axes: _snr(axes, run),
        ),
        (
            "movement",
            "Movement of codes and revivals",
            bool(run.names("ema/movement") or run.names("codebook/revived")),
            lambda axes: _movement(axes, run),
        ),
        (
            "decoding",
            "Error rates on validation trials",
            bool([n for n in ("val/wer", "val/cer", "val/per") if run.series(n, True)[0]]),
            lambda axes: _decoding(axes, run),
        ),
        (
            "traces",
            "Original and reconstruction" + _trial_shown(run),
            bool(run.traces.get("trials")),
            lambda axes: _traces(axes, run.traces["trials"][0], run.traces["sampling_rate"]),
        ),
        (
            "spectra",
            "Spectra of original and reconstruction",
            bool(run.traces.get("spectrum")),
            lambda axes: _spectra(axes, run.traces["spectrum"]),
        ),
    ]
    return [render(name, title, draw) for name, title, there, draw in candidates if there]


COMPARED: tuple[tuple[str, str, str, bool], ...] = (
    ("loss/total", "Total loss", "loss", False),
    ("val/loss", "Validation loss", "loss", True),
    ("codebook/utilization_worst", "Codes in use, worst layer", "%", False),
    ("codebook/perplexity_fraction", "Perplexity over codes, mean of layers", "%", False),
    ("reconstruction/snr_db", "Reconstruction SNR", "dB", False),
    ("val/wer", "Word error rate on validation trials", "%", True),
    ("val/per", "Phoneme error rate on validation trials", "%", True),
    ("optim/grad_norm", "Gradient norm before clipping", "norm", False),
)
"""Metric, title, unit, whether it comes from validations."""


def plots_of_several(runs: Sequence[RunData]) -> list[Plot]:
    """Draw the metrics that at least one of the runs has, all runs on the same axes."""
    found = []
    for metric, title, unit, validation in COMPARED:
        if any(run.series(metric, validation)[0] for run in runs):
            draw = _comparison(runs, metric, unit, validation)
            found.append(render("compare_" + metric.replace("/", "_"), title, draw))
    return found


def usage_png(usage: list[list[int]]) -> bytes:
    """Draw how often each code of each layer is used: usage [Q][K] frames."""
    return _paper("usage", lambda axes: _heatmap(axes, usage))


def correlation_png(matrix: list[list[float]]) -> bytes:
    """Draw the correlation [Q][Q] between layers' usage."""
    return _paper("correlation", lambda axes: _correlation(axes, matrix))


def traces_png(trial: dict[str, Any], sampling_rate: float) -> bytes:
    """Draw one trial as `b2t.evaluate.traces.collect_traces` describes it."""
    return _paper("traces", lambda axes: _traces(axes, trial, sampling_rate))


def _paper(name: str, draw: Callable[[Axes], None]) -> bytes:
    return _drawn(draw, _PAPER_INK, _PAPER_LINE, "white", name, "png")


def render(name: str, title: str, draw: Callable[[Axes], None]) -> Plot:
    """Draw once for the page and once for paper."""
    svg = _drawn(draw, _INK, _LINE, "none", name, "svg").decode()
    return Plot(name, title, _inline(svg, title), _paper(name, draw))


def _drawn(
    draw: Callable[[Axes], None], ink: str, line: str, paper: str, salt: str, kind: str
) -> bytes:
    style: dict[Any, Any] = {
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": line,
        "xtick.color": ink,
        "ytick.color": ink,
        "grid.color": line,
        "axes.facecolor": "none",
        "figure.facecolor": paper,
        "savefig.facecolor": paper,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "legend.handlelength": 1.3,
        "legend.columnspacing": 1.2,
        "font.size": 8.5,
        "axes.labelsize": 8.5,
        "lines.linewidth": 1.3,
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
    }
    content = io.BytesIO()
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.2, 3.0), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.subplots())
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        # Ticks change when the layout gives them room: the second layout sees what stays.
        figure.draw_without_rendering()
        figure.savefig(
            content, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else None
        )
    return content.getvalue()


def _inline(svg: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    svg = re.sub(r"font:\s*([\d.]+px)\s*[^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    return svg.replace(_INK, "currentColor").replace(_LINE, "var(--line)")


def _time_axis(axes: Axes, run: RunData) -> None:
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
        axes.axvline(step, lw=0.7, ls=(0, (3, 3)), color=_ink(axes), alpha=0.5)
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


def _ink(axes: Axes) -> Any:
    return axes.xaxis.label.get_color()


def _colour(index: int, many: int) -> Any:
    if many <= len(COLOURS):
        return COLOURS[index % len(COLOURS)]
    # From blue to magenta, the part of the map that stands out from light and from dark.
    return matplotlib.colormaps["cool"](0.47 + 0.53 * index / (many - 1))


def _own_colour(name: str, index: int, many: int) -> Any:
    return _OWN_COLOUR.get(name) or _colour(index, many)


def _course(run: RunData, name: str) -> tuple[list[float], list[float]]:
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


def _plot(axes: Axes, steps: list[float], values: list[float], **style: Any) -> None:
    """A line; a point without neighbours is a dot, so that it can be seen."""
    there = [False, *(value == value for value in values), False]
    alone = [
        i - 1 for i in range(1, len(there) - 1) if there[i] and not (there[i - 1] or there[i + 1])
    ]
    axes.plot(steps, values, marker="o" if alone else None, markevery=alone, ms=3.5, **style)


def _legend(axes: Axes, columns: int = 3, title: str | None = None) -> None:
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


def _layers(axes: Axes, run: RunData, prefix: str, factor: float, unit: str) -> None:
    names = run.names(prefix)
    names = names[:: math.ceil(len(names) / _MOST_LAYERS)]
    for index, name in enumerate(names):
        steps, values = _course(run, name)
        colour = _colour(index, len(names))
        label = name.rsplit("/", 1)[-1]
        _plot(axes, steps, [factor * v for v in values], color=colour, label=label)
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0, top=105 if factor == 100.0 else None)
    _legend(axes, 8, "layer")
    _time_axis(axes, run)


def _heatmap(axes: Axes, usage: list[list[int]]) -> None:
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


def _losses(axes: Axes, run: RunData, names: list[str]) -> None:
    parts = [name for name in names if name != "loss/total"]
    for index, name in enumerate(parts):
        steps, values = _course(run, name)
        label = name.removeprefix("loss/")
        colour = _own_colour(label, index, len(parts))
        # Diversity and perplexity measure much the same: one may lie on the other.
        style = {"ls": "--"} if label == "perplexity" else {}
        values = [v or math.nan for v in values]
        _plot(axes, steps, values, color=colour, label=label, **style)
    steps, values = run.series("loss/total")
    if steps:
        axes.plot(steps, values, color=_ink(axes), alpha=0.35, lw=0.9, label="total")
        smooth_steps, smooth = _smooth_by_phase(run, steps, values)
        _plot(axes, smooth_steps, smooth, color=_ink(axes), lw=1.9, label="total, smoothed")
    _log_scale(axes, [v for name in names for v in run.series(name)[1] if v])
    axes.set_ylabel("loss, unweighted")
    _time_axis(axes, run)
    _legend(axes)


def _log_scale(axes: Axes, values: list[float]) -> None:
    """Logarithmic where nothing is negative, without the decades far below the largest value."""
    if values and min(values) > 0:
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(min(values) / 1.5, max(values) / 10**_LARGEST_DECADES))


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


def _shares(axes: Axes, run: RunData) -> None:
    names = run.names("loss_share/")
    steps = sorted({step for name in names for step in run.series(name)[0]})
    rows = []
    for name in names:
        known = dict(zip(*run.series(name), strict=True))
        rows.append([100 * known.get(step, 0.0) for step in steps])
    labels = [name.removeprefix("loss_share/") for name in names]
    colours = [_own_colour(label, i, len(names)) for i, label in enumerate(labels)]
    axes.stackplot(steps, rows, labels=labels, colors=colours, alpha=0.85)
    axes.set_ylabel("share of the weighted total, %")
    axes.set_ylim(0, 100)
    _time_axis(axes, run)
    _legend(axes)


def _gradients(axes: Axes, run: RunData) -> None:
    names = run.names("optim/grad_norm")
    for index, name in enumerate(names):
        steps, values = _course(run, name)
        label = name.removeprefix("optim/grad_norm").strip("/")
        colour = _own_colour(label, index, len(names)) if label else _ink(axes)
        _plot(axes, steps, values, color=colour, label=label or "all", lw=1.3 if label else 1.9)
    _log_scale(axes, [v for name in names for v in run.series(name)[1] if v])
    axes.set_ylabel("Euclidean norm")
    _time_axis(axes, run)
    _legend(axes)


def _learning_rates(axes: Axes, run: RunData) -> None:
    """One line for all components with the same course; later ones are thinner, so none hides."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name in run.names("optim/lr/"):
        steps, values = _course(run, name)
        key = tuple(zip(steps, [None if v != v else v for v in values], strict=True))
        alike.setdefault(key, []).append(name.removeprefix("optim/lr/"))
    largest = max((v for course in alike for _, v in course if v), default=1.0)
    power = math.floor(math.log10(largest))
    widths = np.linspace(1.2 + 1.3 * (len(alike) > 1), 1.2, len(alike))
    for index, (course, components) in enumerate(alike.items()):
        steps = [step for step, _ in course]
        values = [math.nan if value is None else value / 10.0**power for _, value in course]
        label = ", ".join(components)
        _plot(axes, steps, values, color=_colour(index, len(alike)), label=label, lw=widths[index])
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"learning rate, $10^{{{power}}}$")
    _time_axis(axes, run)
    _legend(axes, 1)


def _of_codes(run: RunData) -> str:
    size = run.setting("model.quantizer.codebook_size")
    return f" (of {size:,} codes)" if isinstance(size, int) else ""


def _trial_shown(run: RunData) -> str:
    trials = run.traces.get("trials")
    row = trials[0].get("row") if trials else None
    return f", trial {row}" if row else ""


def _scale_moves(run: RunData) -> bool:
    """Whether there is a loss scale to draw (without fp16 it is 1 for ever) or a skipped step."""
    scale, skipped = (run.series(f"optim/{name}")[1] for name in ("loss_scale", "skipped_steps"))
    return any(value != 1 for value in scale) or any(skipped)


def _scale(axes: Axes, run: RunData) -> None:
    steps, values = _course(run, "optim/loss_scale")
    if steps:
        style = {"color": COLOURS[0], "drawstyle": "steps-post"}
        _plot(axes, steps, values, label="loss scale", **style)
        axes.set_yscale("log", base=2)
        axes.set_ylabel("loss scale")
    steps, values = run.series("optim/skipped_steps")
    if steps:
        other = axes.twinx()
        _plot(other, steps, values, color=COLOURS[3])
        axes.plot([], [], color=COLOURS[3], label="skipped steps so far (right)")
        other.set_ylabel("skipped steps")
        other.set_ylim(bottom=0, top=max(1.0, 1.1 * max(values)))
    _time_axis(axes, run)
    _legend(axes)


def _snr(axes: Axes, run: RunData) -> None:
    steps, values = _course(run, "reconstruction/snr_db")
    if steps:
        _plot(axes, steps, values, color=COLOURS[0], label="training")
    steps, values = run.series("val/snr_db", True)
    if steps:
        axes.plot(steps, values, "o-", ms=3.5, color=COLOURS[1], label="validation")
    axes.set_ylabel("SNR, dB")
    _time_axis(axes, run)
    _legend(axes)


def _movement(axes: Axes, run: RunData) -> None:
    steps, values = _course(run, "ema/movement")
    lines = [("movement", "movement, % of norm", steps, [100 * v for v in values])]
    steps, values = _course(run, "ema/revived_per_step")
    unit = "codes revived per step"
    if not steps:
        steps, values = _course(run, "codebook/revived")
        unit = "codes revived since last log"
    lines.append(("revived", unit, steps, values))
    there = [line for line in lines if line[2]]
    right = axes.twinx() if len(there) > 1 else axes
    for index, (label, unit, steps, values) in enumerate(there):
        one, colour = (axes, right)[index], COLOURS[index]
        _plot(one, steps, values, color=colour)
        axes.plot([], [], color=colour, label=label + (" (right)" if one is not axes else ""))
        one.set_ylabel(unit)
        one.set_ylim(bottom=0, top=1.1 * float(np.nanmax(values)) or 1.0)
    _time_axis(axes, run)
    _legend(axes)


def _decoding(axes: Axes, run: RunData) -> None:
    for index, name in enumerate(("val/wer", "val/cer", "val/per")):
        steps, values = run.series(name, evaluations=True)
        if steps:
            percent = [100 * v for v in values]
            axes.plot(steps, percent, "o-", color=COLOURS[index], label=name[4:].upper(), ms=3.5)
    axes.set_ylabel("error rate, %")
    axes.set_ylim(bottom=0)
    _time_axis(axes, run)
    _legend(axes)


def _traces(axes: Axes, trial: dict[str, Any], sampling_rate: float) -> None:
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
            color=_ink(axes),
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
    axes.plot([1.01, 1.01], [0, -spread], color=_ink(axes), lw=1.5, clip_on=False,
              transform=axes.get_yaxis_transform())  # fmt: skip
    axes.text(1.02, -0.5 * spread, f"{spread:.2g} (as prepared)", rotation=90, fontsize=7.5,
              va="center", transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set_xlabel("time, s")
    axes.margins(x=0.01)
    _legend(axes)


def _spectra(axes: Axes, spectrum: dict[str, list[float]]) -> None:
    axes.plot(spectrum["hz"], spectrum["target"], color=_ink(axes), alpha=0.6, label="original")
    axes.plot(spectrum["hz"], spectrum["reconstruction"], color=COLOURS[1], label="reconstruction")
    axes.set_xlabel("frequency, Hz")
    axes.set_ylabel("power density, dB per Hz")
    axes.grid(lw=0.5, alpha=0.6)
    _legend(axes)


def sizing_plot(sizing: Sizing) -> Plot:
    """Draw perplexity against codes: what was measured, the fitted curve, and use of all codes."""
    return render("sizing", "Perplexity against codes", lambda axes: _sizing(axes, sizing))


def _sizing(axes: Axes, sizing: Sizing) -> None:
    sizes = sizing.sizes
    reach = np.geomspace(sizes[0] / 4, 4 * max(sizes[-1], sizing.suggestion / 2), 100)
    axes.plot(reach, reach, color=_ink(axes), alpha=0.5, lw=0.9, ls="--", label="all codes alike")
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
    _legend(axes)


def _comparison(
    runs: Sequence[RunData], metric: str, unit: str, validation: bool
) -> Callable[[Axes], None]:
    scale = 100 if unit == "%" else 1
    last = max([r["step"] for run in runs for r in (*run.steps, *run.evaluations)], default=1)

    def draw(axes: Axes) -> None:
        everything: list[float] = []
        for index, run in enumerate(runs):
            steps, values = run.series(metric, validation)
            values = [scale * value for value in values]
            everything += values
            if steps:
                marker = "o" if validation or len(steps) == 1 else None
                colour = _colour(index, len(runs))
                axes.plot(steps, values, marker=marker, ms=4, color=colour, label=run.name)
        if metric.startswith(("loss/", "optim/")):
            _log_scale(axes, everything)
        if unit == "%":
            axes.set_ylim(bottom=0)
        axes.set_xlim(0, 1.02 * last)
        axes.set_ylabel(unit)
        axes.set_xlabel("applied step")
        axes.grid(axis="y", lw=0.5, alpha=0.6)
        _legend(axes)

    return draw
