"""What a checkpoint of a run holds, taken from the trainer and given back to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from b2t.train.callbacks import versions
from b2t.train.checkpoint import Checkpoint
from b2t.train.progress import Progress

if TYPE_CHECKING:
    from b2t.train.trainer import Trainer

_AVERAGE = "weight_ema:"
"""Prefix of averaged weights among the tensors beside the weights."""


def take(
    trainer: Trainer,
    masters: dict[str, Tensor],
    moments: dict[str, Tensor],
    engine: dict[str, Any] | None,
    window: dict[str, Any] | None,
) -> Checkpoint:
    """Return everything that continues the run exactly.

    Args:
        trainer: whose buffers, averages, progress and hooks are taken.
        masters: exact float32 weights by name.
        moments: Adam's moments, whole, by `name/moment`.
        engine: counters of the phase's engine, None between phases.
        window: sums since the last record, None between phases.
    """
    numbers, tensors = _callback_states(trainer)
    averages = {f"{_AVERAGE}{name}": value for name, value in trainer.averages.items()}
    state = {
        "progress": trainer.progress.to_dict(),
        "engine": engine,
        "window": window,
        "callbacks": numbers,
        "config": trainer.config.model_dump(mode="json"),
        "deepspeed": trainer.ds_file.raw,
        "world": trainer.ranks.world,
        "global_batch": trainer.ds_file.global_batch(trainer.ranks.world),
        "data_fingerprint": trainer.materials.info.fingerprint,
        "versions": versions(),
    }
    buffers = dict(trainer.model.named_buffers())
    return Checkpoint({**masters, **buffers}, {**moments, **averages, **tensors}, state)


def restore(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Set progress, masters, buffers, averages and hooks; engine and window follow with a phase."""
    trainer.progress = Progress.from_dict(checkpoint.state["progress"])
    for name, value in checkpoint.weights.items():
        if name in trainer.masters:
            trainer.masters[name] = value
    for name, buffer in trainer.model.named_buffers():
        if name in checkpoint.weights:
            buffer.data = checkpoint.weights[name].to(buffer.device)
    trainer.averages = _under(_AVERAGE, checkpoint.moments)
    for callback in trainer.callbacks:
        name = type(callback).__name__
        numbers = checkpoint.state["callbacks"].get(name, {})
        state = {**numbers, **_under(f"{name}:", checkpoint.moments)}
        if state:
            callback.load_state_dict(state)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose key begins with ``prefix``, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _callback_states(trainer: Trainer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """States of the hooks by class name: JSON values, and tensors under `Name:key`."""
    numbers: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for callback in trainer.callbacks:
        name = type(callback).__name__
        for key, value in callback.state_dict().items():
            if isinstance(value, Tensor):
                tensors[f"{name}:{key}"] = value
            else:
                numbers.setdefault(name, {})[key] = value
    return numbers, tensors
