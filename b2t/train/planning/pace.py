"""Time of a step on named GPUs and links, what it goes into, and how it scales."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from b2t.train.ds_config import DeepSpeedFile
from b2t.train.planning.machines import Cluster
from b2t.train.planning.trace import Kernels, MicroStep
from b2t.train.planning.traffic import Message
from b2t.train.world_size import cut_share

_ADAM_BYTES = 30
"""Read and written for each weight of the share: gradient, master, two moments, 16-bit weight."""

Traced = Callable[[int], MicroStep]
"""A phase's step at a micro-batch."""
Sent = Callable[[DeepSpeedFile, int], Sequence[Message]]
"""Collectives of a step for a DeepSpeed file and a number of ranks."""


@dataclass(frozen=True)
class Pace:
    """Seconds of one optimizer step, by what they are spent on.

    Attributes:
        arithmetic: operators bound by matrix products.
        memory: operators bound by the memory's bandwidth, Adam among them.
        launches: operators too small for the GPU: the host is slower.
        communication: collectives that nothing hides.
        hidden: collectives beside backward, not in the sum.
    """

    arithmetic: float
    memory: float
    launches: float
    communication: float
    hidden: float

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.arithmetic + self.memory + self.launches + self.communication

    @property
    def bottleneck(self) -> str:
        """What the largest part of the step goes into."""
        parts = {n: v for n, v in asdict(self).items() if n != "hidden"}
        return max(parts, key=parts.__getitem__)


def pace(
    step: MicroStep, ds_file: DeepSpeedFile, messages: Sequence[Message],
    cluster: Cluster, world: int, share: int,
) -> Pace:  # fmt: skip
    """Predict the seconds of a step by a roofline of each operator and a ring for each collective.

    Args:
        step: the traced step at the file's micro-batch, of typical trials.
        ds_file: accumulation.
        messages: collectives of a step.
        cluster: GPUs and links.
        world: ranks.
        share: weights that one rank's optimizer updates.
    """
    times = ds_file.accumulation
    usage = times if times > 1 else 0
    runs = [(step.forward, times), (step.backward, times), (step.usage, usage), (step.moving, 1)]
    spent = [0.0, 0.0, 0.0]
    for kernels, repeated in runs:
        for part, seconds in enumerate(_bound_by(kernels, cluster)):
            spent[part] += repeated * seconds
    if not ds_file.offload:
        spent[1] += _ADAM_BYTES * share / (cluster.bandwidth * cluster.assumed.memory_efficiency)
    backward = times * sum(_bound_by(step.backward, cluster))
    beside = sum(_seconds(m, cluster, world) for m in messages if m.overlaps)
    alone = sum(_seconds(m, cluster, world) for m in messages if not m.overlaps)
    arithmetic, memory, launches = spent
    return Pace(
        arithmetic, memory, launches, alone + max(0.0, beside - backward), min(beside, backward)
    )


def _bound_by(kernels: Kernels, cluster: Cluster) -> tuple[float, float, float]:
    """Seconds of operators bound by arithmetic, by memory and by their launch."""
    assumed = cluster.assumed
    rates = (cluster.flops * assumed.efficiency, cluster.bandwidth * assumed.memory_efficiency)
    bound = kernels.seconds(*rates, assumed.launch_s)
    largest = bound.argmax(0)
    taken = bound.max(0)
    arithmetic, memory, launches = (float(taken[largest == part].sum()) for part in range(3))
    return arithmetic, memory, launches


def _seconds(message: Message, cluster: Cluster, world: int) -> float:
    on_wire = message.wire(world) / cluster.rate(world)
    return on_wire + message.times * cluster.latency(world)


def scaling(
    ds_file: DeepSpeedFile, world: int, worlds: Sequence[int], cluster: Cluster,
    traced: Traced, sent: Sent, share_of: Callable[[int], int],
) -> list[dict[str, Any]]:  # fmt: skip
    """Predict other numbers of GPUs: weak with the same work for each, strong with the same batch.

    Args:
        ds_file: the file as it is for ``world`` GPUs.
        world: GPUs that 100 % efficiency is measured at.
        worlds: numbers of GPUs.
        cluster: GPUs and links.
        traced: the step at a micro-batch.
        sent: collectives.
        share_of: weights that one of so many ranks updates.
    """

    def predict(file: DeepSpeedFile, ranks: int) -> Pace:
        step = traced(file.micro_batch)
        return pace(step, file, sent(file, ranks), cluster, ranks, share_of(ranks))

    trials = ds_file.global_batch(world)
    base = trials / predict(ds_file, world).seconds / world
    found: list[dict[str, Any]] = []
    for kind in ("weak", "strong"):
        for ranks in worlds:
            file = ds_file
            if kind == "strong":
                if trials % ranks:
                    found.append({"kind": kind, "gpus": ranks, "impossible": f"{trials} trials"})
                    continue
                micro, accumulation = cut_share(trials // ranks, ds_file.micro_batch)
                file = replace(ds_file, micro_batch=micro, accumulation=accumulation)
            step = predict(file, ranks)
            rate = file.global_batch(ranks) / step.seconds
            found.append({
                "kind": kind, "gpus": ranks, "micro_batch": file.micro_batch,
                "accumulation": file.accumulation, "global_batch": file.global_batch(ranks),
                "steps_per_s": 1 / step.seconds, "trials_per_s": rate,
                "efficiency": rate / ranks / base, "bottleneck": step.bottleneck,
            })  # fmt: skip
    return found
