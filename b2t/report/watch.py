"""The live state of a run on a terminal."""

from itertools import pairwise

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from b2t.report.run_data import RunData
from b2t.report.summary import RunSummary, duration, summarize

_STYLE = {"healthy": "green", "concerning": "yellow", "critical": "bold red", "unknown": "dim"}
_SEVERITY = {"critical": "bold red", "warning": "yellow", "info": "cyan"}
_SHOWN_ALERTS = 4
_BARS = "▁▂▃▄▅▆▇█"


def render_state(run: RunData, width: int = 40) -> RenderableType:
    """Return verdict, pace, monitoring table, courses of the main metrics, alerts, and advice.

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
    parts: list[RenderableType] = [head]
    pace = _pace(run)
    if pace:
        parts.append(Text(pace, "dim"))
    parts += [_table(summary), _courses(run, width)]
    for alert in run.alerts[-_SHOWN_ALERTS:]:
        severity = str(alert.get("severity"))
        line = f"step {alert['step']:,} {severity}: {alert.get('message', '')}"
        parts.append(Text(line, _SEVERITY.get(severity, "")))
    if summary.verdict in ("concerning", "critical"):
        parts += [Text(f"try: {advice.remedy}") for advice in summary.advice[:2]]
    parts += [Text(problem, "dim") for problem in summary.problems]
    return Group(*parts)


def _pace(run: RunData) -> str:
    """Seconds per step, frames per second, and the time left where the run is under way."""
    latest = run.latest()
    step_s, frames = latest.get("time/step_s"), latest.get("throughput/frames_per_s")
    if step_s is None:
        return ""
    parts = [f"{step_s:.3g} s/step"]
    if frames is not None:
        parts.append(f"{frames:,.0f} frames/s")
    last, total = run.steps[-1]["step"], run.total_steps
    if total is not None and last < total and run.status.get("state", "running") == "running":
        parts.append(f"about {duration(step_s * (total - last))} left")
    return " · ".join(parts)


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
