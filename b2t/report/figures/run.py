"""All figures of one run."""

from collections.abc import Callable

from matplotlib.axes import Axes

from b2t.report.figures.codes import draw_layers, draw_usage, of_codes
from b2t.report.figures.draw import Plot, render
from b2t.report.figures.signals import draw_spectra, draw_traces, trial_shown
from b2t.report.figures.training import (
    draw_decoding,
    draw_gradients,
    draw_learning_rates,
    draw_losses,
    draw_movement,
    draw_scale,
    draw_shares,
    draw_snr,
    scale_moves,
)
from b2t.report.run_data import RunData

Candidate = tuple[str, str, bool, Callable[[Axes], None]]
"""File name, heading, whether the run has data for it, and what draws it."""


def plots_of(run: RunData) -> list[Plot]:
    """Draw everything that the run has data for."""
    candidates = [*_of_codebooks(run), *_of_optimization(run), *_of_outputs(run)]
    return [render(name, title, draw) for name, title, there, draw in candidates if there]


def _of_codebooks(run: RunData) -> list[Candidate]:
    return [
        (
            "utilization",
            "Codes in use, by layer",
            bool(run.names("codebook/utilization/")),
            lambda axes: draw_layers(axes, run, "codebook/utilization/", 100.0, "codes in use, %"),
        ),
        (
            "perplexity",
            "Perplexity, by layer" + of_codes(run),
            bool(run.names("codebook/perplexity/")),
            lambda axes: draw_layers(axes, run, "codebook/perplexity/", 1.0, "codes"),
        ),
        (
            "usage",
            f"Usage of each code on {run.evaluation.get('split', 'the evaluated split')}",
            bool(run.usage),
            lambda axes: draw_usage(axes, run.usage),
        ),
    ]


def _of_optimization(run: RunData) -> list[Candidate]:
    losses = [n for n in run.names("loss/") if n != "loss/vq_ratio"]
    return [
        ("losses", "Losses", bool(losses), lambda axes: draw_losses(axes, run, losses)),
        (
            "loss_shares",
            "Shares of the total loss",
            bool(run.names("loss_share/")),
            lambda axes: draw_shares(axes, run),
        ),
        (
            "gradients",
            "Gradient norms before clipping",
            bool(run.names("optim/grad_norm")),
            lambda axes: draw_gradients(axes, run),
        ),
        (
            "learning_rates",
            "Learning rates",
            bool(run.names("optim/lr/")),
            lambda axes: draw_learning_rates(axes, run),
        ),
        (
            "loss_scale",
            "Loss scale and skipped steps",
            scale_moves(run),
            lambda axes: draw_scale(axes, run),
        ),
    ]


def _of_outputs(run: RunData) -> list[Candidate]:
    redrawn = "signal_decoder" not in (run.evaluation.get("untrained") or [])
    return [
        (
            "snr",
            "Reconstruction SNR",
            bool(run.names("reconstruction/snr_db") or run.names("val/snr_db", True)),
            lambda axes: draw_snr(axes, run),
        ),
        (
            "movement",
            "Movement of codes and revivals",
            bool(run.names("ema/movement")) or any(run.series("codebook/revived")[1]),
            lambda axes: draw_movement(axes, run),
        ),
        (
            "decoding",
            "Error rates on validation trials",
            bool([n for n in ("val/wer", "val/cer", "val/per") if run.series(n, True)[0]]),
            lambda axes: draw_decoding(axes, run),
        ),
        (
            "traces",
            "Original and reconstruction" + trial_shown(run),
            redrawn and bool(run.traces.get("trials")),
            lambda axes: draw_traces(axes, run.traces["trials"][0], run.traces["sampling_rate"]),
        ),
        (
            "spectra",
            "Spectra of original and reconstruction",
            redrawn and bool(run.traces.get("spectrum")),
            lambda axes: draw_spectra(axes, run.traces["spectrum"]),
        ),
    ]
