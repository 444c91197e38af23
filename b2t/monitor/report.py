"""The report of a run: one HTML file that needs nothing else, PNGs, and report.json."""

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from b2t.log import logger
from b2t.monitor.advice import Advice, Sizing, advise, fit_sizing, sizing_points
from b2t.monitor.figures import Plot, plots_of, plots_of_several
from b2t.monitor.health import TABLE, verdict
from b2t.monitor.report_page import PAGE
from b2t.monitor.run_data import RunData, load_run
from b2t.records import write_atomically

HTML, JSON = "report.html", "report.json"
_EXAMPLES = 12


@dataclass(frozen=True)
class RunSummary:
    """What the report says of one run before any figure.

    Attributes:
        name: of the run.
        verdict: healthy, concerning, critical, or unknown before anything was measured.
        reasons: what decided.
        state: how far the run is.
        rows: the monitoring table: label, value, range, grade, remedy, note.
        scores: results of the evaluation: label, value, beside noise.
        alerts: most recent last.
        advice: what to try next.
        problems: files that could not be read.
    """

    name: str
    verdict: str
    reasons: list[str]
    state: str
    simulated: bool
    rows: list[dict[str, Any]]
    scores: list[dict[str, str]]
    alerts: list[dict[str, Any]]
    advice: list[Advice]
    problems: list[str]


def summarize(run: RunData) -> RunSummary:
    """Judge a run by the monitoring table and its alerts."""
    latest = run.latest()
    rows = [
        {
            "label": row.label,
            "metric": row.metric,
            "value": row.show(latest.get(row.metric)),
            "number": latest.get(row.metric),
            "range": row.span(),
            "grade": row.grade(latest.get(row.metric)),
            "remedy": row.remedy,
            "note": row.note,
            "decides": row.decides,
        }
        for row in TABLE
    ]
    critical = [a for a in run.alerts if a.get("severity") == "critical"]
    judged = "critical" if critical else verdict(latest) or "unknown"
    reasons = [str(a.get("message")) for a in critical[-2:]]
    reasons += [
        f"{row['label']} {row['value']}"
        for row in rows
        if row["decides"] and row["grade"] in ("concerning", "critical")
    ]
    return RunSummary(
        name=run.name,
        verdict=judged,
        reasons=reasons,
        state=_state(run),
        simulated=run.simulated,
        rows=rows,
        scores=_scores(run.evaluation),
        alerts=run.alerts,
        advice=advise(run),
        problems=run.problems,
    )


def write_report(folders: Sequence[str | Path], out: Path | None = None) -> Path:
    """Write the report of one run, or of several on the same axes.

    Args:
        folders: run folders.
        out: folder to write; by default `report` in the first run's folder.

    Returns:
        The HTML file.

    Raises:
        UserError: a folder that is no run.
    """
    runs = [load_run(folder) for folder in folders]
    out = out or Path(folders[0]) / ("report" if len(runs) == 1 else "comparison")
    out.mkdir(parents=True, exist_ok=True)
    plots = plots_of(runs[0]) if len(runs) == 1 else plots_of_several(runs)
    summaries = [summarize(run) for run in runs]
    sizing = fit_sizing(sizing_points(runs))
    for stale in out.glob("*.png"):
        stale.unlink()
    for plot in plots:
        (out / f"{plot.name}.png").write_bytes(plot.png)
    write_atomically(out / HTML, _page(runs, summaries, plots, sizing))
    write_atomically(out / JSON, _json(runs, summaries, sizing))
    return out / HTML


def try_write_report(folder: str | Path) -> Path | None:
    """Write the report of a run that is ending; a failure is logged and never raised."""
    try:
        return write_report([folder])
    except Exception as error:  # the run's own end matters more than its report
        kind = type(error).__name__
        logger(__name__).error(
            "the report of %s could not be written (%s: %s); try b2t report %s",
            folder,
            kind,
            error,
            folder,
        )
        return None


def _page(
    runs: Sequence[RunData],
    summaries: Sequence[RunSummary],
    plots: Sequence[Plot],
    sizing: Sizing | None,
) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    run = runs[0]
    return environment.from_string(PAGE).render(
        title=" · ".join(summary.name for summary in summaries),
        summaries=summaries,
        plots=plots,
        examples=_examples(run) if len(runs) == 1 else [],
        sizing=_sizing_rows(sizing),
        config=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        if len(runs) == 1 and run.config
        else "",
        environment=_environment(run),
    )


def _json(runs: Sequence[RunData], summaries: Sequence[RunSummary], sizing: Sizing | None) -> str:
    record = {
        "runs": [
            {**asdict(summary), "latest": run.latest(), "evaluation": run.evaluation}
            for run, summary in zip(runs, summaries, strict=True)
        ],
        "codebook_sizing": asdict(sizing) if sizing else None,
    }
    return json.dumps(_finite(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _state(run: RunData) -> str:
    if not run.steps:
        return "nothing recorded yet"
    last, total = run.steps[-1]["step"], run.total_steps
    phase = run.steps[-1].get("phase") or "?"
    time_s = run.steps[-1].get("time_s")
    clock = f" after {_duration(time_s)}" if isinstance(time_s, (int, float)) else ""
    if total is None:
        return f"step {last:,} in phase {phase}{clock}"
    if last >= total:
        return f"finished: {last:,} steps{clock}"
    state = run.status.get("state")
    if not isinstance(state, str) or state == "running":
        # A killed process leaves "running" behind.
        state = "under way, or killed"
    return f"step {last:,} of {total:,} in phase {phase}{clock}: {state}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _scores(evaluation: dict[str, Any]) -> list[dict[str, str]]:
    found = []
    for name, label in (
        ("per", "phoneme error rate"),
        ("cer", "character error rate"),
        ("wer", "word error rate"),
        ("distinct_ratio", "distinct outputs over distinct targets"),
        ("exact", "sentences without an error"),
    ):
        value = evaluation.get(name)
        if value is not None:
            interval = evaluation.get(f"{name}_interval")
            span = f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f} %" if interval else ""
            found.append(
                {
                    "label": label,
                    "value": f"{100 * value:.1f} %",
                    "interval": span,
                    "noise": _percent(evaluation.get(f"{name}_noise")),
                    "shuffled": _percent(evaluation.get(f"{name}_shuffled")),
                }
            )
    return found


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _examples(run: RunData) -> list[dict[str, Any]]:
    spoken = [p for p in run.predictions if p.get("target") and p.get("prediction") is not None]
    if len(spoken) <= _EXAMPLES:
        return spoken
    return [spoken[i * len(spoken) // _EXAMPLES] for i in range(_EXAMPLES)]


def _sizing_rows(sizing: Sizing | None) -> dict[str, Any] | None:
    if sizing is None:
        return None
    around = sorted({k for k, _ in sizing.points} | {64, 256, 1024, 4096, 8192})
    return {
        "saturation": f"{sizing.saturation:,.0f}",
        "suggestion": f"{sizing.suggestion:,}",
        "points": len(sizing.points),
        "rows": [
            {
                "codes": f"{k:,}",
                "perplexity": f"{sizing.perplexity(k):,.0f}",
                "share": f"{100 * sizing.perplexity(k) / k:.0f} %",
                "measured": ", ".join(f"{p:,.0f}" for size, p in sizing.points if size == k),
            }
            for k in around
        ],
    }


def _environment(run: RunData) -> list[tuple[str, str]]:
    recorded = [(str(k), str(v)) for k, v in run.environment.items()]
    return recorded or [("reported on", f"Python {platform.python_version()}, {platform.system()}")]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
