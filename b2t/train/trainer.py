"""The training loop: phases, steps, and the hooks around them."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from b2t.config import Config, PhaseConfig
from b2t.data.batches import Batch
from b2t.errors import UserError
from b2t.log import log_once, logger
from b2t.monitor.alerts import Alert
from b2t.monitor.context import StepContext
from b2t.quantize import UpdateReport
from b2t.quantize.start import NoFiniteFrames
from b2t.run_files import CHECKPOINTS
from b2t.train import snapshot
from b2t.train.best_model import BestModel
from b2t.train.budget import PhaseBudget
from b2t.train.build import Materials
from b2t.train.callback import Callback
from b2t.train.checkpoint import Checkpoint, CheckpointStore
from b2t.train.codebook_start import start_codebooks, why_not_started
from b2t.train.ds_config import DeepSpeedFile
from b2t.train.engine import PhaseEngine
from b2t.train.guard import Guard
from b2t.train.hook_states import require_names
from b2t.train.masters import initial_masters
from b2t.train.metric_names import best_rules
from b2t.train.phase import TrainedPhase, batch_plan, phase_batches
from b2t.train.plain import without_needless_zero
from b2t.train.progress import Progress
from b2t.train.ranks import Ranks
from b2t.train.saving import Saving
from b2t.train.step import OptimizerStep, StepResult
from b2t.train.step_clock import StepClock
from b2t.train.stopping import Asked, Interrupted, StopRequests
from b2t.train.validating import Validating
from b2t.train.window import Window

log = logger(__name__)


class Stopped(Exception):  # noqa: N818  # not an error: the user or the scheduler asked
    """All ranks leave because one was asked to; a checkpoint has been written."""


class TrainingFailed(Exception):  # noqa: N818  # reads as what happened
    """The run cannot learn any further; the message is the diagnosis."""


class Trainer:
    """Trains the phases of a configuration.

    Besides the hooks that it is given every run validates, keeps its best model and saves.

    Args:
        config: the resolved configuration.
        ds_file: the checked DeepSpeed file.
        materials: data, tokenizer, model.
        ranks: this process among all.
        callbacks: hooks, in order.
        stop: signals to listen to, None listens to none.

    Raises:
        UserError: a metric that is to choose the best model or stop a phase is never logged there.
    """

    def __init__(
        self,
        config: Config,
        ds_file: DeepSpeedFile,
        materials: Materials,
        ranks: Ranks,
        callbacks: Sequence[Callback] = (),
        stop: Asked | None = None,
    ) -> None:
        self.config = config
        self.ds_file = without_needless_zero(ds_file, config.optim, ranks.world)
        self.materials = materials
        self.ranks = ranks
        self.callbacks = list(callbacks)
        require_names(self.callbacks)
        self.stop = stop
        self.stops = StopRequests(ranks, stop)
        self.best_by = best_rules(config, materials)
        self.model = materials.model.to(ranks.device)
        self.masters = initial_masters(self.model)
        self.averages: dict[str, Tensor] = {}
        self.progress = Progress()
        self.store = CheckpointStore(config.run.dir / CHECKPOINTS, config.checkpoint.keep)
        self.plan = batch_plan(config, materials, self.ds_file, ranks.world)
        self.clock = StepClock()
        self.window: Window
        self.outcome = "not started"
        self._guard = Guard()
        self._validating, self._saving = Validating(), Saving(config.checkpoint.every)
        self._duties = [self._validating, BestModel(), self._saving]
        self._trained: TrainedPhase
        self._budget: PhaseBudget
        self._stepping: OptimizerStep
        self._restored: Checkpoint | None = None
        self._critical: Alert | None = None

    @property
    def phase(self) -> PhaseConfig:
        """The phase that is being trained."""
        return self.config.phases[self.progress.phase]

    @property
    def engine(self) -> PhaseEngine:
        """Its engine."""
        return self._trained.engine

    def fit(self) -> None:
        """Train all phases, from the start or from where `restore` left."""
        if self._restored is None:
            self._enter_phase(0)
        self.outcome = "running"
        try:
            self.hook("on_start")
            while not self.progress.finished:
                self._train_phase()
            self.outcome = "finished"
        except Stopped:
            self.outcome = "stopped on request"
            raise
        except (TrainingFailed, UserError) as failure:
            self.outcome = f"failed: {failure}"
            raise
        except BaseException as error:
            self.outcome = f"crashed: {type(error).__name__}: {error}"
            raise
        finally:
            self.wait_for_checkpoint()
            self.hook("on_end")

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint; call before `fit`."""
        self.progress, self.averages = snapshot.restore(
            checkpoint, self.model, self.masters, self.callbacks
        )
        self._restored = checkpoint
        if self.materials.stream is not None and self.progress.streams:
            self.materials.stream.go_to(self.progress.streams)
        metric, mode = self.best_by[self.progress.phase]
        former = self.progress.choose_best_by(metric, mode)
        if former is not None and former.best is not None:
            log.info(
                "the best model is chosen anew, by %s (%s): so far it was %s (%s), %.4g at step %d",
                metric, mode,
                former.metric, former.mode, former.best, former.best_step,
            )  # fmt: skip

    def save(self) -> None:
        """Copy this moment, and let it be written while training goes on. Collective."""
        self._saving.save(self)

    def wait_for_checkpoint(self) -> None:
        """Return when the last checkpoint is on the disk, or its failure logged."""
        self._saving.wait()

    def seconds_left(self, step_s: float) -> float:
        """Estimate of the training time left, in seconds, at this pace."""
        following = self.config.phases[self.progress.phase + 1 :]
        return self._budget.seconds_left(step_s) + sum(
            min(step_s * p.steps, 60 * (p.minutes or math.inf)) for p in following
        )

    def evaluated(self) -> AbstractContextManager[None]:
        """Whole weights inside, the averaged ones where there are any. Collective."""
        return self._trained.evaluated()

    def collect_averages(self) -> Mapping[str, Tensor]:
        """Bring `averages` up to date and return it. Collective."""
        averages = self._trained.read_averages()
        if averages is not None:
            self.averages = averages
        return self.averages

    def gather_averages(self) -> Mapping[str, Tensor]:
        """Return the averages of this moment on rank 0; anything elsewhere. Collective."""
        averages = self._trained.gather_averages()
        return self.averages if averages is None else averages

    def _enter_phase(self, number: int) -> None:
        phase = self.config.phases[number]
        metric, mode = self.best_by[number]
        self.progress.enter_phase(number, metric, mode, phase.early_stopping)
        if metric != self.config.checkpoint.best_metric:
            log.info(
                "phase %s has no %s: %s chooses its best model",
                phase.name, self.config.checkpoint.best_metric, metric,
            )  # fmt: skip

    def _train_phase(self) -> None:
        restored, self._restored = self._restored, None
        self._open_phase(restored)
        try:
            if restored is not None and self._validating.missed(self):
                self._validating.after_step(self, last=False)
                self._saving.after_step(self, last=False)
            self._take_steps()
            self._end_phase()
        except Interrupted:
            self._save_and_leave()

    def _take_steps(self) -> None:
        batches = self._batches()
        self.clock.restart()  # dry batches and building an engine are no part of a step
        try:
            while self._budget.done() < 1 and not self._stopping_early():
                self._start_codebooks_when_due()
                waited = time.perf_counter()
                micro_batches, problem = self._read(batches)
                self._step(micro_batches, time.perf_counter() - waited, problem)
        finally:
            batches.close()
        if self.window.steps:  # stopped early, between two records
            self._log()
            self._leave_if_critical()
        self._go_back_to_best()

    def _go_back_to_best(self) -> None:
        """Take the weights of the best evaluation where the phase stopped early. Collective."""
        rule, progress = self.progress.stopping, self.progress
        if rule is None or not rule.should_stop or progress.restorable in (-1, progress.step):
            return
        self.ranks.place = f"going back to the weights of step {rule.best_step}"
        self._saving.settle(self)
        best = self.store.read(rule.best_step)
        there = all(self.ranks.gather(best is not None))
        if best is None or not there:
            log.error(
                "phase %s: the checkpoint of step %d is gone: the last weights are handed on",
                self.phase.name, rule.best_step,
            )  # fmt: skip
            return
        self.engine.close()
        self.averages = snapshot.restore_weights(best, self.model, self.masters)
        self._open_phase(None)
        self._stepping.set_clocks()
        progress.validated = -1  # what is handed on is validated at the end of the phase
        log.info("phase %s hands on the weights of step %d", self.phase.name, rule.best_step)

    def _open_phase(self, restored: Checkpoint | None) -> None:
        self.ranks.place = f"building the engine of phase {self.phase.name}"
        self._budget = PhaseBudget(self.phase, self.progress)
        self._trained = TrainedPhase(
            self.model, self.config, self.progress.phase, self.ds_file,
            self.masters, self.averages, restored, self._budget.time_done,
        )  # fmt: skip
        self.window = Window(self.ranks)
        if restored is not None:
            self.window.load_state(restored.state.get("window"))
        self._stepping = OptimizerStep(
            self.model, self.engine, self.config, self.progress, self.ds_file,
            self.ranks, self.window, self._budget,
        )  # fmt: skip

    def _batches(self) -> Generator[list[Batch], None, None]:
        return phase_batches(
            self.config, self.progress.phase, self.materials, self.plan, self.ds_file,
            self.ranks, self.progress.consumed,
        )  # fmt: skip

    @staticmethod
    def _read(batches: Iterator[list[Batch]]) -> tuple[list[Batch], str | None]:
        """Return the next micro-batches, or why this rank has none."""
        try:
            return next(batches), None
        except UserError as error:
            return [], str(error)

    def _step(self, micro_batches: list[Batch], data_s: float, problem: str | None) -> None:
        """Take one optimizer step, and do what follows on it."""
        stop = self.stop is not None and self.stop.requested
        totals = self._stepping.totals(micro_batches, problem, stop)
        result = self._stepping.take(micro_batches, totals)
        self.progress.consumed += 1
        if result.applied:
            self._after_applied(result, data_s)
        else:
            self._after_skipped(result)
        if totals["stop"]:
            self._save_and_leave()

    def _after_applied(self, result: StepResult, data_s: float) -> None:
        """Move the codebooks, the clocks and the averages; call the hooks of a step."""
        progress, quantizer = self.progress, self.model.quantizer
        report = None
        moves = "quantizer" in self.phase.trainable
        if result.stats is not None and quantizer.initialized and moves:
            report = quantizer.update(result.stats)
        progress.step += 1
        progress.phase_step += 1
        progress.consecutive_skips = 0
        self._trained.update_averages(progress.step)
        step_s = self.clock.lap()
        progress.seconds += step_s
        self.window.close_step(result.totals, step_s, data_s, report)
        self.hook("on_step", self._context(result, report, step_s))
        last = self._budget.done() >= 1
        if progress.step % self.config.log.every == 0 or last:
            self._log()
            self._leave_if_critical()
        self.hook("after_step", last)

    def _context(
        self, result: StepResult, report: UpdateReport | None, step_s: float
    ) -> StepContext:
        totals, last = result.totals, result.batches[-1]
        return StepContext(
            phase=self.phase.name,
            losses=self.window.last_losses,
            weights=result.weights,
            counts=None if report is None else report.counts,
            update_report=report,
            grad_norms=self.engine.grad_norms(),
            step_time_s=step_s,
            frames=totals["frames"],
            reconstruction=result.output.reconstruction,
            target=last.target,
            signal_mask=last.signal_mask,
        )

    def _after_skipped(self, result: StepResult) -> None:
        """Count a skipped step; nothing else moves. Too many in a row end the run."""
        progress = self.progress
        progress.skipped += 1
        progress.consecutive_skips += 1
        if progress.consecutive_skips >= self.config.stability.max_consecutive_skips:
            self.raise_alert(self._stepping.why_skipped(result))
            progress.consecutive_skips = 0
        self.window.drop_step()
        self._leave_if_critical()

    def _start_codebooks_when_due(self) -> None:
        quantizer = self.model.quantizer
        if quantizer is None or quantizer.initialized:
            return
        planned = self.progress.planned(self.config.phases)
        due = planned >= self.config.codebooks_start_after
        if not due and self._budget.time_done() < 0.5:
            return
        self.ranks.place = "starting the codebooks"
        try:
            with self.engine.whole():
                start_codebooks(
                    self.model,
                    self.engine.dtype,
                    self.materials,
                    self.config,
                    self.ranks,
                    lengths=self.plan.lengths,
                    stops=self.stops,
                )
        except NoFiniteFrames as problem:
            with self.engine.whole():
                alert = why_not_started(self.model, problem, self.progress, self.ranks)
            self.raise_alert(alert)
            self._leave_if_critical()
        self.clock.restart()

    def _log(self) -> None:
        record = self.window.metrics()
        if record["codebook/nonfinite_frames"]:
            log_once(
                "nonfinite-frames",
                f"step {self.progress.step}: {record['codebook/nonfinite_frames']:.0f} latent "
                "frames held NaN or infinity and were left out of losses and codebooks "
                "(codebook/nonfinite_frames counts them)",
            )
        record["optim/skipped_steps"] = float(self.progress.skipped)
        record["optim/loss_scale"] = self.engine.loss_scale
        record["optim/grad_norm"] = self.engine.grad_norm()
        for component, rate in self.engine.learning_rates().items():
            record[f"optim/lr/{component}"] = rate
        if self.model.quantizer is not None:
            record["codebook/temperature"] = float(self.model.quantizer.temperature)
        self.hook("on_log", record)

    def _stopping_early(self) -> bool:
        rule = self.progress.stopping
        if rule is None or not rule.should_stop:
            return False
        best = float("nan") if rule.best is None else rule.best
        log.info(
            "phase %s stops early: %s has not improved on %.4g (step %d) for %d evaluations",
            self.phase.name, rule.metric, best, rule.best_step, rule.waited,
        )  # fmt: skip
        return True

    def _end_phase(self) -> None:
        self.hook("before_phase_end")
        self.ranks.place = f"ending phase {self.phase.name}"
        self.hook("on_phase_end", self.phase)
        self.engine.collect_masters()
        self.collect_averages()
        following = self.progress.phase + 1
        self.progress.finished = following == len(self.config.phases)
        if self.progress.finished:
            self.save()
            self.engine.close()
            self._saving.settle(self)
            self.ranks.place = "finishing"
            return
        self.engine.close()
        self._enter_phase(following)
        self._saving.save_between_phases(self)

    def raise_alert(self, alert: Alert) -> None:
        """Tell all hooks; a critical alert ends the run at the end of this step."""
        self.hook("on_alert", alert)
        if alert.severity == "critical":
            self._critical = alert

    def _save_and_leave(self) -> None:
        self.save()
        self._saving.settle(self)
        raise Stopped(self.progress.step)

    def _leave_if_critical(self) -> None:
        """Save and end the run after a critical alert."""
        if self._critical is not None:
            self.save()
            self._saving.settle(self)
            raise TrainingFailed(self._critical.text())

    def hook(self, name: str, *arguments: Any) -> None:
        """Call a hook of all callbacks, then of what every run does."""
        for callback in [*self.callbacks, *self._duties]:
            self._guard.call(callback, name, self, *arguments)
