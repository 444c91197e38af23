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

from b2t.monitor.run_data import RunData

_INK, _LINE = "#010203", "#040506"
"""Stand-ins in the SVG for the page's text and line colours."""
_PAPER_INK, _PAPER_LINE = "#1b1f24", "#c9ced6"

COLOURS = ("#3b7dd8", "#e0862f", "#2f9e6e", "#c8553d", "#8a63c9", "#b59a2a", "#3aa6b9", "#c2679f")
SEVERITY = {"critical": "#d1372c", "warning": "#d99014", "info": "#3b7dd8"}
_MOST_LAYERS = 16
_HEAT_COLUMNS = 256


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
            "Perplexity, by layer",
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
            lambda axes: _lines(axes, run, run.names("optim/grad_norm"), "norm", log=True),
        ),
        (
            "learning_rates",
            "Learning rates",
            bool(run.names("optim/lr/")),
            lambda axes: _lines(axes, run, run.names("optim/lr/"), "learning rate"),
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
            "Original and reconstruction",
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
    ("codebook/utilization_worst", "Codes in use, worst layer", "fraction", False),
    ("codebook/perplexity_fraction", "Perplexity over codes, mean of layers", "fraction", False),
    ("reconstruction/snr_db", "Reconstruction SNR", "dB", False),
    ("val/wer", "Word error rate on validation trials", "fraction", True),
    ("val/per", "Phoneme error rate on validation trials", "fraction", True),
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
        "legend.fontsize": 8.5,
        "font.size": 9.5,
        "lines.linewidth": 1.4,
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
    }
    content = io.BytesIO()
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.2, 3.1), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.subplots())
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
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
            1.01 + 0.055 * level,
            f" {name}",
            transform=top,
            fontsize=7.5,
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
    return matplotlib.colormaps["turbo"]((index + 0.5) / many)


def _plot(axes: Axes, steps: list[float], values: list[float], **style: Any) -> None:
    """A line; a single point is a dot, so that it can be seen."""
    axes.plot(steps, values, marker="o" if len(steps) == 1 else None, ms=4, **style)


def _layers(axes: Axes, run: RunData, prefix: str, factor: float, unit: str) -> None:
    names = run.names(prefix)
    names = names[:: math.ceil(len(names) / _MOST_LAYERS)]
    for index, name in enumerate(names):
        steps, values = run.series(name)
        colour = _colour(index, len(names))
        label = name.rsplit("/", 1)[-1]
        _plot(axes, steps, [factor * v for v in values], color=colour, label=label)
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0, top=105 if factor == 100.0 else None)
    axes.legend(title="layer", ncols=4, loc="lower right", title_fontsize=8.5)
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
    bar.ax.set_yticklabels(["≤ 1 %", "10 %", "uniform", "10 ×"])
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
    for index, name in enumerate(n for n in names if n != "loss/total"):
        steps, values = run.series(name)
        _plot(axes, steps, values, color=_colour(index, len(names)), label=name[5:], alpha=0.9)
    steps, values = run.series("loss/total")
    if steps:
        axes.plot(steps, values, color=_ink(axes), alpha=0.3, lw=1)
        _plot(axes, steps, _smooth(values), color=_ink(axes), lw=2, label="total, smoothed")
    everything = [v for name in names for v in run.series(name)[1]]
    if everything and min(everything) > 0:
        axes.set_yscale("log")
    axes.set_ylabel("loss")
    _time_axis(axes, run)
    axes.figure.legend(loc="outside lower center", ncols=3)


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
    colours = [_colour(i, len(names)) for i in range(len(names))]
    labels = [name.removeprefix("loss_share/") for name in names]
    axes.stackplot(steps, rows, labels=labels, colors=colours, alpha=0.85)
    axes.set_ylabel("share of the total, %")
    axes.set_ylim(0, 100)
    _time_axis(axes, run)
    axes.figure.legend(loc="outside lower center", ncols=3)


def _lines(axes: Axes, run: RunData, names: list[str], unit: str, log: bool = False) -> None:
    for index, name in enumerate(names):
        steps, values = run.series(name)
        label = name.split("/", 2)[2] if name.count("/") > 1 else "all"
        _plot(axes, steps, values, color=_colour(index, len(names)), label=label)
    positive = all(v > 0 for name in names for v in run.series(name)[1])
    if log and positive:
        axes.set_yscale("log")
    axes.set_ylabel(unit)
    _time_axis(axes, run)
    axes.figure.legend(loc="outside lower center", ncols=3)


def _scale_moves(run: RunData) -> bool:
    """Whether there is a loss scale to draw (without fp16 it is 1 for ever) or a skipped step."""
    scale, skipped = (run.series(f"optim/{name}")[1] for name in ("loss_scale", "skipped_steps"))
    return any(value != 1 for value in scale) or any(skipped)


def _scale(axes: Axes, run: RunData) -> None:
    steps, values = run.series("optim/loss_scale")
    if steps:
        _plot(axes, steps, values, color=COLOURS[0], label="loss scale", drawstyle="steps-post")
        axes.set_yscale("log", base=2)
        axes.set_ylabel("loss scale")
    steps, values = run.series("optim/skipped_steps")
    if steps:
        other = axes.twinx()
        _plot(other, steps, values, color=COLOURS[3], label="skipped steps")
        other.set_ylabel("skipped steps, so far", color=COLOURS[3])
        other.set_ylim(bottom=0, top=max(1.0, 1.1 * max(values)))
    axes.yaxis.label.set_color(COLOURS[0])
    _time_axis(axes, run)


def _snr(axes: Axes, run: RunData) -> None:
    for index, (name, label, validation) in enumerate(
        (
            ("reconstruction/snr_db", "training", False),
            ("val/snr_db", "validation", True),
        )
    ):
        steps, values = run.series(name, validation)
        if steps:
            _plot(axes, steps, values, color=COLOURS[index], label=label)
    axes.set_ylabel("SNR, dB")
    axes.legend()
    _time_axis(axes, run)


def _movement(axes: Axes, run: RunData) -> None:
    steps, values = run.series("ema/movement")
    lines = [("movement per update, % of the norm", steps, [100 * v for v in values], COLOURS[0])]
    steps, values = run.series("ema/revived_per_step")
    label = "codes revived per step"
    if not steps:
        steps, values = run.series("codebook/revived")
        label = "codes revived since the record before"
    lines.append((label, steps, values, COLOURS[1]))
    there = [line for line in lines if line[1]]
    for one, (label, steps, values, colour) in zip((axes, axes.twinx()), there, strict=False):
        _plot(one, steps, values, color=colour)
        one.set_ylabel(label, color=colour)
        one.set_ylim(bottom=0, top=1.1 * max(values) or 1.0)
    if len(there) < 2:
        axes.figure.axes[-1].remove()
    _time_axis(axes, run)


def _decoding(axes: Axes, run: RunData) -> None:
    for index, name in enumerate(("val/wer", "val/cer", "val/per")):
        steps, values = run.series(name, evaluations=True)
        if steps:
            percent = [100 * v for v in values]
            axes.plot(steps, percent, "o-", color=COLOURS[index], label=name[4:].upper(), ms=4)
    axes.set_ylabel("error rate, %")
    axes.set_ylim(bottom=0)
    axes.legend()
    _time_axis(axes, run)


def _traces(axes: Axes, trial: dict[str, Any], sampling_rate: float) -> None:
    spread = float(np.max([np.ptp(channel) for channel in trial["target"]] or [1.0])) or 1.0
    for row, (channel, truth, output) in enumerate(
        zip(trial["channels"], trial["target"], trial["reconstruction"], strict=True)
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
        axes.text(0, shift + 0.25 * spread, f"channel {channel} ", fontsize=8, ha="right")
    axes.set_yticks([])
    axes.set_xlabel("seconds")
    axes.margins(x=0.01)
    axes.figure.legend(loc="outside upper right", ncols=2)


def _spectra(axes: Axes, spectrum: dict[str, list[float]]) -> None:
    axes.plot(spectrum["hz"], spectrum["target"], color=_ink(axes), alpha=0.6, label="original")
    axes.plot(spectrum["hz"], spectrum["reconstruction"], color=COLOURS[1], label="reconstruction")
    axes.set_xlabel("Hz")
    axes.set_ylabel("power, dB per Hz")
    axes.grid(lw=0.5, alpha=0.6)
    axes.legend()


def _comparison(
    runs: Sequence[RunData], metric: str, unit: str, validation: bool
) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        everything = []
        for index, run in enumerate(runs):
            steps, values = run.series(metric, validation)
            everything += values
            if steps:
                marker = "o" if validation or len(steps) == 1 else None
                colour = _colour(index, len(runs))
                axes.plot(steps, values, marker=marker, ms=4, color=colour, label=run.name)
        if metric.startswith(("loss/", "optim/")) and min(everything) > 0:
            axes.set_yscale("log")
        axes.set_ylabel(unit)
        axes.set_xlabel("applied step")
        axes.grid(axis="y", lw=0.5, alpha=0.6)
        axes.legend()

    return draw
