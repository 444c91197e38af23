"""One picture of an audit: how channels move by session, their spectrum, frames, shared texts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from b2t.evaluate.audit.checks import Audit, Subject, verdict
from b2t.evaluate.audit.findings import Finding
from b2t.evaluate.audit.labels import FRAMES
from b2t.evaluate.audit.line_noise import MAINS
from b2t.evaluate.audit.sentences import SENTENCES

_EXACT, _NEAR, _LINE = "#2563a8", "#9bbbe0", "#dd8a3c"
_MOST_SESSIONS = 40


def draw_audit(subject: Subject, found: Audit, path: Path, title: str) -> None:
    """Write the figure.

    Args:
        subject: what was looked at.
        found: what came out.
        path: file to write.
        title: heading.
    """
    panels: list[Callable[[Axes], None]] = []
    if found.deviations:
        panels.append(lambda axes: _deviations(axes, subject, found))
    if found.spectra:
        panels.append(lambda axes: _spectra(axes, found))
    frames = next((f for f in found.findings if f.check == FRAMES and f.numbers), None)
    if frames is not None:
        panels.append(lambda axes: _frames(axes, frames))
    pairs = [f for f in found.findings if f.check == SENTENCES and f.numbers]
    if pairs:
        panels.append(lambda axes: _sentences(axes, pairs))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.6 * columns, 0.7 + 3.6 * rows), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}: {verdict(found.findings)}", fontsize=10, wrap=True)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        panel(axes)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.savefig(path)


def _deviations(axes: Axes, subject: Subject, found: Audit) -> None:
    names = list(found.deviations)[:_MOST_SESSIONS]
    table = np.stack([found.deviations[name] for name in names])
    levels = np.where(table > 0, np.log10(np.where(table > 0, table, 1.0)), np.nan)
    image = axes.imshow(levels, aspect="auto", interpolation="nearest", cmap="viridis")
    axes.figure.colorbar(image, ax=axes, label="log₁₀ standard deviation")
    axes.set_facecolor("#c23b3b")
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set_xlabel(f"channel ({len(subject.channels)}); red never moves")
    axes.set_title("how far channels move, by session", fontsize=9, loc="left")


def _spectra(axes: Axes, found: Audit) -> None:
    whole = np.median(np.concatenate(list(found.spectra.values()), axis=1), axis=1)
    axes.semilogy(found.frequencies[1:], whole[1:], color=_EXACT, linewidth=1)
    for line in MAINS:
        if line < found.frequencies[-1]:
            axes.axvline(line, color=_LINE, linewidth=0.8, linestyle=":")
    axes.set_xlabel("frequency (Hz); dotted: mains")
    axes.set_ylabel("power, median channel")
    axes.set_title("spectrum", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def _frames(axes: Axes, finding: Finding) -> None:
    largest = finding.numbers["patches"]
    shares = [100 * float(share) for share in largest]
    axes.barh(range(len(shares)), list(largest.values()), color=_EXACT)
    axes.set_yticks(range(len(shares)), [f"{share:g} % of trials" for share in shares])
    axes.set_xlabel("largest patch (bins) with frames enough for CTC")
    axes.set_title(FRAMES, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def _sentences(axes: Axes, pairs: list[Finding]) -> None:
    exact = [100 * f.numbers["exact_share"] for f in pairs]
    near = [100 * f.numbers["near_share"] for f in pairs]
    places = range(len(pairs))
    axes.bar(places, exact, color=_EXACT, label="word for word")
    axes.bar(places, near, bottom=exact, color=_NEAR, label="nearly")
    axes.set_xticks(
        places, [f"{f.numbers['splits'][1]} in {f.numbers['splits'][0]}" for f in pairs]
    )
    axes.set_ylabel("trials with a shared sentence, %")
    axes.set_ylim(0, 105)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title("sentences that splits share", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
