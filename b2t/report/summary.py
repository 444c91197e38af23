"""The report of a run: one HTML file that needs nothing else, PNGs, and report.json."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from b2t.config.flat import flattened
from b2t.counted import counted
from b2t.log import logger
from b2t.monitor.health import TABLE, verdict
from b2t.records import finite, require_writable, write_atomically
from b2t.report.advice import Advice, advise, with_settings
from b2t.report.figures import Plot, plots_of, plots_of_several, sizing_plot
from b2t.report.page import PAGE
from b2t.report.run_data import RunData, load_run
from b2t.report.sizing import Sizing, SizingPoints, fit_sizing, sizing_points

HTML, JSON = "report.html", "report.json"
_EXAMPLES = 12
_SHOWN_ALERTS = 12


@dataclass(frozen=True)
class RunSummary:
    """What the report says of one run before any figure.

    Attributes:
        name: of the run.
        verdict: healthy, concerning, critical, or unknown before anything was measured.
        reasons: what decided.
        state: how far the run is.
        simulated: whether its data are simulated.
        rows: the monitoring table: label, value, range, grade, remedy, note.
        scores: results of the evaluation: label, value, beside noise.
        scored: what they are results of, and what to keep in mind, a line each.
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
    scored: list[str]
    alerts: list[dict[str, Any]]
    advice: list[Advice]
    problems: list[str]

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """The alerts that ask for something."""
        return [alert for alert in self.alerts if alert.get("severity") in ("warning", "critical")]

    @property
    def measured(self) -> bool:
        """Whether any row of the table has a value."""
        return any(row["grade"] for row in self.rows)


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
            "concerning": row.span("concerning"),
            "grade": row.grade(latest.get(row.metric)),
            "remedy": with_settings(row.remedy, run),
            "note": row.note,
            "decides": row.decides,
        }
        for row in TABLE
    ]
    failed = _failure(run)
    last = run.steps[-1]["step"] if run.steps else 0
    # A run that went on after a critical alert was resumed: the table judges it.
    critical = [a for a in run.alerts if a.get("severity") == "critical" and a["step"] >= last]
    judged = "critical" if critical or failed else verdict(latest) or "unknown"
    interrupted = _interrupted(run)
    if interrupted and judged in ("healthy", "unknown"):
        judged = "concerning"
    reasons = [_told(critical[-1])] if critical else [failed] if failed else []
    outside = [
        f"{row['label']} {row['value']}"
        for row in rows
        if row["decides"] and row["grade"] in ("concerning", "critical")
    ]
    if interrupted:
        reasons.append(
            f"Nothing was written for {duration(run.silent_s)}: it was killed, or it hangs. The "
            "same command goes on from the newest checkpoint."
        )
    if outside:
        reasons.append(f"Outside the healthy range: {'; '.join(outside)}.")
    return RunSummary(
        name=run.name,
        verdict=judged,
        reasons=reasons,
        state=_state(run),
        simulated=run.simulated,
        rows=rows,
        scores=_scores(run.evaluation),
        scored=_scored(run.evaluation),
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
    require_writable(out, "--out")
    out.mkdir(parents=True, exist_ok=True)
    plots = plots_of(runs[0]) if len(runs) == 1 else plots_of_several(runs)
    summaries = [summarize(run) for run in runs]
    points = sizing_points(runs)
    sizing = fit_sizing(points.points)
    if sizing is not None:
        plots.append(sizing_plot(sizing))
    names = [f"{plot.name}.png" for plot in plots]
    for stale in set(_figures_of_earlier(out)) - set(names):
        (out / stale).unlink(missing_ok=True)
    for name, plot in zip(names, plots, strict=True):
        (out / name).write_bytes(plot.png)
    write_atomically(out / HTML, _page(runs, summaries, plots, sizing, points))
    write_atomically(out / JSON, _json(runs, summaries, sizing, names))
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
    points: SizingPoints,
) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    run, alone = runs[0], len(runs) == 1
    return environment.from_string(PAGE).render(
        title=" · ".join(summary.name for summary in summaries),
        summaries=summaries,
        sections=_sections(plots),
        shown_alerts=_SHOWN_ALERTS,
        differences=[] if alone else _differences(runs),
        scores=_scores_side_by_side(summaries),
        examples=_examples(run) if alone else [],
        sizing=_sizing(sizing, points),
        sizing_figure=next((plot for plot in plots if plot.name == "sizing"), None),
        config=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        if alone and run.config
        else "",
        environment=_environment(run) if alone else [],
    )


def _sections(plots: Sequence[Plot]) -> list[tuple[str, list[Plot]]]:
    """Headings and their figures: courses first, then what was evaluated at the end."""
    still = ("usage", "traces", "spectra", "sizing")
    over_time = [plot for plot in plots if plot.name not in still]
    at_end = [plot for plot in plots if plot.name in still[:-1]]
    found = [("Over time", over_time), ("Codes and signals", at_end)]
    return [(heading, figures) for heading, figures in found if figures]


def _differences(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """Keys that may alter weights and are not the same in all runs, with each run's value."""
    kept = ("data", "model", "optim", "phases", "temperature", "codebook_start", "run")
    flat = [flattened({k: v for k, v in run.config.items() if k in kept}) for run in runs]
    keys = sorted({key for one in flat for key in one} - {"run.dir", "data.workers"})
    rows = [(key, [str(one.get(key, "–")) for one in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _scores_side_by_side(summaries: Sequence[RunSummary]) -> list[tuple[str, list[str]]]:
    """Results of the evaluations by run, – where a run was not evaluated."""
    by_run = [{row["label"]: row["value"] for row in one.scores} for one in summaries]
    labels = dict.fromkeys(label for run in by_run for label in run)
    return [(label, [run.get(label, "–") for run in by_run]) for label in labels]


def _figures_of_earlier(out: Path) -> list[str]:
    """Return the PNGs that a report of before says it wrote; others in the folder are not ours."""
    try:
        record = json.loads((out / JSON).read_text("utf-8"))
        figures = record["figures"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    plain = [name for name in figures if isinstance(name, str)] if isinstance(figures, list) else []
    return [name for name in plain if name.endswith(".png") and name == Path(name).name]


def _json(
    runs: Sequence[RunData],
    summaries: Sequence[RunSummary],
    sizing: Sizing | None,
    figures: Sequence[str],
) -> str:
    record = {
        "figures": list(figures),
        "runs": [
            {**asdict(summary), "latest": run.latest(), "evaluation": run.evaluation}
            for run, summary in zip(runs, summaries, strict=True)
        ],
        "codebook_sizing": asdict(sizing) if sizing else None,
    }
    return json.dumps(finite(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _told(alert: dict[str, Any]) -> str:
    """Put an alert in sentences."""
    text = f"{_sentence(alert.get('message', ''))} (step {alert['step']:,})."
    if alert.get("cause"):
        text += f" Likely cause: {alert['cause']}."
    return f"{text} Try: {alert['remedy']}." if alert.get("remedy") else text


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _failure(run: RunData) -> str | None:
    """Why the run ended, where it did not end as it should."""
    state = str(run.status.get("state", ""))
    kind, _, reason = state.partition(": ")
    return _sentence(f"{kind}: {reason}.") if kind in ("failed", "crashed") else None


def _kind(run: RunData) -> str:
    """How the run stands by its own word; a killed process leaves `running` behind."""
    return str(run.status.get("state", "")).partition(":")[0]


def _finished(run: RunData) -> bool:
    last = run.steps[-1]["step"] if run.steps else 0
    return _kind(run) == "finished" or (run.total_steps is not None and last >= run.total_steps)


def _interrupted(run: RunData) -> bool:
    ended = _finished(run) or _kind(run) in ("failed", "crashed", "stopped on request")
    return run.quiet and not ended


def _state(run: RunData) -> str:
    kind = _kind(run)
    how = "killed or hung" if _interrupted(run) else "under way"
    if kind in ("failed", "crashed"):
        how = kind
    elif kind == "stopped on request":
        how = "stopped on request; the same command goes on"
    if not run.steps:
        return f"nothing recorded yet: {how}"
    last, total = run.steps[-1]["step"], run.total_steps
    phase = run.steps[-1].get("phase") or "?"
    time_s = run.steps[-1].get("time_s")
    clock = f" after {duration(time_s)}" if isinstance(time_s, (int, float)) else ""
    if _finished(run):
        return f"finished: {last:,} steps{clock}"
    of_all = "" if total is None else f" of {total:,}"
    return f"step {last:,}{of_all} in phase {phase}{clock}: {how}"


def duration(seconds: float) -> str:
    """Return seconds as a person would say them."""
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


def _scored(evaluation: dict[str, Any]) -> list[str]:
    """Say which trials were scored, and with what reservations."""
    split, rows = evaluation.get("split"), evaluation.get("rows")
    if not split:
        return []
    parts = [f"Split {split}", counted(rows, "trial") if isinstance(rows, int) else ""]
    if evaluation.get("checkpoint") not in (None, "best"):
        parts.append(f"checkpoint {evaluation['checkpoint']}")
    known = evaluation.get("known_sentences")
    if isinstance(known, (int, float)):
        parts.append(f"{100 * known:.1f} % of the target sentences occur in training")
    notes = evaluation.get("notes")
    told = [str(note) for note in notes] if isinstance(notes, list) else []
    told = [evaluation["verdict"], *told] if evaluation.get("verdict") else told
    return [", ".join(filter(None, parts)) + ".", *(f"{n[:1].upper()}{n[1:]}." for n in told)]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _examples(run: RunData) -> list[dict[str, Any]]:
    spoken = [p for p in run.predictions if p.get("target") and p.get("prediction") is not None]
    if len(spoken) <= _EXAMPLES:
        return spoken
    return [spoken[i * len(spoken) // _EXAMPLES] for i in range(_EXAMPLES)]


def _sizing(sizing: Sizing | None, points: SizingPoints) -> dict[str, Any]:
    """Say what runs tell about the number of codes."""
    found: dict[str, Any] = {"text": [], "rows": [], "left_out": points.left_out}
    if sizing is None:
        return found
    sizes = sizing.sizes
    found["rows"] = [
        {
            "codes": f"{k:,}",
            "perplexity": f"{sizing.perplexity(k):,.0f}",
            "share": f"{100 * sizing.perplexity(k) / k:.0f} %",
            "measured": ", ".join(f"{p:,.0f}" for size, p in sizing.points if size == k),
        }
        for k in sorted({sizes[0] // 2, *sizes, sizing.suggestion, 2 * sizes[-1]})
    ]
    curve = f"Perplexity of the least used layer against codes K, fitted to {len(sizes)} sizes"
    if len(sizes) == 1:
        curve = (
            "Perplexity of the least used layer against codes K. One size is measured: the curve "
            f"goes through it, and takes for granted that {100 * sizing.efficiency:.0f} % of K is "
            "reached where nothing limits it"
        )
    if sizing.saturation is None:
        verdict_text = (
            f"At {sizes[-1]:,} codes nothing limits it yet: the data bear that many at least. "
            f"Next: {sizing.suggestion:,} codes."
        )
    else:
        verdict_text = (
            f"It levels off at {sizing.saturation:,.0f}. The data bear about "
            f"{sizing.suggestion:,} codes: with more the least used layer falls below the healthy "
            "range."
        )
    found["text"] = [f"{curve}. {verdict_text}"]
    if len(sizes) < 3:
        found["text"].append(
            "Runs with other model.quantizer.codebook_size make this firmer: "
            "b2t report RUN_A RUN_B RUN_C."
        )
    return found


def _environment(run: RunData) -> list[tuple[str, str]]:
    recorded = [(str(k), str(v)) for k, v in run.environment.items()]
    return recorded or [("reported on", f"Python {platform.python_version()}, {platform.system()}")]
