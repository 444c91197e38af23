"""One picture of an evaluation: error rates beside their controls, codebook use, training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from b2t.counted import counted
from b2t.evaluate.results import Evaluation
from b2t.evaluate.table import SIMULATED, heading

MODEL, NOISE, SHUFFLED, FAINT = "#2563a8", "#b5b9c0", "#dd8a3c", "#8a8f98"


def draw_evaluation(
    result: Evaluation, path: Path, title: str, records: list[dict[str, Any]] | None = None
) -> None:
    """Write the figure as PNG.

    Args:
        result: what to draw.
        path: file to write.
        title: heading.
        records: records of metrics.jsonl; without them there are no curves over training.
    """
    panels: list[Callable[[Axes], None]] = []
    if any(rate is not None for rate in (result.per, result.wer, result.wer_lm)):
        panels.append(lambda axes: _rates(axes, result))
    if result.utilization:
        panels.append(lambda axes: _usage(axes, result))
    losses = series(records or [], "loss/")
    losses.pop("vq_ratio", None)
    if losses:
        panels.append(lambda axes: _losses(axes, losses))
    utilization = series(records or [], "codebook/utilization/")
    if utilization:
        panels.append(lambda axes: _layers(axes, utilization))
    if not panels:
        panels.append(lambda axes: _nothing(axes))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.6 * columns, 0.7 + 3.6 * rows), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    title = f"{heading(title, result)} · {counted(result.rows, 'trial')}"
    if result.snr_db is not None:
        title += f" · SNR {result.snr_db:.1f} dB"
    figure.suptitle(title + (f"\n{SIMULATED}" if result.simulated else ""), fontsize=11)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        panel(axes)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.savefig(path)


def series(
    records: list[dict[str, Any]], prefix: str
) -> dict[str, tuple[list[float], list[float]]]:
    """Collect (steps, values) of every metric that begins with ``prefix``, in order of steps."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        step = record.get("step")
        if not isinstance(step, (int, float)):
            continue
        for name, value in record.items():
            if name.startswith(prefix) and isinstance(value, (int, float)):
                steps, values = found.setdefault(name.removeprefix(prefix), ([], []))
                steps.append(float(step))
                values.append(float(value))
    return found


def _rates(axes: Axes, result: Evaluation) -> None:
    rows = [
        ("PER", result.per, result.per_interval, result.per_noise, None),
        ("CER", result.cer, result.cer_interval, result.cer_noise, None),
        ("WER", result.wer, result.wer_interval, result.wer_noise, result.wer_shuffled),
        (
            "WER (LM)",
            result.wer_lm,
            result.wer_lm_interval,
            result.wer_lm_noise,
            result.wer_lm_shuffled,
        ),
        (
            "WER (joint)",
            result.wer_joint,
            result.wer_joint_interval,
            result.wer_joint_noise,
            result.wer_joint_shuffled,
        ),
    ]
    rows = [row for row in rows if row[1] is not None]
    for position, (_, rate, interval, noise, shuffled) in enumerate(rows):
        _bar(axes, position - 0.27, rate, MODEL, interval)
        _bar(axes, position, noise, NOISE)
        _bar(axes, position + 0.27, shuffled, SHUFFLED)
    for label, colour in (
        ("model", MODEL),
        ("same model fed noise", NOISE),
        ("another trial's signal", SHUFFLED),
    ):
        axes.bar(0, 0, color=colour, label=label)
    axes.set_xticks(range(len(rows)), [row[0] for row in rows])
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
    axes.set_ylabel("error rate, %")
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=3, columnspacing=1)
    axes.set_title("Decoding, with 95 % intervals", fontsize=10)


def _bar(
    axes: Axes,
    position: float,
    rate: float | None,
    colour: str,
    interval: tuple[float, float] | None = None,
) -> None:
    if rate is None:
        return
    axes.bar(position, 100 * rate, width=0.25, color=colour)
    top = rate
    if interval:
        spans = [[100 * max(0.0, rate - interval[0])], [100 * max(0.0, interval[1] - rate)]]
        axes.errorbar(position, 100 * rate, spans, color="black", capsize=3, lw=1)
        top = max(rate, interval[1])
    axes.annotate(
        f"{100 * rate:.0f}",
        (position, 100 * top),
        xytext=(0, 2),
        textcoords="offset points",
        ha="center",
        fontsize=8,
    )


def _usage(axes: Axes, result: Evaluation) -> None:
    size = result.codebook_size or 1
    layers = range(len(result.utilization))
    used = [100 * value for value in result.utilization]
    spread = [100 * value / size for value in result.perplexity]
    axes.bar([q - 0.2 for q in layers], used, width=0.38, color=MODEL, label="codes used")
    axes.bar(
        [q + 0.2 for q in layers], spread, width=0.38, color=SHUFFLED, label="perplexity / codes"
    )
    axes.set_xticks(list(layers))
    axes.set_ylim(0, 118)
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlabel("quantizer layer")
    axes.set_ylabel(f"% of {size:,} codes")
    axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
    axes.set_title("Codebook use on this split", fontsize=10)


def _losses(axes: Axes, losses: dict[str, tuple[list[float], list[float]]]) -> None:
    for name, (steps, values) in sorted(losses.items()):
        emphasis = {"lw": 1.8, "color": "black"} if name == "total" else {"lw": 1.1}
        axes.plot(steps, values, label=name, **emphasis)  # type: ignore[arg-type]
    if all(value > 0 for _, values in losses.values() for value in values):
        axes.set_yscale("log")
    axes.set_xlabel("applied step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    axes.set_title("Training losses", fontsize=10)


def _layers(axes: Axes, utilization: dict[str, tuple[list[float], list[float]]]) -> None:
    from matplotlib import colormaps

    colours = colormaps["viridis"].resampled(len(utilization) + 1)
    for index, name in enumerate(sorted(utilization, key=lambda layer: int(layer))):
        steps, values = utilization[name]
        axes.plot(steps, [100 * v for v in values], label=name, lw=1.3, color=colours(index))
    axes.set_ylim(0, 105)
    axes.set_xlabel("applied step")
    axes.set_ylabel("codes used, %")
    axes.legend(frameon=False, fontsize=8, ncols=4, title="layer", title_fontsize=8)
    axes.set_title("Codebook use while training", fontsize=10)


def _nothing(axes: Axes) -> None:
    axes.axis("off")
    axes.text(0.5, 0.5, "nothing was measured", ha="center", va="center", color=FAINT)
