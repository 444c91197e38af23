"""Memory of one rank, part by part: what DeepSpeed's engine keeps, and what a step adds to it.

Parts of ZeRO-1 and 2 follow DeepSpeed 0.19 (`runtime/zero/stage_1_and_2.py`); those of ZeRO-3 and
offload are estimates.
"""

from dataclasses import dataclass
from typing import Any

import torch

from b2t.config import OptimConfig, PhaseConfig
from b2t.model.brain_to_text import BrainToText
from b2t.train.ds_config import DeepSpeedFile
from b2t.train.engine import DTYPES, parameter_groups
from b2t.train.phase import components
from b2t.train.planning.trace import MicroStep
from b2t.train.planning.workload import Workload


@dataclass(frozen=True)
class Partitions:
    """How ZeRO deals the trained weights out.

    Attributes:
        trained: elements that a phase trains.
        shares: elements of each parameter group that one rank updates, padded.
        owned: elements of the weights that have a part in the share of one rank, whole; the most
            of any rank.
        largest: elements of the largest weight.
    """

    trained: int
    shares: tuple[int, ...]
    owned: int
    largest: int


def partitions(
    model: BrainToText, phase: PhaseConfig, optim: OptimConfig, world: int
) -> Partitions:
    """Deal the weights of a phase out to ``world`` ranks as ZeRO does."""
    model.freeze([name for name in components(model) if name not in phase.trainable])
    shares, owned, sizes = [], [0] * world, []
    for group in parameter_groups(model, phase, optim):
        numels = [p.numel() for p in group["params"]]
        share = -(-sum(numels) // (2 * world)) * 2  # padded to an even number each
        shares.append(share)
        sizes += numels
        start = 0
        for numel in numels:
            for rank in range(start // share, (start + numel - 1) // share + 1):
                owned[rank] += numel
            start += numel
    return Partitions(sum(sizes), tuple(shares), max(owned), max(sizes))


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank at the worst moment of a step.

    Attributes:
        weights: in the engine's precision; this rank's part under ZeRO-3.
        optimizer: float32 masters, Adam's moments and averaged weights of this rank's share.
        codebooks: and their averages, float32 on every rank.
        batches: of one step, on the device together.
        gradients: of this rank's share, kept from micro-batch to micro-batch.
        training: most of forward and backward: activations, buckets, gradients as they come.
        stepping: most of the optimizer step, which comes when `training` is over.
        updating: most of the codebook update, which comes after that.
        host: bytes in the host's memory: float32 copies of all weights, and what is offloaded.
    """

    weights: int
    optimizer: int
    codebooks: int
    batches: int
    gradients: int
    training: int
    stepping: int
    updating: int
    host: int

    @property
    def resident(self) -> int:
        """Held between two steps."""
        return self.weights + self.optimizer + self.codebooks

    @property
    def peak(self) -> int:
        """Most at any time."""
        training = self.gradients + self.training
        return self.resident + self.batches + max(training, self.stepping, self.updating)


def plan_memory(
    model: BrainToText,
    phase: PhaseConfig,
    optim: OptimConfig,
    ds_file: DeepSpeedFile,
    world: int,
    workload: Workload,
    step: MicroStep,
) -> MemoryPlan:
    """Add up the memory of one rank in a phase.

    Args:
        model: on the meta device.
        phase: what is trained.
        optim: settings of the optimizer.
        ds_file: precision, ZeRO stage, buckets.
        world: ranks.
        workload: what trials look like.
        step: the phase's traced step at the micro-batch of ``ds_file``.
    """
    width = DTYPES[ds_file.precision].itemsize
    parts = partitions(model, phase, optim, world)
    weights = sum(p.numel() for p in model.parameters())
    share, largest = sum(parts.shares), max(parts.shares)
    outputs = step.after + _statistics(model)
    live, held, arriving = _of_stage(ds_file, parts, weights, world)
    # The sums of codes travel, flat, while the last micro-batch goes backward.
    sent = _statistics(model) if world > 1 and step.stats is not None else 0
    kept = held if ds_file.accumulation > 1 or ds_file.zero_stage == 3 else 0
    if ds_file.zero_stage:
        training = _in_backward(
            model, step, _buckets(ds_file, width), _bucket_size(ds_file), arriving
        )
    else:
        training = _in_plain_backward(model, step, grows=not kept)
    return MemoryPlan(
        weights=live,
        optimizer=_optimizer_bytes(ds_file, share, parts.trained, optim.weight_ema is not None),
        codebooks=sum(b.numel() * b.element_size() for b in model.buffers()),
        batches=ds_file.accumulation * batch_bytes(workload, ds_file),
        gradients=kept,
        training=training + (outputs if ds_file.accumulation > 1 else 0) + sent,
        stepping=outputs + held + (_flat_bytes(ds_file) * largest if ds_file.zero_stage else 0),
        updating=outputs + step.update + sent,
        host=4 * weights + ((20 if optim.weight_ema else 16) * share if ds_file.offload else 0),
    )


def _optimizer_bytes(ds_file: DeepSpeedFile, share: int, trained: int, averaged: bool) -> int:
    """Bytes of a rank's masters, moments and averages; without ZeRO masters are the weights."""
    if ds_file.offload:
        return 0  # averages lie beside the masters, in the host's memory
    of_each = 4 if averaged else 0
    return (12 + of_each) * share if ds_file.zero_stage else (8 + of_each) * trained


def _of_stage(
    ds_file: DeepSpeedFile, parts: Partitions, weights: int, world: int
) -> tuple[int, int, int]:
    """Bytes of weights, of gradients at the end of a step, and of those that backward brings."""
    width, share = DTYPES[ds_file.precision].itemsize, sum(parts.shares)
    if not ds_file.zero_stage:
        return width * weights, width * parts.trained, 0
    if ds_file.zero_stage == 3:
        zero = zero_section(ds_file)
        gathered = min(weights, int(zero.prefetch_bucket_size) + parts.largest)
        return width * (share + gathered), width * share, 0
    live = width * (weights - parts.trained + share * world)
    if ds_file.offload:
        return live, width * 2 * parts.largest, 0
    owned = width * parts.owned
    # ZeRO-1 keeps all gradients until the last micro-batch, and then this rank's once more.
    return live, owned if ds_file.zero_stage == 2 else width * parts.trained, owned


def _in_backward(
    model: BrainToText, step: MicroStep, buckets: int, bucket_size: int, arriving: int
) -> int:
    """Most bytes of a micro-batch: activations, buckets, and this rank's gradients.

    Buckets are there from the first gradient on, this rank's gradients from the first bucket that
    is full.
    """
    numels = {name: p.numel() for name, p in model.named_parameters()}
    most, extra, filled = step.peak, 0, 0
    for name, peak in step.gradients:
        most = max(most, peak + extra)
        extra = max(extra, buckets)
        if filled + numels[name] > bucket_size:
            extra, filled = buckets + arriving, 0
        filled += numels[name]
    return max(most, step.ending + buckets + arriving)


def _in_plain_backward(model: BrainToText, step: MicroStep, grows: bool) -> int:
    """Most bytes of a micro-batch without ZeRO; gradients stay where they are, and may be new."""
    numels = {name: p.numel() for name, p in model.named_parameters()}
    most, held = step.peak, 0
    for name, peak in step.gradients:
        most = max(most, peak + held)
        held += 4 * numels[name] if grows else 0
    return max(most, step.ending + held)


def _flat_bytes(ds_file: DeepSpeedFile) -> int:
    """Bytes for each weight of a group's share, flat in the engine's precision and in float32."""
    return 0 if ds_file.offload else 4 + DTYPES[ds_file.precision].itemsize


def _buckets(ds_file: DeepSpeedFile, width: int) -> int:
    zero = zero_section(ds_file)
    if ds_file.zero_stage < 3 and not (zero.contiguous_gradients or ds_file.offload):
        return 0
    return width * int(zero.reduce_bucket_size) * (2 if zero.overlap_comm else 1)


def _bucket_size(ds_file: DeepSpeedFile) -> int:
    return int(zero_section(ds_file).reduce_bucket_size)


def zero_section(ds_file: DeepSpeedFile) -> Any:
    """Return the file's `zero_optimization` with DeepSpeed's own defaults."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return DeepSpeedZeroConfig(**ds_file.raw["zero_optimization"])


def _statistics(model: BrainToText) -> int:
    """Bytes of the codebook statistics that wait for the step's end."""
    if model.quantizer is None:
        return 0
    books = model.quantizer.codebooks
    return 4 * books.embed.numel() + 8 * books.ema_count.numel()


def batch_bytes(workload: Workload, ds_file: DeepSpeedFile) -> int:
    """Bytes of one micro-batch of the longest trials on the device."""
    with torch.device("meta"):
        batch = workload.batch(ds_file.micro_batch, DTYPES[ds_file.precision])
    tensors = [t for t in vars(batch).values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
