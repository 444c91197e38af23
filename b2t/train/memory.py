"""Memory of one rank, estimated before anything is built."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from b2t.config import PhaseConfig
from b2t.train.ds_config import DeepSpeedFile

GIB = 2**30
_WIDTH = {"fp16": 2, "bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, activations not counted.

    Attributes:
        weights: parameters in the engine's precision, this rank's share under ZeRO-3.
        gradients: of trained parameters, this rank's share under ZeRO-2 and ZeRO-3.
        optimizer: float32 masters and Adam's moments, this rank's share; 0 under CPU offload, and
            no masters without ZeRO.
        buffers: codebooks and their averages.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.buffers


def estimate_memory(
    model: nn.Module, phase: PhaseConfig, ds_file: DeepSpeedFile, world: int
) -> Memory:
    """Estimate the bytes that a phase keeps on each device between micro-batches."""
    width = _WIDTH[ds_file.precision]
    trained = sum(
        p.numel()
        for name in phase.trainable
        if getattr(model, name, None) is not None
        for p in getattr(model, name).parameters()
    )
    share = -(-trained // world)
    weights = sum(p.numel() for p in model.parameters())
    return Memory(
        weights=width * (-(-weights // world) if ds_file.zero_stage == 3 else weights),
        gradients=width * (share if ds_file.zero_stage >= 2 else trained),
        optimizer=0 if ds_file.offload else (12 if ds_file.zero_stage else 8) * share,
        buffers=sum(b.numel() * b.element_size() for b in model.buffers()),
    )


def describe_memory(
    model: nn.Module, phases: Sequence[PhaseConfig], ds_file: DeepSpeedFile, world: int
) -> str:
    """Return the estimate of the phase that needs most, in words."""
    phase = max(phases, key=lambda p: estimate_memory(model, p, ds_file, world).total)
    memory = estimate_memory(model, phase, ds_file, world)
    parts = [
        f"{name} {getattr(memory, name) / GIB:.2f}"
        for name in ("weights", "gradients", "optimizer", "buffers")
    ]
    return (
        f"about {memory.total / GIB:.2f} GiB per rank before activations in phase {phase.name} "
        f"({', '.join(parts)})"
    )
