"""The plan of a run: memory, largest micro-batch, work, traffic, time, money, scaling."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from b2t.config import Config, PhaseConfig
from b2t.train.ds_config import DeepSpeedFile
from b2t.train.engine import DTYPES
from b2t.train.planning.machines import Cluster
from b2t.train.planning.memory import MemoryPlan, partitions, plan_memory
from b2t.train.planning.pace import pace, scaling
from b2t.train.planning.trace import MicroStep, trace_step
from b2t.train.planning.traffic import grouped, plan_traffic
from b2t.train.planning.workload import Workload, meta_model

WORLDS = (8, 64, 512)
_MOST = 4096
"""Trials of a micro-batch beyond which nobody asks."""


@dataclass
class Planner:
    """Plans a run of a configuration; each phase is traced once for each size that is asked for.

    Args:
        config: the resolved configuration.
        ds_file: the checked DeepSpeed file.
        world: GPUs.
        workload: what trials look like.
    """

    config: Config
    ds_file: DeepSpeedFile
    world: int
    workload: Workload
    _traced: dict[tuple, MicroStep] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = meta_model(self.config, self.workload)
        self._knobs = self.config.model.activation_checkpointing
        self._checkpointing(True)

    def _checkpointing(self, on: bool) -> None:
        knobs = self._knobs
        chosen = (knobs.encoder, knobs.signal_decoder, knobs.text_decoder) if on else (0, 0, 0)
        self.model.checkpoint_activations(*chosen)

    def step(self, phase: PhaseConfig, micro_batch: int, bins: int) -> MicroStep:
        """Trace a phase with this many trials of this length."""
        key = (phase.name, micro_batch, bins)
        if key not in self._traced:
            self._traced[key] = trace_step(
                phase, self.model, self.workload, micro_batch,
                DTYPES[self.ds_file.precision], bins,
                usage=bins == self.workload.typical_bins,  # memory does not ask for it
            )  # fmt: skip
        return self._traced[key]

    def memory(self, phase: PhaseConfig, micro_batch: int | None = None) -> MemoryPlan:
        """Plan the memory of a phase at a micro-batch, by default the file's."""
        micro = micro_batch or self.ds_file.micro_batch
        step = self.step(phase, micro, self.workload.bins)
        file = replace(self.ds_file, micro_batch=micro)
        return plan_memory(
            self.model, phase, self.config.optim, file, self.world, self.workload, step
        )

    def largest_micro_batch(self, phase: PhaseConfig, room: float) -> int:
        """Most trials of the longest kind that fit in ``room`` bytes; 0 where not even one does.

        Memory is nearly a straight line over the micro-batch: where that reaches ``room`` is tried.
        """

        def peak(size: int) -> int:
            return self.memory(phase, size).peak

        if peak(1) > room:
            return 0
        low, known = 1, (1, max(2, self.ds_file.micro_batch))
        for _ in range(8):
            first, last = (peak(size) for size in known)
            slope = (last - first) / (known[1] - known[0])
            guess = known[0] + int((room - first) // slope) if slope > 0 else _MOST
            guess = min(max(guess, low), _MOST)
            if guess in known:
                break
            known = (known[1], guess) if guess > known[1] else (known[0], guess)
            low = guess if peak(guess) <= room else low
        while low > 1 and peak(low) > room:
            low -= 1
        return max([low, *(size for size in known if peak(size) <= room)])

    def without_checkpointing(self, phase: PhaseConfig) -> MemoryPlan:
        """Plan the memory of a phase that keeps all its activations."""
        traced, self._traced = self._traced, {}
        self._checkpointing(False)
        try:
            return self.memory(phase)
        finally:
            self._traced = traced
            self._checkpointing(True)

    def plan(self, room: float, cluster: Cluster | None, price: float | None) -> dict[str, Any]:
        """Return everything as JSON values.

        Args:
            room: bytes of a GPU that a run may take.
            cluster: GPUs and links, None predicts no time.
            price: of one GPU for an hour, in any currency; None predicts no cost.
        """
        phases = self.config.phases
        memories = {phase.name: self.memory(phase) for phase in phases}
        worst = max(phases, key=lambda phase: memories[phase.name].peak)
        found: dict[str, Any] = {
            "workload": self.workload.source,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "gpus": self.world,
            "global_batch": self.ds_file.global_batch(self.world),
            "room_bytes": int(room),
            "phases": [self._phase(phase, memories[phase.name]) for phase in phases],
            "needs_most": worst.name,
            "fits": memories[worst.name].peak <= room,
            "largest_micro_batch": self.largest_micro_batch(worst, room),
            "peak_without_checkpointing_bytes": self.without_checkpointing(worst).peak,
        }
        if cluster is not None:
            found |= self._time(cluster, price)
        return found

    def _phase(self, phase: PhaseConfig, memory: MemoryPlan) -> dict[str, Any]:
        micro, times = self.ds_file.micro_batch, self.ds_file.accumulation
        step = self.step(phase, micro, self.workload.typical_bins)
        work = times * (sum(step.forward.flops) + sum(step.backward.flops))
        usage = sum(step.usage.flops) * times if times > 1 else 0.0
        messages = plan_traffic(
            self.model, phase, self.config.optim, self.ds_file, self.world, step
        )
        return {
            "name": phase.name,
            "steps": phase.steps,
            "memory_bytes": {**asdict(memory), "resident": memory.resident, "peak": memory.peak},
            "flops_per_gpu_and_step": work + usage + sum(step.moving.flops),
            "messages": [
                {**asdict(m), "bytes": m.total, "wire_bytes": m.wire(self.world)}
                for m in grouped(messages)
            ],
            "sent_bytes": sum(m.wire(self.world) for m in messages),
        }

    def _time(self, cluster: Cluster, price: float | None) -> dict[str, Any]:
        paces, hours = [], 0.0
        for phase in self.config.phases:
            found = self._pace(phase, cluster)
            hours += found["hours"]
            paces.append(found)
        longest = max(self.config.phases, key=lambda p: _hours(paces, p.name))
        return {
            "gpu": cluster.gpu, "link": cluster.link, "network": cluster.network,
            "gpus_per_host": cluster.per_host, "assumed": asdict(cluster.assumed),
            "pace": paces, "hours": hours, "gpu_hours": hours * self.world,
            "price": price, "cost": None if price is None else price * hours * self.world,
            "scaling_of": longest.name, "scaling": self._scaling(longest, cluster),
        }  # fmt: skip

    def _pace(self, phase: PhaseConfig, cluster: Cluster) -> dict[str, Any]:
        file, optim, world = self.ds_file, self.config.optim, self.world
        step = self.step(phase, file.micro_batch, self.workload.typical_bins)
        parts = partitions(self.model, phase, optim, world)
        messages = plan_traffic(self.model, phase, optim, file, world, step)
        found = pace(step, file, messages, cluster, world, sum(parts.shares))
        return {
            "name": phase.name, **asdict(found), "seconds": found.seconds,
            "steps_per_s": 1 / found.seconds, "bottleneck": found.bottleneck,
            "hours": phase.steps * found.seconds / 3600,
        }  # fmt: skip

    def _scaling(self, phase: PhaseConfig, cluster: Cluster) -> list[dict[str, Any]]:
        optim, bins = self.config.optim, self.workload.typical_bins
        worlds = sorted({self.world, *WORLDS})
        return scaling(
            self.ds_file, self.world, worlds, cluster,
            traced=lambda micro: self.step(phase, micro, bins),
            sent=lambda file, ranks: plan_traffic(
                self.model, phase, optim, file, ranks, self.step(phase, file.micro_batch, bins)
            ),
            share_of=lambda ranks: sum(partitions(self.model, phase, optim, ranks).shares),
        )  # fmt: skip


def _hours(paces: list[dict[str, Any]], name: str) -> float:
    return next(found["hours"] for found in paces if found["name"] == name)
