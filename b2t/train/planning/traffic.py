"""What one rank hands to its collectives in an optimizer step, message by message."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from b2t.config import OptimConfig, PhaseConfig
from b2t.model.brain_to_text import BrainToText
from b2t.quantize.pending import sent_bytes
from b2t.train.ds_config import DeepSpeedFile
from b2t.train.engine import DTYPES, parameter_groups
from b2t.train.phase import components
from b2t.train.planning.memory import partitions, zero_section
from b2t.train.planning.trace import MicroStep
from b2t.train.step import COUNTED

Kind = Literal["all_reduce", "all_gather", "all_to_all", "reduce_scatter"]
_FLAGS = 4
"""What the step's opening sum carries beside `COUNTED`: padding, stop, problem, time."""


@dataclass(frozen=True)
class Message:
    """One collective of a step, or several of a size.

    Attributes:
        purpose: what is sent.
        kind: which collective.
        size: bytes of the tensor, of the gathered one in an `all_gather`.
        times: how often in a step.
        overlaps: it runs beside the computation of backward.
        network: it goes over the CPU's network, not the GPU's.
    """

    purpose: str
    kind: Kind
    size: int
    times: int = 1
    overlaps: bool = False
    network: bool = False

    @property
    def total(self) -> int:
        """Bytes in a step."""
        return self.size * self.times

    def wire(self, world: int) -> float:
        """Bytes that each rank sends in a step by a ring (Patarasuk & Yuan 2009)."""
        rounds = 2 if self.kind == "all_reduce" else 1
        return rounds * (world - 1) / world * self.total


def plan_traffic(
    model: BrainToText,
    phase: PhaseConfig,
    optim: OptimConfig,
    ds_file: DeepSpeedFile,
    world: int,
    step: MicroStep,
) -> list[Message]:
    """List the collectives of an applied step: exact for ZeRO-1 and 2, an estimate for ZeRO-3.

    Steps that revive codes also gather the frames to draw new ones from, and log steps what
    monitors compare; neither is in it.

    Args:
        model: on the meta device.
        phase: what is trained, on which losses.
        optim: settings of the optimizer.
        ds_file: precision, ZeRO stage, buckets, accumulation.
        world: ranks; one sends nothing.
        step: the phase's traced step.
    """
    if world == 1:
        return []
    model.freeze([name for name in components(model) if name not in phase.trainable])
    messages = [
        Message("counts and stop flags", "all_reduce", 8 * (len(COUNTED) + _FLAGS), network=True)
    ]
    messages += _quantizer(model, phase, ds_file, world, step)
    engine = _stage3 if ds_file.zero_stage == 3 else _stages_1_and_2
    messages += engine(model, phase, optim, ds_file, world, step)
    losses = 4 * (len(step.loss_names) + 1)
    return [*messages, Message("losses for the log", "all_reduce", losses)]


def _quantizer(
    model: BrainToText, phase: PhaseConfig, ds_file: DeepSpeedFile, world: int, step: MicroStep
) -> list[Message]:
    quantizer = model.quantizer
    if quantizer is None:
        return []
    found = []
    if {"diversity", "perplexity"} & {*step.loss_names}:
        once = ds_file.accumulation == 1 or phase.exact_regularizers
        times = 1 if once else ds_file.accumulation
        layers, codes = quantizer.num_quantizers, quantizer.codebook_size
        found = [
            Message("soft usage of codes", "all_reduce", 4 * layers * codes + 8 * layers, times)
        ]
    if step.stats is not None:
        sizes = sent_bytes(step.stats, quantizer.options, world)
        kinds: tuple[Kind, ...] = ("all_reduce", "all_to_all", "all_gather")
        hidden = (True, True, False)  # begun before the last backward, finished after it
        found += [
            Message("codebook statistics", kind, size, overlaps=overlaps)
            for kind, size, overlaps in zip(kinds, sizes, hidden, strict=False)
        ]
    return found


def _stages_1_and_2(
    model: BrainToText,
    phase: PhaseConfig,
    optim: OptimConfig,
    ds_file: DeepSpeedFile,
    world: int,
    step: MicroStep,
) -> list[Message]:
    zero = zero_section(ds_file)
    width = DTYPES[ds_file.precision].itemsize
    sent = ds_file.raw.get("communication_data_type")
    times = ds_file.accumulation if ds_file.zero_stage == 2 else 1
    order = [name for name, _ in step.gradients]
    if ds_file.zero_stage == 1 and not zero.overlap_comm:
        order = _by_groups(model, phase, optim, order)
    numels = {name: p.numel() for name, p in model.named_parameters()}
    sizes = bucket_sizes([numels[name] for name in order], int(zero.reduce_bucket_size))
    unit = width if sent is None else DTYPES[sent].itemsize
    found = [
        Message("gradients", "all_reduce", unit * size, times, overlaps=bool(zero.overlap_comm))
        for size in sizes
    ]
    if _looks_for_overflow(ds_file):
        found.append(Message("overflow flag", "all_reduce", 1))
    parts = partitions(model, phase, optim, world)
    norms = 4 if ds_file.offload else 8 * len(parts.shares)
    found.append(Message("gradient norms", "all_reduce", norms))
    return found + [
        Message("updated weights", "all_gather", width * share * world) for share in parts.shares
    ]


def _stage3(
    model: BrainToText,
    phase: PhaseConfig,
    optim: OptimConfig,
    ds_file: DeepSpeedFile,
    world: int,
    step: MicroStep,
) -> list[Message]:
    """Every weight that is not small is gathered for forward and again for backward."""
    width, times = DTYPES[ds_file.precision].itemsize, ds_file.accumulation
    small = int(zero_section(ds_file).param_persistence_threshold)
    split = width * sum(p.numel() for p in model.parameters() if p.numel() > small)
    trained = width * sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = width * sum(p.numel() for p in model.parameters() if p.numel() <= small)
    return [
        Message("weights for forward and backward", "all_gather", split, 2 * times, overlaps=True),
        Message("small weights after the step", "all_gather", kept),
        Message("gradients", "reduce_scatter", trained, times, overlaps=True),
    ]


def bucket_sizes(numels: Sequence[int], limit: int) -> list[int]:
    """Pack gradients into buckets as they come, as DeepSpeed does; one too large goes alone."""
    sizes, filled = [], 0
    for numel in numels:
        if filled + numel > limit:
            sizes.append(filled)
            filled = 0
        filled += numel
    return [size for size in [*sizes, filled] if size]


def _by_groups(
    model: BrainToText, phase: PhaseConfig, optim: OptimConfig, names: list[str]
) -> list[str]:
    by_weight = {p: name for name, p in model.named_parameters()}
    groups = parameter_groups(model, phase, optim)
    order = [by_weight[p] for group in groups for p in group["params"]]
    return [name for name in order if name in {*names}]


def _looks_for_overflow(ds_file: DeepSpeedFile) -> bool:
    section: dict[str, Any] = ds_file.raw.get("bf16", {})
    if ds_file.precision == "bf16":
        return bool(section.get("check_grad_overflow", True))
    return ds_file.precision == "fp16"


def grouped(messages: Sequence[Message]) -> list[Message]:
    """Join the messages of a purpose: their bytes are added, and their number."""
    found: dict[tuple[str, str], Message] = {}
    for message in messages:
        key = (message.purpose, message.kind)
        before = found.get(key)
        total = message.total + (before.total if before else 0)
        times = message.times + (before.times if before else 0)
        found[key] = replace(message, size=total // times, times=times)
    return list(found.values())
