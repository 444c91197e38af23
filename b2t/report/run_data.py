"""Everything a run folder says about a run, however the run ended."""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from b2t.errors import UserError
from b2t.records import read_jsonl
from b2t.report.sound import is_number, sound_evaluation, sound_traces
from b2t.run_files import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    EVALUATION_FILE,
    METRICS_FILE,
    PREDICTIONS_FILE,
    STATUS_FILE,
    TRACES_FILE,
    USAGE_FILE,
)

_PATIENCE_S = 300.0
"""Shortest silence that is worth a remark: validation and decoding write nothing meanwhile."""

_START_S = 1800.0
"""The same before the first log step: reading large data takes its time."""

_HEAD = ("step", "phase", "time_s", "non_finite")


@dataclass
class RunData:
    """What was found in a run folder; whatever is missing is empty.

    Attributes:
        folder: the run folder.
        steps: records of log steps, in order.
        evaluations: records of validations, in order.
        alerts: alerts with `step` and `phase`.
        config: the resolved configuration.
        evaluation: `evaluation.json`.
        predictions: records of `predictions.jsonl`.
        usage: frames per code [Q][K] of the evaluated split.
        traces: what `reconstruction.json` holds.
        model: config of the best model so far.
        environment: what `environment.json` holds.
        status: what `status.json` holds: `state`, `step`, `time`.
        silent_s: seconds since the run last wrote metrics (or, before the first, its
            configuration).
        problems: what could not be read.
    """

    folder: Path
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    usage: list[list[int]] = field(default_factory=list)
    traces: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    silent_s: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the run: its folder."""
        return self.folder.resolve().name

    @property
    def phases(self) -> list[tuple[str, float]]:
        """Phases in order, each with the last recorded step before it."""
        found: list[tuple[str, float]] = []
        before = 0.0
        for record in self.steps:
            phase = record.get("phase")
            if isinstance(phase, str) and (not found or found[-1][0] != phase):
                found.append((phase, before))
            before = record["step"]
        return found

    @property
    def total_steps(self) -> int | None:
        """Applied steps that the configuration asks for."""
        phases = self.config.get("phases")
        if not isinstance(phases, list):
            return None
        steps = [phase.get("steps", 0) for phase in phases if isinstance(phase, dict)]
        return sum(filter(is_number, steps)) or None

    @property
    def simulated(self) -> bool:
        """Whether the run says that its data are simulated."""
        said = (
            self.evaluation.get("simulated"),
            self.model.get("simulated_data"),
            self.environment.get("simulated_data"),
        )
        return any(said)

    @property
    def quiet(self) -> bool:
        """Whether it has been silent for far longer than between its log steps."""
        times = [r["time_s"] for r in self.steps[-20:] if is_number(r.get("time_s"))]
        longest = max((b - a for a, b in pairwise(times)), default=0.0)
        patience = _PATIENCE_S if self.steps else _START_S
        return self.silent_s > max(patience, 5 * longest)

    def setting(self, key: str) -> Any:
        """Return the value of a dotted key of the configuration, None where it is not there."""
        value: Any = self.config
        for part in key.split("."):
            if isinstance(value, list) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            elif isinstance(value, dict):
                value = value.get(part)
            else:
                return None
        return value

    def latest(self, names: Iterable[str] | None = None) -> dict[str, float]:
        """Return the most recent value of every metric of the log steps (None: not finite)."""
        found: dict[str, Any] = {}
        for record in self.steps:
            found.update({k: v for k, v in record.items() if k not in _HEAD and is_number(v)})
            lost = record.get("non_finite")
            names_lost = lost if isinstance(lost, list) else []
            found.update({name: float("nan") for name in names_lost if isinstance(name, str)})
        if found.get("loss/reconstruction") and "loss/commitment" in found:
            ratio = found["loss/commitment"] / found["loss/reconstruction"]
            found.setdefault("loss/vq_ratio", ratio)
        wanted = set(names) if names is not None else found.keys()
        return {name: float(value) for name, value in found.items() if name in wanted}

    def series(self, name: str, evaluations: bool = False) -> tuple[list[float], list[float]]:
        """Return (steps, values) of one metric."""
        records = self.evaluations if evaluations else self.steps
        pairs = [(r["step"], r[name]) for r in records if is_number(r.get(name))]
        return [float(step) for step, _ in pairs], [float(value) for _, value in pairs]

    def names(self, prefix: str, evaluations: bool = False) -> list[str]:
        """Return the metrics that begin with ``prefix``, numbers in the order of numbers."""
        records = self.evaluations if evaluations else self.steps
        found = {name for r in records for name, v in r.items() if is_number(v)}
        return sorted((n for n in found if n.startswith(prefix)), key=_natural)


def load_run(folder: str | Path) -> RunData:
    """Read a run folder: finished, running, crashed or empty.

    Raises:
        UserError: no such folder, or nothing of a run in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such run folder; expected the run.dir of a training, which holds "
            "config.yaml and metrics.jsonl"
        )
    if not any((folder / name).exists() for name in (CONFIG_FILE, METRICS_FILE)):
        raise UserError(
            f"{folder}: not a run folder: it has neither config.yaml nor metrics.jsonl, which "
            "training writes when it starts"
        )
    run = RunData(folder)
    _read_metrics(run)
    run.config = _config(run, _read(run, CONFIG_FILE, yaml.safe_load))
    run.evaluation, lost = sound_evaluation(_read(run, EVALUATION_FILE, json.loads))
    run.problems += lost
    run.model = _read(run, "checkpoints/best/config.json", json.loads)
    run.environment = _read(run, ENVIRONMENT_FILE, json.loads)
    run.status = _read(run, STATUS_FILE, json.loads)
    run.traces, lost = sound_traces(_read(run, TRACES_FILE, json.loads))
    run.problems += lost
    run.usage = _table(_read(run, USAGE_FILE, json.loads).get("counts"))
    written = [folder / name for name in (METRICS_FILE, CONFIG_FILE)]
    newest = next(path for path in written if path.exists())
    run.silent_s = max(0.0, time.time() - newest.stat().st_mtime)
    predictions = read_jsonl(folder / PREDICTIONS_FILE)
    run.predictions = predictions.records
    if predictions.malformed:
        run.problems.append(_malformed(PREDICTIONS_FILE, predictions.malformed))
    return run


def _read_metrics(run: RunData) -> None:
    found = read_jsonl(run.folder / METRICS_FILE)
    if found.malformed:
        run.problems.append(_malformed(METRICS_FILE, found.malformed))
    for record in found.records:
        if not is_number(record.get("step")):
            continue
        if isinstance(record.get("alert"), dict):
            place = {"step": record["step"], "phase": record.get("phase")}
            run.alerts.append({**record["alert"], **place})
        elif any(name.startswith("val/") for name in record):
            run.evaluations.append(record)
        else:
            run.steps.append(record)
    for records in (run.steps, run.evaluations, run.alerts):
        records.sort(key=lambda record: record["step"])


def _read(run: RunData, name: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Return the object that a file holds; empty where it is not there or damaged, and says so."""
    path = run.folder / name
    if not path.is_file():
        return {}
    try:
        value = parse(path.read_text("utf-8"))
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        reason = str(error).strip().split("\n")[0]
        run.problems.append(f"{name} cannot be read ({reason})")
        return {}
    if not isinstance(value, dict):
        run.problems.append(f"{name} is left out, as it holds no object")
        return {}
    return value


def _config(run: RunData, config: dict[str, Any]) -> dict[str, Any]:
    phases = config.get("phases", [])
    if isinstance(phases, list) and all(isinstance(phase, dict) for phase in phases):
        return config
    run.problems.append("config.yaml: phases is left out, as it is no list of phases")
    return {key: value for key, value in config.items() if key != "phases"}


def _table(value: Any) -> list[list[int]]:
    if not isinstance(value, list) or not value:
        return []
    same = all(isinstance(row, list) and row and len(row) == len(value[0]) for row in value)
    return value if same and all(is_number(x) for row in value for x in row) else []


def _malformed(name: str, lines: list[int]) -> str:
    shown = ", ".join(map(str, lines[:5])) + (" …" if len(lines) > 5 else "")
    many = "s" if len(lines) > 1 else ""
    return f"{name}: {len(lines)} unreadable line{many} left out (line {shown})"


def _natural(name: str) -> tuple[str, float]:
    head, _, tail = name.rpartition("/")
    return (head, float(tail)) if tail.isdigit() else (name, -1.0)
