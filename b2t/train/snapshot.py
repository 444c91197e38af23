"""What a checkpoint of a run holds, taken from its parts and given back to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from b2t.config import Config
from b2t.run_files import AVERAGE
from b2t.train import hook_states
from b2t.train.callback import Callback
from b2t.train.checkpoint import Checkpoint
from b2t.train.ds_config import DeepSpeedFile
from b2t.train.environment import versions
from b2t.train.progress import Progress
from b2t.train.ranks import Ranks


def take(
    *,
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
    averages: Mapping[str, Tensor],
    progress: Progress,
    callbacks: Sequence[Callback],
    numbers: Mapping[str, Any],
    origin: Mapping[str, Any],
) -> Checkpoint:
    """Return everything that continues the run exactly.

    Args:
        weights: exact float32 weights, and buffers, by name.
        moments: Adam's moments, whole, by `name/moment`.
        averages: averaged weights by name.
        progress: the clocks.
        callbacks: hooks whose state is taken.
        numbers: `engine`, the counters of the phase's engine, and `window`, the sums since the
            last record; None each between phases.
        origin: what `origin` returned.
    """
    values, tensors = hook_states.taken_from(callbacks)
    averaged = {f"{AVERAGE}{name}": value for name, value in averages.items()}
    state = {"progress": progress.to_dict(), **numbers, "callbacks": values, **origin}
    return Checkpoint(weights, {**moments, **averaged, **tensors}, state)


def origin(
    config: Config, ds_file: DeepSpeedFile, ranks: Ranks, data_fingerprint: str
) -> dict[str, Any]:
    """Describe what made a checkpoint, for whoever goes on from it."""
    return {
        "config": config.model_dump(mode="json"),
        "deepspeed": ds_file.raw,
        "world": ranks.world,
        "global_batch": ds_file.global_batch(ranks.world),
        "data_fingerprint": data_fingerprint,
        "versions": versions(),
    }


def restore_weights(
    checkpoint: Checkpoint, model: nn.Module, masters: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Set masters and buffers; return the averages."""
    for name, value in checkpoint.weights.items():
        if name in masters:
            masters[name] = value
    for name, buffer in model.named_buffers():
        if name in checkpoint.weights:
            buffer.data = checkpoint.weights[name].to(buffer.device)
    return hook_states.under(AVERAGE, checkpoint.moments)


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    masters: dict[str, Tensor],
    callbacks: Sequence[Callback],
) -> tuple[Progress, dict[str, Tensor]]:
    """Set masters, buffers and hooks; return the clocks and the averages.

    Engine and window follow with a phase.
    """
    averages = restore_weights(checkpoint, model, masters)
    hook_states.given_back(callbacks, checkpoint.state["callbacks"], checkpoint.moments)
    return Progress.from_dict(checkpoint.state["progress"]), averages
