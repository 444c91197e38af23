"""The longest trials once forward and backward: what memory lacks shows before training."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from b2t.config import Config, PhaseConfig
from b2t.data.batches import Batch, TrialRows, collate
from b2t.data.trials import signal_lengths
from b2t.errors import UserError
from b2t.log import logger
from b2t.train.build import Materials
from b2t.train.determinism import NotRepeatable, put_up_with, strict_backward
from b2t.train.ds_config import DeepSpeedFile
from b2t.train.engine import DTYPES
from b2t.train.memory import GIB, estimate_memory
from b2t.train.phase import components
from b2t.train.ranks import Ranks

log = logger(__name__)


class DryBatch:
    """Forward and backward of the longest trials in every phase to come; nothing is changed.

    Runs on the bare model before DeepSpeed wraps it, in the engine's precision, beside a block of
    memory as large as the gradients and optimizer state to come.

    Args:
        config: the resolved configuration.
        materials: data, tokenizer, model.
        ds_file: the checked DeepSpeed file.
        ranks: this process among all; the regularisers sum over them.
    """

    def __init__(
        self, config: Config, materials: Materials, ds_file: DeepSpeedFile, ranks: Ranks
    ) -> None:
        self.config = config
        self.materials = materials
        self.model = materials.model
        self.ds_file = ds_file
        self.ranks = ranks

    def try_phases(self, phases: Sequence[PhaseConfig]) -> None:
        """Try each phase. Collective.

        Raises:
            UserError: out of memory, on the ranks that it happens to.
        """
        batch, device = self.longest(), self.ranks.device
        for phase in phases:
            with self._as_trained(phase):
                try:
                    self._try(phase, batch)
                except RuntimeError as error:
                    if not out_of_memory(error):
                        raise
                    raise UserError(self._no_memory(phase, batch, error)) from None
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) / GIB
            log.info("dry batch of the longest trials: %.2f GiB at most", peak)
            torch.cuda.empty_cache()

    def longest(self) -> Batch:
        """Return this rank's micro-batch of the longest training trials, augmented as ever."""
        micro, ranks, materials = self.ds_file.micro_batch, self.ranks, self.materials
        lengths = np.asarray(signal_lengths(materials.train), dtype=np.int64)
        longest = np.argsort(-lengths, kind="stable")[: micro * ranks.world]
        rows = TrialRows(
            materials.train,
            materials.tokenizer,
            materials.info.sessions,
            materials.augment,
            seed=self.config.run.seed,
            max_tokens=self.config.data.max_text_tokens,
        )
        return collate([rows.example(0, int(row)) for row in longest[ranks.rank :: ranks.world]])

    def _try(self, phase: PhaseConfig, batch: Batch) -> None:
        try:
            self._go_through(phase, batch)
        except NotRepeatable as problem:
            put_up_with(problem)
            self._go_through(phase, batch)

    def _go_through(self, phase: PhaseConfig, batch: Batch) -> None:
        model, ranks = self.model, self.ranks
        memory = estimate_memory(model, phase, self.ds_file, ranks.world)
        held = memory.optimizer + memory.gradients if ranks.device.type == "cuda" else 0
        ballast = torch.empty(held, dtype=torch.uint8, device=ranks.device)
        dtype = next(p for p in model.parameters()).dtype
        output = model(batch.to(ranks.device, dtype), weights=phase.losses.model_dump())
        with strict_backward(ranks.device):
            output.loss.backward()
        del ballast

    @contextmanager
    def _as_trained(self, phase: PhaseConfig) -> Iterator[None]:
        """Lend the model as a phase trains it: frozen, cast, codebooks in use; put all back."""
        model, device = self.model, self.ranks.device
        dtype = DTYPES[self.ds_file.precision]
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        before = {name: (p.data, p.requires_grad) for name, p in model.named_parameters()}
        training = model.training
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            try:
                model.freeze([name for name in components(model) if name not in phase.trainable])
                for parameter in model.parameters():
                    parameter.data = parameter.data.to(dtype)
                if model.quantizer is not None:
                    codebooks = model.quantizer.codebooks
                    codebooks.initialized.fill_(model.quantizer.num_quantizers)
                model.train()
                yield
            finally:
                for name, parameter in model.named_parameters():
                    parameter.data, parameter.requires_grad = before[name]
                    parameter.grad = None
                with torch.no_grad():
                    for name, buffer in model.named_buffers():
                        buffer.copy_(buffers[name])
                model.train(training)

    def _no_memory(self, phase: PhaseConfig, batch: Batch, error: BaseException) -> str:
        ds_file = self.ds_file
        return (
            f"rank {self.ranks.rank}: out of memory in a dry batch of phase {phase.name} with the "
            f"{len(batch)} longest trials ({batch.signal.shape[1]} bins, "
            f"{', '.join(batch.rows[:2])} …): {str(error).splitlines()[0]}\n"
            f"  In {ds_file.path} lower train_micro_batch_size_per_gpu (now {ds_file.micro_batch}) "
            f"and raise gradient_accumulation_steps (now {ds_file.accumulation}) as much; or set "
            "model.activation_checkpointing to 1, or use ds_configs/zero2_offload.json."
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
