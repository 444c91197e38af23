"""One optimizer step: what it is averaged over, seeds, micro-batches forward and backward."""

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from b2t.config import Config
from b2t.data.batches import Batch
from b2t.errors import UserError
from b2t.model.brain_to_text import BrainToText
from b2t.model.objectives import COUNTS
from b2t.model.outputs import BrainToTextOutput
from b2t.monitor.alerts import Alert
from b2t.quantize import QuantizerStats, SoftUsage, StepNorms
from b2t.quantize.frame_hash import frame_ids
from b2t.quantize.pending import Begun, PendingStats
from b2t.quantize.schedules import anneal
from b2t.train.budget import PhaseBudget
from b2t.train.determinism import strict_backward
from b2t.train.diagnosis import diagnose, skipped_alert
from b2t.train.ds_config import DeepSpeedFile
from b2t.train.engine import PhaseEngine
from b2t.train.progress import Progress
from b2t.train.ranks import Ranks
from b2t.train.window import Window

COUNTED = (*COUNTS, "rows")
"""What losses are averaged over, summed over micro-batches and ranks before each step."""

Totals = dict[str, float]
"""Sums of a step over micro-batches and ranks: `COUNTED`, `padded` elements, `stop` requests."""


class StepResult(NamedTuple):
    """What an optimizer step has come to; weights have moved where it was applied."""

    applied: bool
    """False where an overflow made DeepSpeed skip it."""
    batches: list[Batch]
    """Micro-batches of this rank, on its device."""
    output: BrainToTextOutput
    """Of the last of them."""
    stats: Begun | None
    """Of the micro-batches, on their way to all ranks where codebooks move; None without any."""
    totals: Totals
    weights: dict[str, float]
    """Of the losses."""
    forward: Callable[[int, Batch], BrainToTextOutput]
    """Runs a micro-batch, by number, as the step did."""


class OptimizerStep:
    """Takes the optimizer steps of one phase.

    Args:
        model: what is trained.
        engine: of the phase.
        config: the resolved configuration.
        progress: where the run is; read at each step.
        ds_file: the checked DeepSpeed file.
        ranks: this process among all.
        window: receives the losses of each micro-batch.
        budget: how much of the phase is over.
    """

    def __init__(
        self,
        model: BrainToText,
        engine: PhaseEngine,
        config: Config,
        progress: Progress,
        ds_file: DeepSpeedFile,
        ranks: Ranks,
        window: Window,
        budget: PhaseBudget,
    ) -> None:
        self.model = model
        self.engine = engine
        self.config = config
        self.progress = progress
        self.ds_file = ds_file
        self.ranks = ranks
        self.window = window
        self.budget = budget
        self.phase = config.phases[progress.phase]

    def totals(self, micro_batches: list[Batch], problem: str | None, stop: bool) -> Totals:
        """Sums over micro-batches and ranks of what losses are averaged over, and of stop flags.

        Goes through the CPU group, so that it never waits for the device. Collective.

        Args:
            micro_batches: of this rank.
            problem: why it has none.
            stop: whether it was asked to stop.

        Raises:
            UserError: on all ranks, where one of them met a trial that cannot be trained on.
        """
        local = dict.fromkeys((*COUNTED, "padded", "stop", "problem"), 0.0)
        for batch in micro_batches:
            for name, value in self.model.counts(batch).items():
                local[name] += float(value)
            local["padded"] += float(batch.signal.numel())
        local["stop"] = float(stop)
        local["problem"] = float(problem is not None)
        local["elapsed"] = self.budget.elapsed()
        step = f"step {self.progress.step + 1} of phase {self.phase.name}"
        self.ranks.place = f"opening {step}"
        totals = dict(zip(local, self.ranks.sum(list(local.values())), strict=True))
        self.progress.phase_seconds += totals["elapsed"] / self.ranks.world
        if totals["problem"]:
            raise UserError(next(p for p in self.ranks.gather(problem) if p is not None))
        self.ranks.place = f"in {step}"
        return totals

    def take(self, micro_batches: list[Batch], totals: Totals) -> StepResult:
        """Forward and backward of all micro-batches, and the engine's step. Collective."""
        shares = self.ranks.world * self.ds_file.accumulation
        self.set_clocks()
        weights = self.phase.losses.model_dump()
        batches = [batch.to(self.ranks.device, self.engine.dtype) for batch in micro_batches]
        norms = StepNorms(
            counts={name: totals[name] / shares for name in COUNTED},
            usage=self._usage_of_step(batches),
            micro_batches=len(batches),
        )
        forward = partial(
            self._forward,
            norms=norms,
            weights=weights,
            text_from_labels=self.phase.text_from != "signals",
        )
        stats: QuantizerStats | None = None
        for number, batch in enumerate(batches):
            output = forward(number, batch)
            assert output.loss is not None
            if output.stats is not None:
                stats = output.stats if stats is None else stats + output.stats
            if number + 1 == len(batches):
                summed = self._begin_update(stats)
            with strict_backward(self.ranks.device):
                self.engine.backward(output.loss)
            if number + 1 == len(batches):
                self.ranks.meet("end of the backward pass")
            applied = self.engine.step()
            self.window.add(output, self.ds_file.accumulation)
        if not applied and isinstance(summed, PendingStats):
            summed.wait()
        return StepResult(applied, batches, output, summed, totals, weights, forward)

    def _begin_update(self, stats: QuantizerStats | None) -> Begun | None:
        """Let the step's statistics travel while the last micro-batch goes backward."""
        quantizer = self.model.quantizer
        if stats is None or quantizer is None or "quantizer" not in self.phase.trainable:
            return stats
        return quantizer.begin_update(stats)

    def _forward(self, number: int, batch: Batch, **inputs: Any) -> BrainToTextOutput:
        self._seed(number)
        return self.engine(batch, **inputs)

    def set_clocks(self) -> None:
        """Bring what anneals to where the applied steps are."""
        quantizer = self.model.quantizer
        if quantizer is not None:
            quantizer.set_progress(self._share_done())
            course = self.phase.temperature
            if course is not None:
                done = self.budget.done()
                quantizer.set_temperature(anneal(course.start, course.end, done, course.schedule))
            quantizer.revival_enabled = self.phase.revival

    def _share_done(self) -> float:
        """Share of the whole training that is over, steps that minutes will cut off included."""
        progress, steps = self.progress, self.phase.steps
        # Nothing is added, not even a rounding, where steps alone end the phase.
        ahead = (self.budget.done() - progress.phase_step / steps) * steps
        planned = progress.planned(self.config.phases)
        return min(1.0, (planned + ahead) / self.config.total_steps)

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
    def _usage_of_step(self, batches: list[Batch]) -> SoftUsage | None:
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
        usages = []
        used = [m for m in (self.model.adapter, self.model.encoder, quantizer) if m is not None]
        with self.engine.whole(*used):
            for number, batch in enumerate(batches):
                self._seed(number)
                latents, mask = self.model.latents(
                    batch.signal, batch.signal_mask, batch.session, count=batch.frames
                )
                ids = frame_ids(batch.row_ids, latents.shape[1])
                usages.append(quantizer.soft_usage(latents, mask, ids, batch.frames))
        self.ranks.meet("sum of code usage")
        return sum(usages[1:], usages[0]).all_reduce()

    def why_skipped(self, result: StepResult) -> Alert:
        """Diagnose the last of too many skipped steps. Collective."""
        progress = self.progress
        self.ranks.place = f"looking for what is not finite in step {progress.step + 1}"
        losses = self.window.not_finite()
        with self.engine.whole():
            finding = diagnose(
                self.model,
                result.batches,
                result.forward,
                losses,
                self.engine.overflowed,
                self.ranks,
            )
        scale = self.engine.loss_scale if self.ds_file.precision == "fp16" else None
        in_losses = any(self.ranks.gather(bool(losses)))
        return skipped_alert(finding, progress, in_losses, scale)
