"""Several runs on the same axes."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes

from b2t.report.figures.axes import legend, log_scale, pick_colour
from b2t.report.figures.draw import Plot, render
from b2t.report.run_data import RunData

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
                colour = pick_colour(index, len(runs))
                axes.plot(steps, values, marker=marker, ms=4, color=colour, label=run.name)
        if metric.startswith(("loss/", "optim/")):
            log_scale(axes, everything)
        if unit == "%":
            axes.set_ylim(bottom=0)
        axes.set_xlim(0, 1.02 * last)
        axes.set_ylabel(unit)
        axes.set_xlabel("applied step")
        axes.grid(axis="y", lw=0.5, alpha=0.6)
        legend(axes)

    return draw
