"""One phase while it is trained: its engine, what it freezes, its averages and its batches."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from b2t.config import COMPONENTS, Config, PhaseConfig
from b2t.data.augment import Augment, AugmentCourse
from b2t.data.batches import (
    Batch,
    BatchPlan,
    Budget,
    SentenceRows,
    StreamedTrials,
    TrialRows,
    sentence_batches,
    train_batches,
)
from b2t.data.ramps import ramps_of
from b2t.data.trials import signal_lengths
from b2t.errors import UserError
from b2t.log import logger
from b2t.model.brain_to_text import BrainToText
from b2t.train.build import Materials, masking_of
from b2t.train.checkpoint import Checkpoint
from b2t.train.ds_config import DeepSpeedFile
from b2t.train.engine import PhaseEngine
from b2t.train.metric_names import active_losses
from b2t.train.plain import PlainEngine
from b2t.train.ranks import Ranks
from b2t.train.weight_ema import WeightEma
from b2t.train.zero3 import Zero3Engine

log = logger(__name__)

_ENGINES: dict[int, type[PhaseEngine]] = {0: PlainEngine, 3: Zero3Engine}
"""By ZeRO stage, where it is not `PhaseEngine`."""


class TrainedPhase:
    """The engine of a phase over the components that it trains; all others are frozen.

    Args:
        model: all components.
        config: the resolved configuration.
        number: of the phase, from 0.
        ds_file: the checked DeepSpeed file.
        masters: exact float32 weights by name; read here, written by `PhaseEngine.collect_masters`.
        averages: averaged weights to go on from, by name.
        restored: the checkpoint that the phase goes on from, None at its start.
        time_done: share of the phase's minutes that is over.

    Attributes:
        engine: DeepSpeed's, as this phase needs it.

    Raises:
        UserError: the model has none of the components that the phase trains.
    """

    def __init__(
        self,
        model: BrainToText,
        config: Config,
        number: int,
        ds_file: DeepSpeedFile,
        masters: dict[str, Tensor],
        averages: Mapping[str, Tensor],
        restored: Checkpoint | None,
        time_done: Callable[[], float],
    ) -> None:
        phase = config.phases[number]
        trained = [name for name in phase.trainable if getattr(model, name) is not None]
        model.freeze([name for name in components(model) if name not in trained])
        if not any(p.requires_grad for p in model.parameters()):
            raise UserError(
                f"phases.{number}.trainable: none of {phase.trainable} exists in this "
                "model (text_decoder needs text, phoneme_head needs phonemes)"
            )
        build = _ENGINES.get(ds_file.zero_stage, PhaseEngine)
        self.engine: PhaseEngine = build(model, phase, config.optim, ds_file, masters, time_done)
        if model.quantizer is not None and config.model.quantizer.update_rule == "gradient":
            # In any precision the engine's float32 master is where the optimizer moves the codes.
            model.quantizer.attach_master(self.engine.read, self.engine.write)
        if restored is not None and restored.state["engine"] is not None:
            self.engine.load_state(restored.moments, restored.state["engine"])
        decay = config.optim.weight_ema
        self._ema = None if decay is None else WeightEma(self.engine, decay, averages)
        model.train()
        log.info("phase %s: training %s", phase.name, ", ".join(trained))

    def update_averages(self, step: int) -> None:
        """Take the weights after `step` applied steps of the run into the averages."""
        if self._ema is not None:
            self._ema.update(step)

    def read_averages(self) -> dict[str, Tensor] | None:
        """Return the averages of the trained weights, whole; None without. Collective."""
        return None if self._ema is None else self._ema.collect()

    def gather_averages(self) -> dict[str, Tensor] | None:
        """Return the same on rank 0 alone, nothing elsewhere; None without. Collective."""
        return None if self._ema is None else self._ema.gather()

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Whole weights inside, the averaged ones where there are any. Collective."""
        with self.engine.whole():
            if self._ema is None:
                yield
            else:
                with self._ema.in_use():
                    yield


def components(model: BrainToText) -> list[str]:
    """Names of the components that a model has."""
    return [name for name in COMPONENTS if getattr(model, name) is not None]


def batch_plan(
    config: Config, materials: Materials, ds_file: DeepSpeedFile, world: int
) -> BatchPlan:
    """Return the order of the training trials on ``world`` ranks.

    Raises:
        UserError: there are fewer trials than a global batch, or one exceeds `data.max_frames`.
    """
    data, train = config.data, materials.train
    budget = None
    if materials.stream is not None:  # which plans its own batches; these are its first trials
        return BatchPlan(signal_lengths(train), min(len(train), ds_file.global_batch(world)))
    if data.max_frames is not None:
        budget = Budget(data.max_frames, ds_file.micro_batch, ds_file.accumulation * world)
    stratified = data.sessions == "stratified"
    return BatchPlan(
        signal_lengths(train),
        ds_file.global_batch(world),
        split=data.train_split,
        budget=budget,
        sessions=np.asarray(train["session"]) if stratified else None,
        weights=materials.weights,
    )


def phase_batches(
    config: Config,
    number: int,
    materials: Materials,
    plan: BatchPlan,
    ds_file: DeepSpeedFile,
    ranks: Ranks,
    consumed: int,
) -> Generator[list[Batch], None, None]:
    """Iterate over this rank's micro-batches of each step of a phase, without end; close it.

    Args:
        config: the resolved configuration.
        number: of the phase, from 0.
        materials: training trials, tokenizer and augmentation.
        plan: the order of the trials.
        ds_file: micro-batch and accumulation.
        ranks: whose share is read.
        consumed: global batches of the phase that are past.

    Raises:
        UserError: a text that is too long; in iterating, a trial that cannot be trained on.
    """
    if config.phases[number].text_from == "texts":
        return _sentences(config, number, materials, ds_file, ranks, consumed)
    if materials.stream is not None:
        return _streamed(config, number, materials, materials.stream, ds_file, consumed)
    epoch, position = plan.place(config.run.seed, number, consumed)
    loader = train_batches(
        materials.train,
        plan,
        materials.tokenizer,
        materials.info.sessions,
        _augment(config, number, materials),
        seed=config.run.seed,
        phase=number,
        epoch=epoch,
        position=position,
        consumed=consumed,
        micro_batch=ds_file.micro_batch,
        accumulation=ds_file.accumulation,
        rank=ranks.rank,
        world=ranks.world,
        workers=config.data.workers,
        max_tokens=config.data.max_text_tokens,
        masking=masking_of(config, number),
    )
    return _unpacked(loader)


def _sentences(
    config: Config,
    number: int,
    materials: Materials,
    ds_file: DeepSpeedFile,
    ranks: Ranks,
    consumed: int,
) -> Generator[list[Batch], None, None]:
    assert materials.sentences is not None
    rows = SentenceRows(
        materials.sentences,
        materials.tokenizer,
        materials.info.channels,
        seed=config.run.seed,
        phase=number,
        phrase_words=config.phases[number].phrase_words,
    )
    return sentence_batches(
        rows,
        consumed=consumed,
        micro_batch=ds_file.micro_batch,
        accumulation=ds_file.accumulation,
        rank=ranks.rank,
        world=ranks.world,
    )


def _streamed(
    config: Config,
    number: int,
    materials: Materials,
    source: StreamedTrials,
    ds_file: DeepSpeedFile,
    consumed: int,
) -> Generator[list[Batch], None, None]:
    rows = TrialRows(
        materials.train, None, materials.info.sessions, _augment(config, number, materials),
        seed=config.run.seed, phase=number, masking=masking_of(config, number),
    )  # fmt: skip
    return source.batches(
        rows,
        materials.tokenizer,
        micro_batch=ds_file.micro_batch,
        accumulation=ds_file.accumulation,
        consumed=consumed,
        max_frames=config.data.max_frames,
        max_tokens=config.data.max_text_tokens,
    )


def _unpacked(loader: Any) -> Generator[list[Batch], None, None]:
    try:
        for _, _, micro_batches in loader:
            yield micro_batches
    finally:
        loader.close()


def _augment(config: Config, number: int, materials: Materials) -> Augment | AugmentCourse | None:
    """What a phase does to its trials; nothing where it encodes no signal."""
    if not _hears(materials.model, config.phases[number]):
        return None
    rate = materials.info.sampling_rate
    if not ramps_of(config.phases[number].augment):
        return Augment(**config.augment_of(number).at_rate(rate).model_dump())
    return AugmentCourse(lambda step: config.augment_of(number, step).at_rate(rate))


def _hears(model: BrainToText, phase: PhaseConfig) -> bool:
    """Whether a phase encodes signals; one that learns text from labels alone need not."""
    others = active_losses(model, phase).keys() - {"generation"}
    return phase.text_from == "signals" or bool(others)
