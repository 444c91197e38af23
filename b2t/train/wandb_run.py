"""Weights & Biases: our own run, with figures at evaluations and tables after decodings."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from b2t.config import LogConfig, PhaseConfig
from b2t.errors import UserError
from b2t.evaluate.results import Prediction
from b2t.log import logger
from b2t.monitor.alerts import Alert
from b2t.monitor.monitors import Monitors
from b2t.monitor.reconstruction import ReconstructionMonitor
from b2t.monitor.rvq import RVQMonitor
from b2t.report import figures
from b2t.run_files import BEST
from b2t.train.callback import Callback, Run

UNITS = {
    "codebook/*_trend": "per 1,000 updates",
    "*_fraction": "1",
    "*_db*": "dB",
    "time/*_s": "s",
    "memory/*_gib": "GiB",
    "throughput/frames_per_s": "valid latent frames/s",
    "throughput/steps_per_s": "applied steps/s",
    "codebook/utilization*": "1",
    "codebook/perplexity*": "codes",
    "codebook/entropy_nats*": "nat",
    "loss_trend/*": "per 1,000 steps",
    "loss_share/*": "1",
    "ema/revived*": "codes per update",
    "val/wer": "1",
    "val/cer": "1",
    "val/per": "1",
}
"""Units of metrics by pattern, the first that fits, kept in the run's config: WandB has no place of
its own for them."""

_LESS_IS_BETTER = ("loss/total", "val/loss", "val/reconstruction", "val/wer", "val/cer", "val/per")
_MORE_IS_BETTER = ("val/snr_db", "val/token_accuracy", "val/distinct_ratio")


class Wandb(Callback):
    """Metrics at log steps, figures at evaluations, a table after each decoding, alerts.

    A resume goes on in the same run: its id is part of the checkpoint.

    Args:
        config: section `log`.
        folder: run folder; WandB's files go below it.
        monitors: whose figures are drawn; None draws none.
    """

    key = "Wandb"

    def __init__(self, config: LogConfig, folder: Path, monitors: Monitors | None = None) -> None:
        self.config = config.wandb
        self.folder = folder
        self.monitors = {} if monitors is None else monitors.monitors
        self.run_id: str | None = None
        self._drawn_at = -1
        self._run: Any = None

    def on_start(self, trainer: Run) -> None:
        """Open the run, or the same one again.

        Raises:
            UserError: WandB refuses, for want of a login or a network.
        """
        import wandb

        self.run_id = self.run_id or uuid.uuid4().hex[:8]
        section = self.config
        try:
            self._run = wandb.init(
                project=section.project,
                entity=section.entity,
                group=section.group,
                name=section.name or self.folder.name,
                tags=section.tags or None,
                dir=str(self.folder),
                id=self.run_id,
                resume="allow",
                config={
                    "b2t": trainer.config.model_dump(mode="json"),
                    "deepspeed": trainer.ds_file.raw,
                    "simulated_data": trainer.materials.info.simulated,
                    "units": UNITS,
                },
                allow_val_change=True,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"log.wandb.enabled: WandB could not start ({error}); log in with `wandb login`, "
                "or set WANDB_MODE=offline and upload later with `wandb sync`"
            ) from None
        self._define_metrics()
        offline = self._run.offline
        where = f"offline in {os.path.relpath(self._run.dir)}" if offline else self._run.url
        logger(__name__).info("wandb run %s (%s)", self.run_id, where)

    def on_log(self, trainer: Run, record: dict[str, float]) -> None:
        """Log the step."""
        self._run.log({"step": trainer.progress.step, **record})

    def on_eval(self, trainer: Run, metrics: dict[str, float]) -> None:
        """Log the validation, the figures of this step, and what the best model is."""
        step = trainer.progress.step
        images = self._figures() if step != self._drawn_at else {}
        self._drawn_at = step
        self._run.log({"step": step, **metrics, **images})
        best = trainer.progress.best
        if best.best is not None:
            metric = trainer.config.checkpoint.best_metric
            self._run.summary["best/metric"] = metric
            self._run.summary["best/value"] = best.best
            self._run.summary["best/step"] = best.best_step
            self._run.summary["best/phase"] = trainer.phase.name
            self._run.summary["best/folder"] = str(trainer.store.folder / BEST)

    def on_decode(self, trainer: Run, predictions: Sequence[Prediction]) -> None:
        """Log what was meant and what was said, row by row."""
        import wandb

        spoken = [p for p in predictions if p.prediction is not None]
        if not spoken:
            return
        table = wandb.Table(columns=["phase", "step", "row", "reference", "hypothesis"])
        for p in spoken:
            table.add_data(trainer.phase.name, trainer.progress.step, p.row, p.target, p.prediction)
        self._run.log({"step": trainer.progress.step, f"predictions/{trainer.phase.name}": table})

    def on_phase_end(self, trainer: Run, phase: PhaseConfig) -> None:
        """Keep how the phase ended."""
        best = trainer.progress.best
        self._run.summary[f"phases/{phase.name}/steps"] = trainer.progress.phase_step
        self._run.summary[f"phases/{phase.name}/best"] = best.best
        self._run.summary[f"phases/{phase.name}/best_step"] = best.best_step

    def on_alert(self, trainer: Run, alert: Alert) -> None:
        """Pass the alert on."""
        levels = {"critical": "ERROR", "warning": "WARN"}
        level = levels.get(alert.severity, "INFO")
        self._run.alert(title=alert.message[:64], text=alert.text(), level=level)

    def on_end(self, trainer: Run) -> None:
        """Close the run, as failed where training failed."""
        if self._run is not None:
            ended = trainer.outcome in ("finished", "stopped on request")
            self._run.finish(exit_code=0 if ended else 1)

    def state_dict(self) -> dict[str, Any]:
        """Keep the id."""
        return {"run_id": self.run_id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Use the id again."""
        self.run_id = state["run_id"]

    def _define_metrics(self) -> None:
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        for names, summary in ((_LESS_IS_BETTER, "min,last"), (_MORE_IS_BETTER, "max,last")):
            for name in names:
                self._run.define_metric(name, step_metric="step", summary=summary)

    def _figures(self) -> dict[str, Any]:
        """Images of what the monitors hold; reads the device."""
        found: dict[str, bytes] = {}
        quantizer = self.monitors.get("quantizer")
        usage = quantizer.usage.usage() if isinstance(quantizer, RVQMonitor) else None
        if usage is not None and isinstance(quantizer, RVQMonitor):
            found["figures/usage"] = figures.usage_png(usage.tolist())
            if len(usage) > 1:
                matrix = quantizer.usage.correlation().tolist()
                found["figures/layer_correlation"] = figures.correlation_png(matrix)
        signal = self.monitors.get("reconstruction")
        if isinstance(signal, ReconstructionMonitor):
            sample = signal.sample()
            if sample is not None:
                found["figures/reconstruction"] = figures.traces_png(sample, signal.sampling_rate)
        return {name: _image(png) for name, png in found.items()}


def _image(png: bytes) -> Any:
    import wandb
    from PIL import Image

    return wandb.Image(Image.open(io.BytesIO(png)))
