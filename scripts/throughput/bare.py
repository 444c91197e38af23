"""Training loops without the trainer, over its batches and from its weights."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from b2t.data.batches import Batch, train_batches
from b2t.train.build import build
from b2t.train.codebook_start import start_codebooks
from b2t.train.ds_config import DeepSpeedFile
from b2t.train.engine import DTYPES, parameter_groups
from b2t.train.phase import components as components_of
from b2t.train.schedule import lr_factor
from b2t.train.trainer import Trainer


class Bare(ABC):
    """A loop without the trainer, over the same batches; made before the first step.

    Args:
        trainer: whose configuration, data and plan are used, and whose weights `start` copies.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.config, self.ranks = trainer.config, trainer.ranks
        self.ds_file: DeepSpeedFile = trainer.ds_file
        self.phase = trainer.config.phases[0]
        self.weights = self.phase.losses.model_dump()
        self.batches = _batches(trainer)
        self.done = 0

    def start(self, trainer: Trainer) -> None:
        """Build model and optimizer from the trainer's weights and codebooks."""
        self.model = build(self.config).model.to(self.ranks.device)
        masters = trainer.engine.read_masters()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(masters.get(name, trainer.masters[name]))
            for name, buffer in self.model.named_buffers():
                buffer.copy_(dict(trainer.model.named_buffers())[name])
        self._start()

    def start_alone(self, trainer: Trainer) -> None:
        """Take the model of a trainer that is not going to train, and start its codebooks."""
        self.model = trainer.model
        if self.model.quantizer is not None and not self.model.quantizer.initialized:
            start_codebooks(
                self.model, torch.float32, trainer.materials, self.config, self.ranks,
                lengths=trainer.plan.lengths, stops=trainer.stops,
            )  # fmt: skip
        self._start()

    def _start(self) -> None:
        present = components_of(self.model)
        self.model.freeze([name for name in present if name not in self.phase.trainable])
        self.model.train()
        groups = parameter_groups(self.model, self.phase, self.config.optim)
        section = self.config.optim
        self.optimizer = torch.optim.AdamW(groups, betas=section.betas, eps=section.eps, fused=True)
        components = [group["name"].split("/")[0] for group in groups]
        self.courses: list[Callable[[int], float]] = [
            partial(lr_factor, phase=self.phase, component=name) for name in components
        ]
        self._prepare()

    def segment(self, steps: int) -> float:
        """Train; return the last loss."""
        for _ in range(steps):
            _, _, micro_batches = next(self.batches)
            self.model.quantizer.set_progress(self.done / self.phase.steps)
            loss = self._step(micro_batches)
            self.done += 1
        return float(loss)

    @abstractmethod
    def _prepare(self) -> None:
        """Make what a step needs beside model and optimizer."""

    @abstractmethod
    def _step(self, micro_batches: list[Batch]) -> torch.Tensor:
        """Take an optimizer step; return the last loss."""

    def _move_codebooks(self, stats: Any) -> None:
        if stats is not None:
            self.model.quantizer.update(stats)


class BareTorch(Bare):
    """Forward, backward, clip, AdamW; one rank."""

    def _prepare(self) -> None:
        if self.ranks.world > 1 or self.ds_file.precision != "fp32":
            raise SystemExit("--against torch takes one rank and float32")
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.scheduler = LambdaLR(self.optimizer, self.courses)

    def _step(self, micro_batches: list[Batch]) -> torch.Tensor:
        self.optimizer.zero_grad()
        stats = None
        for batch in micro_batches:
            output = self.model(batch.to(self.ranks.device), weights=self.weights)
            (output.loss / len(micro_batches)).backward()
            stats = output.stats if stats is None else stats + output.stats
        torch.nn.utils.clip_grad_norm_(self.parameters, self.ds_file.clipping)
        self.optimizer.step()
        self.scheduler.step()
        self._move_codebooks(stats)
        return output.loss.detach()


class BareDeepSpeed(Bare):
    """`deepspeed.initialize` and its three verbs."""

    def _prepare(self) -> None:
        import deepspeed

        self.engine, _, _, _ = deepspeed.initialize(
            model=self.model,
            optimizer=self.optimizer,
            model_parameters=[p for g in self.optimizer.param_groups for p in g["params"]],
            lr_scheduler=lambda inner: LambdaLR(inner, self.courses),
            config={"log_level": "error", **self.ds_file.raw},
            dist_init_required=False,
        )

    def _step(self, micro_batches: list[Batch]) -> torch.Tensor:
        stats = None
        for batch in micro_batches:
            batch = batch.to(self.ranks.device, DTYPES[self.ds_file.precision])
            output = self.engine(batch, weights=self.weights)
            self.engine.backward(output.loss)
            self.engine.step()
            stats = output.stats if stats is None else stats + output.stats
        if self.engine.was_step_applied():
            self._move_codebooks(stats)
        return output.loss.detach()


def _batches(trainer: Trainer) -> Any:
    ds_file, ranks, materials = trainer.ds_file, trainer.ranks, trainer.materials
    return train_batches(
        materials.train,
        trainer.plan,
        materials.tokenizer,
        materials.info.sessions,
        materials.augment,
        seed=trainer.config.run.seed,
        micro_batch=ds_file.micro_batch,
        accumulation=ds_file.accumulation,
        rank=ranks.rank,
        world=ranks.world,
        workers=trainer.config.data.workers,
        max_tokens=trainer.config.data.max_text_tokens,
    )
