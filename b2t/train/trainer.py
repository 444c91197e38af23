"""The training loop: phases, steps, validation, checkpoints, hooks."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from b2t.config import COMPONENTS, Config, PhaseConfig
from b2t.data.batches import Batch, BatchPlan, train_batches
from b2t.data.trials import signal_lengths
from b2t.errors import UserError
from b2t.log import log_once, logger
from b2t.model.objectives import COUNTS
from b2t.model.trained import trained_components
from b2t.monitor.alerts import Alert
from b2t.monitor.context import StepContext
from b2t.quantize.frame_hash import frame_ids
from b2t.quantize.schedules import anneal
from b2t.quantize.start import NoFiniteFrames
from b2t.train import snapshot
from b2t.train.build import Materials
from b2t.train.callbacks import Callback
from b2t.train.checkpoint import BEST, Checkpoint, CheckpointStore
from b2t.train.codebook_start import start_codebooks
from b2t.train.diagnosis import diagnose, not_started_alert, skipped_alert
from b2t.train.ds_config import DeepSpeedFile
from b2t.train.engine import PhaseEngine, initial_masters, read_master
from b2t.train.export import export_model
from b2t.train.metric_names import DECODED, active_losses, best_rules
from b2t.train.progress import Progress
from b2t.train.ranks import Ranks
from b2t.train.signals import StopSignals
from b2t.train.validation import decode, decoding_due, scores, show_decoded, validate
from b2t.train.weight_ema import WeightEma
from b2t.train.window import Window
from b2t.train.zero3 import Zero3Engine

log = logger(__name__)

COUNTED = (*COUNTS, "rows")
"""What losses are averaged over, summed over micro-batches and ranks before each step."""


class Stopped(Exception):  # noqa: N818  # not an error: the user or the scheduler asked
    """All ranks leave because one was asked to; a checkpoint has been written."""


class TrainingFailed(Exception):  # noqa: N818  # reads as what happened
    """The run cannot learn any further; the message is the diagnosis."""


class Trainer:
    """Trains the phases of a configuration.

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
        stop: StopSignals | None = None,
    ) -> None:
        self.config = config
        self.ds_file = ds_file
        self.materials = materials
        self.ranks = ranks
        self.callbacks = list(callbacks)
        self.stop = stop
        self._best_by = best_rules(config, materials)
        self.model = materials.model.to(ranks.device)
        self.masters = initial_masters(self.model)
        self.progress = Progress()
        self.store = CheckpointStore(config.run.dir / "checkpoints", config.checkpoint.keep)
        self.plan = BatchPlan(
            signal_lengths(materials.train),
            ds_file.global_batch(ranks.world),
            split=config.data.train_split,
        )
        self.window: Window
        self.engine: PhaseEngine
        self.averages: dict[str, Tensor] = {}
        self._ema: WeightEma | None = None
        self._restored: Checkpoint | None = None
        self._critical: Alert | None = None
        self.outcome = "not started"
        self._clock = time.perf_counter()

    @property
    def phase(self) -> PhaseConfig:
        """The phase that is being trained."""
        return self.config.phases[self.progress.phase]

    def fit(self) -> None:
        """Train all phases, from the start or from where `restore` left."""
        if self._restored is None:
            self._enter_phase(0)
        self.outcome = "running"
        try:
            self._hook("on_start")
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
            self._hook("on_end")

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint; call before `fit`."""
        snapshot.restore(self, checkpoint)
        self._restored = checkpoint
        metric, mode = self._best_by[self.progress.phase]
        former = self.progress.choose_best_by(metric, mode)
        if former is not None and former.best is not None:
            log.info(
                "the best model is chosen anew, by %s (%s): so far it was %s (%s), %.4g at step %d",
                metric, mode,
                former.metric, former.mode, former.best, former.best_step,
            )  # fmt: skip

    def seconds_left(self, step_s: float) -> float:
        """Estimate of the training time left, in seconds, at this pace."""
        return step_s * (self.config.total_steps - self.progress.step)

    def _train_phase(self) -> None:
        restored, self._restored = self._restored, None
        self._build_engine(restored)
        self.window = Window(self.ranks)
        if restored is not None:
            self.window.load_state(restored.state.get("window"))
        batches = self._batches()
        try:
            while self.progress.phase_step < self.phase.steps and not self._stopping_early():
                self._start_codebooks_when_due()
                waited = time.perf_counter()
                micro_batches, problem = self._read(batches)
                self._step(micro_batches, time.perf_counter() - waited, problem)
        finally:
            batches.close()
        if self.window.steps:  # stopped early, between two records
            self._log()
            self._leave_if_critical()
        self._end_phase()

    def _enter_phase(self, number: int) -> None:
        phase = self.config.phases[number]
        metric, mode = self._best_by[number]
        self.progress.enter_phase(number, metric, mode, phase.early_stopping)
        if metric != self.config.checkpoint.best_metric:
            log.info(
                "phase %s has no %s: %s chooses its best model",
                phase.name, self.config.checkpoint.best_metric, metric,
            )  # fmt: skip

    def _build_engine(self, restored: Checkpoint | None) -> None:
        phase = self.phase
        self.ranks.place = f"building the engine of phase {phase.name}"
        trained = [name for name in phase.trainable if getattr(self.model, name) is not None]
        frozen = [name for name in self.components() if name not in trained]
        self.model.freeze(frozen)
        if not any(p.requires_grad for p in self.model.parameters()):
            raise UserError(
                f"phases.{self.progress.phase}.trainable: none of {phase.trainable} exists in this "
                "model (text_decoder needs text, phoneme_head needs phonemes)"
            )
        build = Zero3Engine if self.ds_file.zero_stage == 3 else PhaseEngine
        self.engine = build(self.model, phase, self.config.optim, self.ds_file, self.masters)
        if (
            self.config.model.quantizer.update_rule == "gradient"
            and self.model.quantizer is not None
        ):
            # In any precision the engine's float32 master is where the optimizer moves the codes.
            self.model.quantizer.attach_master(read_master, self.engine.write)
        if restored is not None and restored.state["engine"] is not None:
            self.engine.load_state(restored.moments, restored.state["engine"])
        decay = self.config.optim.weight_ema
        if decay is not None:
            self._ema = WeightEma(self.engine, decay, self.averages)
        self.model.train()
        log.info("phase %s: training %s", phase.name, ", ".join(trained))

    def components(self) -> list[str]:
        """Names of the components that this model has."""
        return [name for name in COMPONENTS if getattr(self.model, name) is not None]

    def _batches(self) -> Any:
        epoch, position = divmod(self.progress.consumed, len(self.plan))
        return self._unpacked(
            train_batches(
                self.materials.train,
                self.plan,
                self.materials.tokenizer,
                self.materials.info.sessions,
                self.materials.augment if self._hears() else None,
                seed=self.config.run.seed,
                phase=self.progress.phase,
                epoch=epoch,
                position=position,
                micro_batch=self.ds_file.micro_batch,
                accumulation=self.ds_file.accumulation,
                rank=self.ranks.rank,
                world=self.ranks.world,
                workers=self.config.data.workers,
                max_tokens=self.config.data.max_text_tokens,
            )
        )

    def _hears(self) -> bool:
        """Whether this phase encodes signals; one that learns text from labels alone need not."""
        others = active_losses(self.model, self.phase).keys() - {"generation"}
        return self.phase.text_from == "signals" or bool(others)

    @staticmethod
    def _unpacked(loader: Iterator[tuple[int, int, list[Batch]]]) -> Iterator[list[Batch]]:
        try:
            for _, _, micro_batches in loader:
                yield micro_batches
        finally:
            loader.close()  # type: ignore[attr-defined]  # it is a generator

    @staticmethod
    def _read(batches: Iterator[list[Batch]]) -> tuple[list[Batch], str | None]:
        """Return the next micro-batches, or why this rank has none."""
        try:
            return next(batches), None
        except UserError as error:
            return [], str(error)

    def _step(self, micro_batches: list[Batch], data_s: float, problem: str | None) -> None:
        """Take one optimizer step: micro-batches, losses, backward, step, and what it moves."""
        totals = self._totals(micro_batches, problem)
        counts = {name: totals[name] / self._shares() for name in COUNTED}
        self._set_clocks()
        weights = self.phase.losses.model_dump()
        batches = [b.to(self.ranks.device, self.engine.dtype) for b in micro_batches]
        usage = self._usage_of_step(batches)
        forward = partial(
            self._forward,
            counts=counts,
            weights=weights,
            usage=usage,
            micro_batches=len(batches),
            text_from_labels=self.phase.text_from == "labels",
        )
        stats: Any = None
        for number, batch in enumerate(batches):
            output = forward(number, batch)
            self.engine.backward(output.loss)
            applied = self.engine.step()
            self.window.add(output, self.ds_file.accumulation)
            if output.stats is not None:
                stats = output.stats if stats is None else stats + output.stats
        self.progress.consumed += 1
        if applied:
            self._after_applied(stats, output, batch, weights, totals, data_s)
        else:
            self._after_skipped(batches, forward)
        if totals["stop"]:
            self._save_and_leave()

    def _forward(self, number: int, batch: Batch, **inputs: Any) -> Any:
        self._seed(number)
        return self.engine(batch, **inputs)

    def _totals(self, micro_batches: list[Batch], problem: str | None) -> dict[str, float]:
        """Sums over micro-batches and ranks of what losses are averaged over, and of stop flags.

        Goes through the CPU group, so that it never waits for the device.

        Raises:
            UserError: on all ranks, where one of them met a trial that cannot be trained on.
        """
        local = dict.fromkeys((*COUNTED, "padded", "stop", "problem"), 0.0)
        for batch in micro_batches:
            for name, value in self.model.counts(batch).items():
                local[name] += float(value)
            local["padded"] += float(batch.signal.numel())
        local["stop"] = float(self.stop is not None and self.stop.requested)
        local["problem"] = float(problem is not None)
        self.ranks.place = f"opening step {self.progress.step + 1} of phase {self.phase.name}"
        totals = dict(zip(local, self.ranks.sum(list(local.values())), strict=True))
        if totals["problem"]:
            raise UserError(next(p for p in self.ranks.gather(problem) if p is not None))
        self.ranks.place = f"in step {self.progress.step + 1} of phase {self.phase.name}"
        return totals

    def _shares(self) -> int:
        return self.ranks.world * self.ds_file.accumulation

    def _seed(self, micro_batch: int) -> None:
        """Make dropout a function of seed, phase, batch, micro-batch, rank: resumes are exact."""
        progress, ranks = self.progress, self.ranks
        place = (
            self.config.run.seed, progress.phase, progress.consumed, micro_batch, ranks.rank,
        )  # fmt: skip
        digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
        seed = int.from_bytes(digest, "little") >> 1
        # torch.manual_seed also queues a seed, with a traceback, for each device that is not there.
        torch.default_generator.manual_seed(seed)
        if ranks.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    @torch.no_grad()
    def _usage_of_step(self, batches: list[Batch]) -> Any:
        """Soft code usage over all micro-batches and ranks, which the regularisers depend on.

        One more pass of the encoder, with the dropout of the pass that follows. None where a
        single micro-batch needs no such pass.
        """
        phase, quantizer = self.phase, self.model.quantizer
        wanted = phase.losses.diversity > 0 or phase.losses.perplexity > 0
        if quantizer is None or len(batches) == 1 or not (wanted and phase.exact_regularizers):
            return None
        if not quantizer.initialized:
            return None
        total = 0
        used = [m for m in (self.model.adapter, self.model.encoder, quantizer) if m is not None]
        with self.engine.whole(*used):
            for number, batch in enumerate(batches):
                self._seed(number)
                latents, mask = self.model.latents(batch.signal, batch.signal_mask, batch.session)
                ids = frame_ids(batch.row_ids, latents.shape[1])
                total = total + quantizer.soft_usage(latents, mask, ids)
        return total.all_reduce()  # type: ignore[attr-defined]  # a sum of SoftUsage

    def _set_clocks(self) -> None:
        quantizer = self.model.quantizer
        if quantizer is not None:
            quantizer.set_progress(self.progress.step / self.config.total_steps)
            course = self.phase.temperature
            if course is not None:
                done = self.progress.phase_step / self.phase.steps
                quantizer.set_temperature(anneal(course.start, course.end, done, course.schedule))
            quantizer.revival_enabled = self.phase.revival

    def _after_applied(
        self,
        stats: Any,
        output: Any,
        batch: Batch,
        weights: dict[str, float],
        totals: dict[str, float],
        data_s: float,
    ) -> None:
        progress = self.progress
        report = None
        quantizer = self.model.quantizer
        if stats is not None and quantizer.initialized and "quantizer" in self.phase.trainable:
            report = quantizer.update(stats)
        progress.step += 1
        progress.phase_step += 1
        progress.consecutive_skips = 0
        if self._ema is not None:
            self._ema.update(progress.step)
        now = time.perf_counter()
        step_s, self._clock = now - self._clock, now
        progress.seconds += step_s
        self.window.close_step(totals, step_s, data_s, report)
        context = StepContext(
            step=progress.step,
            phase=self.phase.name,
            losses=self.window.last_losses,
            weights=weights,
            counts=getattr(report, "counts", None),
            update_report=report,
            quantizer=quantizer,
            grad_norms=self.engine.grad_norms(),
            lr=self.engine.learning_rates(),
            loss_scale=self.engine.loss_scale if self.ds_file.precision == "fp16" else None,
            skipped_steps=progress.skipped,
            step_time_s=step_s,
            data_time_s=data_s,
            frames=totals["frames"],
            bins=totals["bins"],
            padded_bins=totals["padded"],
            reconstruction=output.reconstruction,
            target=batch.target,
            signal_mask=batch.signal_mask,
        )
        self._hook("on_step", context)
        if progress.step % self.config.log.every == 0 or progress.phase_step == self.phase.steps:
            self._log()
            self._leave_if_critical()
        last = progress.phase_step == self.phase.steps
        every = self.phase.evaluate_every or self.config.evaluation.every
        if progress.step % every == 0 and not last:
            self._validate()
        if progress.step % self.config.checkpoint.every == 0 and not last:
            self.save()

    def _after_skipped(
        self, batches: Sequence[Batch], forward: Callable[[int, Batch], Any]
    ) -> None:
        """Count a skipped step; nothing else moves. Too many in a row end the run."""
        progress = self.progress
        progress.skipped += 1
        progress.consecutive_skips += 1
        if progress.consecutive_skips >= self.config.stability.max_consecutive_skips:
            self.raise_alert(self._why_skipped(batches, forward))
            progress.consecutive_skips = 0
        self.window.drop_step()
        self._leave_if_critical()

    def _why_skipped(self, batches: Sequence[Batch], forward: Callable[[int, Batch], Any]) -> Alert:
        """Diagnose the last of too many skipped steps. Collective."""
        progress = self.progress
        self.ranks.place = f"looking for what is not finite in step {progress.step + 1}"
        losses = self.window.not_finite()
        gradients = self.engine.overflowed
        with self.engine.whole():
            finding = diagnose(self.model, batches, forward, losses, gradients, self.ranks)
        scale = self.engine.loss_scale if self.ds_file.precision == "fp16" else None
        in_losses = any(self.ranks.gather(bool(losses)))
        return skipped_alert(finding, progress, in_losses, scale)

    def _start_codebooks_when_due(self) -> None:
        quantizer = self.model.quantizer
        if quantizer is None or quantizer.initialized:
            return
        start = self.config.codebook_start
        due = min(start.after_steps, self.config.phases[0].steps - 1)
        if self.progress.step < due:
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
                )
        except NoFiniteFrames as problem:
            self.raise_alert(self._why_not_started(problem))
            self._leave_if_critical()
        self._clock = time.perf_counter()

    def _why_not_started(self, problem: NoFiniteFrames) -> Alert:
        """Diagnose codebooks that no latent frame can start. Collective."""
        with self.engine.whole():
            finding = diagnose(
                self.model,
                problem.batches,
                lambda _, batch: self.model.latents(batch.signal, batch.signal_mask, batch.session),
                (),
                (),
                self.ranks,
            )
        return not_started_alert(finding, self.progress, str(problem))

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
        self._hook("on_log", record)

    def _validate(self, ending: bool = False) -> None:
        """Validate, decode where that is due, and keep the best model.

        A phase that ends decodes too, and validates but where it stopped early, just validated.
        """
        progress = self.progress
        fresh, due = progress.validated < progress.step, decoding_due(self)
        metrics, decoded = {}, None
        with self._evaluated():
            if fresh:
                self.ranks.place = f"validating after step {progress.step}"
                metrics = validate(self)
            if (due or ending) if fresh else not due:
                self.ranks.place = f"decoding after step {progress.step} of phase {self.phase.name}"
                decoded = decode(self)
        texts = {name: value for name, value in scores(decoded).items() if name in DECODED}
        self._choose({**metrics, **texts}, fresh)
        progress.validated = progress.step
        for found in (metrics, scores(decoded)):
            if found:
                self._hook("on_eval", found)
        if decoded is not None:
            self._hook("on_decode", decoded.predictions)
            show_decoded(decoded)
        self._clock = time.perf_counter()

    def _choose(self, metrics: dict[str, float], fresh: bool) -> None:
        """Keep the model where it is the best so far; count towards early stopping.

        A metric that this validation does not say, as between two decodings, counts for nothing.
        """
        best, stopping = self.progress.best, self.progress.stopping
        if best.metric in metrics and best.update(metrics[best.metric], self.progress.step):
            self._export_best()
        if stopping is not None and stopping.metric in metrics:
            stopping.update(metrics[stopping.metric], self.progress.step)
        wanted = {rule.metric for rule in (best, stopping) if rule is not None}
        for name in sorted(wanted - metrics.keys() - set(DECODED)) if fresh else ():
            log_once(
                f"absent-{name}",
                f"step {self.progress.step}: the validation has no {name}, by which a model is "
                "chosen or a phase stopped: this one does not count",
            )

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
        self._validate(ending=True)
        self.ranks.place = f"ending phase {self.phase.name}"
        self._hook("on_phase_end", self.phase)
        self.engine.collect_masters()
        self._collect_averages()
        following = self.progress.phase + 1
        self.progress.finished = following == len(self.config.phases)
        if self.progress.finished:
            self.save()
            self.engine.close()
            self.ranks.place = "finishing"
            return
        self.engine.close()
        self._enter_phase(following)
        self.save_between_phases()

    def _export_best(self) -> None:
        self._collect_averages()
        masters = {**self.engine.collect_masters(), **self.averages}
        progress = self.progress
        self.model.config.trained = trained_components(
            self.config.phases,
            progress.phase,
            progress.phase_step,
            self.model.config.started_with,
        )
        if self.ranks.is_main:
            folder = self.store.folder / BEST
            try:
                export_model(folder, self.model, masters, self.materials.tokenizer)
            except (OSError, SafetensorError) as error:
                log.error("%s could not be written (%s): training goes on", folder, error)
        self.ranks.barrier()

    @contextmanager
    def _evaluated(self) -> Iterator[None]:
        """Whole weights inside, the averaged ones where there are any. Collective."""
        with self.engine.whole():
            if self._ema is None:
                yield
            else:
                with self._ema.in_use():
                    yield

    def _collect_averages(self) -> None:
        if self._ema is not None:
            self.averages = self._ema.collect()

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        self.ranks.place = f"saving after step {self.progress.step}"
        moments, numbers = self.engine.state()
        self._collect_averages()
        self._write_checkpoint(self.engine.collect_masters(), moments, numbers, self.window.state())

    def save_between_phases(self) -> None:
        """Write a checkpoint of the start of a phase, whose optimizer is new."""
        self.ranks.place = f"saving before phase {self.phase.name}"
        self._write_checkpoint(self.masters, {}, None, None)

    def _write_checkpoint(
        self,
        masters: dict[str, Tensor],
        moments: dict[str, Tensor],
        engine: dict[str, Any] | None,
        window: dict[str, Any] | None,
    ) -> None:
        if self.ranks.is_main:
            path = self.store.save(
                self.progress.step,
                snapshot.take(self, masters, moments, engine, window),
                milestone=self.progress.finished or engine is None,
            )
            if path is not None:
                log.info("checkpoint %s", path)
        self.ranks.barrier()
        self._clock = time.perf_counter()

    def _save_and_leave(self) -> None:
        self.save()
        raise Stopped(self.progress.step)

    def raise_alert(self, alert: Alert) -> None:
        """Tell all hooks; a critical alert ends the run at the end of this step."""
        self._hook("on_alert", alert)
        if alert.severity == "critical":
            self._critical = alert

    def _leave_if_critical(self) -> None:
        """Save and end the run after a critical alert."""
        if self._critical is not None:
            self.save()
            raise TrainingFailed(self._critical.text())

    def _hook(self, name: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            try:
                getattr(callback, name)(self, *arguments)
            except OSError as error:  # a full disk must not end the run
                if callback.collective:
                    raise
                kind = type(callback).__name__
                log_once(f"{kind}-{name}", f"{kind}: {error}; training goes on", logging.ERROR)
