"""The live state of a run on a terminal."""

from itertools import pairwise

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from b2t.monitor.report import RunSummary, summarize
from b2t.monitor.run_data import RunData

_STYLE = {"healthy": "green", "concerning": "yellow", "critical": "bold red", "unknown": "dim"}
_SEVERITY = {"critical": "bold red", "warning": "yellow", "info": "cyan"}
_BARS = "▁▂▃▄▅▆▇█"


def render_state(run: RunData, width: int = 40) -> RenderableType:
    """Return verdict, monitoring table, courses of the main metrics, and the last alerts.

    Args:
        run: the run as it is now.
        width: characters of a course.
    """
    summary = summarize(run)
    head = Text.assemble(
        (f"{summary.name}  "),
        (summary.verdict, _STYLE[summary.verdict]),
        f"  {summary.state}",
    )
    parts: list[RenderableType] = [head, _table(summary), _courses(run, width)]
    parts += [
        Text(
            f"step {alert['step']:,} {alert.get('message', '')}",
            _SEVERITY.get(str(alert.get("severity")), ""),
        )
        for alert in run.alerts[-4:]
    ]
    parts += [Text(problem, "dim") for problem in summary.problems]
    return Group(*parts)


def sparkline(values: list[float], width: int = 40) -> str:
    """Draw the course of ``values`` in ``width`` characters, each the mean of its part."""
    if not values:
        return ""
    count = min(width, len(values))
    bounds = [round(i * len(values) / count) for i in range(count + 1)]
    parts = [values[a:b] for a, b in pairwise(bounds)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    if high <= low:
        return _BARS[3] * count
    steps = len(_BARS) - 1
    return "".join(_BARS[round(steps * (mean - low) / (high - low))] for mean in means)


def _table(summary: RunSummary) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("metric", "value", "healthy", "grade"):
        table.add_column(heading)
    for row in summary.rows:
        grade = row["grade"] or "–"
        style = _STYLE.get(grade, "dim") if row["decides"] else "dim"
        table.add_row(escape(row["label"]), row["value"], row["range"], Text(grade, style))
    return table


def _courses(run: RunData, width: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    losses = [(n, False) for n in run.names("loss/") if n != "loss/vq_ratio"]
    others = [("reconstruction/snr_db", False), ("codebook/utilization_worst", False)]
    decoded = [("val/loss", True), ("val/wer", True), ("val/per", True)]
    for name, validation in (*losses, *others, *decoded):
        _, values = run.series(name, validation)
        if values:
            table.add_row(name, f"{values[-1]:.4g}", sparkline(values, width))
    return table
