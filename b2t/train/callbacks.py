"""The hooks that every run has on rank 0: console, files, report."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from b2t.config import PhaseConfig
from b2t.errors import UserError
from b2t.log import logger
from b2t.model.objectives import OBJECTIVES
from b2t.monitor.alerts import Alert
from b2t.monitor.context import StepContext
from b2t.monitor.sinks import ConsoleSink, WebhookSink
from b2t.records import JsonlSink, rewind, write_atomically
from b2t.report.summary import try_write_report
from b2t.run_files import ENVIRONMENT_FILE, METRICS_FILE, STATUS_FILE
from b2t.train.callback import Callback, Run
from b2t.train.environment import environment


class ProgressBar(Callback):
    """A bar with the time left, on a terminal."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_start(self, trainer: Run) -> None:
        """Show the bar."""
        self._bar = tqdm(
            total=trainer.config.total_steps,
            initial=trainer.progress.planned(trainer.config.phases),
            unit="step",
            desc=trainer.phase.name,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            smoothing=0.05,
        )

    def on_step(self, trainer: Run, context: StepContext) -> None:
        """Advance."""
        assert self._bar is not None
        self._bar.set_description(trainer.phase.name, refresh=False)
        self._bar.update(trainer.progress.planned(trainer.config.phases) - self._bar.n)

    def on_end(self, trainer: Run) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


class Console(Callback):
    """One readable line per log step, evaluation, phase and alert."""

    def __init__(self) -> None:
        self._alerts = ConsoleSink()

    def on_log(self, trainer: Run, record: dict[str, float]) -> None:
        """Print the step."""
        logger().info(step_line(trainer, record))

    def on_eval(self, trainer: Run, metrics: dict[str, float]) -> None:
        """Print the validation."""
        logger().info(evaluation_line(trainer.progress.step, metrics))

    def on_phase_end(self, trainer: Run, phase: PhaseConfig) -> None:
        """Say that the phase is over."""
        logger().info("phase %s ended after %d steps", phase.name, trainer.progress.phase_step)

    def on_alert(self, trainer: Run, alert: Alert) -> None:
        """Print the alert with its likely cause and remedy."""
        self._alerts.send(alert, trainer.config.run.dir.name)


class Webhook(Callback):
    """Posts alerts to the webhook that the environment names, if it names one."""

    def __init__(self) -> None:
        self._sink = WebhookSink()

    def on_alert(self, trainer: Run, alert: Alert) -> None:
        """Post it."""
        self._sink.send(alert, trainer.config.run.dir.name)

    def on_end(self, trainer: Run) -> None:
        """Wait for posts under way."""
        self._sink.close()


class MetricsFile(Callback):
    """`metrics.jsonl`: one object per log step and evaluation."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS_FILE
        self._sink: JsonlSink | None = None
        self._started = time.time()
        self._lost = 0

    def on_start(self, trainer: Run) -> None:
        """Drop records that a resumed run writes again, and open the file."""
        try:
            rewind(self.path, trainer.progress.step)
            self._sink = JsonlSink(self.path)
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); free some space, or choose "
                "another run.dir"
            ) from None
        self._started = time.time() - trainer.progress.seconds

    def on_log(self, trainer: Run, record: dict[str, float]) -> None:
        """Write the step."""
        self._write(trainer, record)

    def on_eval(self, trainer: Run, metrics: dict[str, float]) -> None:
        """Write the validation."""
        self._write(trainer, metrics)

    def on_alert(self, trainer: Run, alert: Alert) -> None:
        """Write the alert."""
        self._write(trainer, {"alert": alert.to_dict()})

    def on_end(self, trainer: Run) -> None:
        """Close the file."""
        if self._sink is not None:
            self._sink.close()

    def _write(self, trainer: Run, values: dict[str, Any]) -> None:
        assert self._sink is not None
        head = {
            "step": trainer.progress.step,
            "phase": trainer.phase.name,
            "time_s": round(time.time() - self._started, 3),
        }
        lost = {"lost_records": self._lost} if self._lost else {}
        try:
            self._sink.write({**head, **lost, **values})
        except OSError as error:
            if not self._lost:
                logger(__name__).error(
                    "%s cannot be written (%s): training goes on, and records are lost until "
                    "there is room",
                    self.path,
                    error.strerror,
                )
            self._lost += 1
            return
        if lost:
            logger(__name__).warning(
                "%s is written again: %d records were lost", self.path, self._lost
            )
            self._lost = 0


class RunFiles(Callback):
    """`environment.json` and `status.json`: where a run runs, and whether it still does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_start(self, trainer: Run) -> None:
        """Record versions and devices, and that the run has begun."""
        facts = {
            "ranks": trainer.ranks.world,
            "precision": trainer.ds_file.precision,
            "simulated_data": trainer.materials.info.simulated,
        }
        self._write(ENVIRONMENT_FILE, environment(trainer.ranks.device, facts))
        self._status(trainer)

    def on_end(self, trainer: Run) -> None:
        """Record how it ended."""
        self._status(trainer)

    def _status(self, trainer: Run) -> None:
        step = trainer.progress.step
        self._write(STATUS_FILE, {"state": trainer.outcome, "step": step, "time": time.time()})

    def _write(self, name: str, values: dict[str, Any]) -> None:
        try:
            write_atomically(self.folder / name, json.dumps(values, indent=1) + "\n")
        except OSError as error:
            logger(__name__).error("%s could not be written: %s", self.folder / name, error)


class Report(Callback):
    """The HTML report: on alerts in the background, and when the run ends, however it does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: subprocess.Popen[bytes] | None = None

    def on_alert(self, trainer: Run, alert: Alert) -> None:
        """Write it in another process, unless one is still at it."""
        busy = self._writer is not None and self._writer.poll() is None
        if alert.severity == "warning" and not busy:
            command = [sys.executable, "-m", "b2t.cli", "report", str(self.folder)]
            self._writer = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )

    def on_end(self, trainer: Run) -> None:
        """Write it; not when a scheduler waits for the run to leave."""
        if self._writer is not None:
            self._writer.wait()
        if trainer.outcome == "stopped on request":
            return
        path = try_write_report(self.folder)
        if path is not None:
            logger(__name__).info("report %s", path)


def step_line(trainer: Run, record: dict[str, float]) -> str:
    """Put the metrics of one log step in a line, with units."""
    parts = " ".join(
        f"{loss.short} {record[f'loss/{name}']:.3f}"
        for name, loss in OBJECTIVES.items()
        if f"loss/{name}" in record
    )
    fields = [
        f"step {trainer.progress.step:,}/{trainer.config.total_steps:,}",
        trainer.phase.name,
        f"loss {record['loss/total']:.3f} ({parts})",
    ]
    if "reconstruction/snr_db" in record:
        fields.append(f"SNR {record['reconstruction/snr_db']:.1f} dB")
    if "codebook/utilization_worst" in record:
        fields.append(f"codes in use ≥ {100 * record['codebook/utilization_worst']:.0f} %")
    fields.append(f"lr {max(trainer.engine.learning_rates().values()):.1e}")
    if record.get("optim/grad_norm") is not None:
        fields.append(f"grad {record['optim/grad_norm']:.2f}")
    if trainer.ds_file.precision == "fp16":
        fields.append(f"scale {record['optim/loss_scale']:.0f}")
    if record["optim/skipped_steps"]:
        fields.append(f"skipped {record['optim/skipped_steps']:.0f}")
    fields += [
        f"{record['time/step_s']:.2f} s/step",
        f"{record['throughput/frames_per_s']:,.0f} frames/s",
        f"left {_clock(trainer.seconds_left(record['time/step_s']))}",
    ]
    return " · ".join(fields)


def evaluation_line(step: int, metrics: dict[str, float]) -> str:
    """Put the metrics of one validation in a line, with units."""
    percent = {"wer": "WER", "cer": "CER", "per": "PER", "token_accuracy": "next token right"}
    fields = [f"step {step:,} validation"]
    if "val/loss" in metrics:
        fields.append(f"loss {metrics['val/loss']:.3f}")
    for name, loss in OBJECTIVES.items():
        if f"val/{name}" in metrics:
            fields.append(f"{loss.short} {metrics[f'val/{name}']:.3f}")
    if metrics.get("val/snr_db") is not None:
        fields.append(f"SNR {metrics['val/snr_db']:.1f} dB")
    for name, label in percent.items():
        if metrics.get(f"val/{name}") is not None:
            fields.append(f"{label} {100 * metrics[f'val/{name}']:.1f} %")
    if "val/distinct_ratio" in metrics:
        fields.append(f"distinct outputs {metrics['val/distinct_ratio']:.2f}")
    return " · ".join(fields)


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
