"""Another number of ranks than before: the same global batch, cut another way."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from b2t.counted import counted
from b2t.errors import UserError
from b2t.log import logger
from b2t.run_files import CHECKPOINTS, STATE_FILE, STEP_PREFIX
from b2t.train.checkpoint import CheckpointStore
from b2t.train.ds_config import DeepSpeedFile


def keep_global_batch(ds_file: DeepSpeedFile, run_dir: Path, world: int) -> DeepSpeedFile:
    """Cut the global batch of the run that is to be continued for `world` ranks.

    A file that was changed since by the user is left alone: the run then refuses it.

    Raises:
        UserError: the global batch does not divide by `world`.
    """
    state = newest_state(run_dir / CHECKPOINTS)
    if state is None:
        return ds_file
    wanted = global_batch_of(state)
    if wanted == ds_file.global_batch(world) or _per_rank(ds_file.raw) != _per_rank(
        state["deepspeed"]
    ):
        return ds_file
    if wanted % world:
        raise UserError(
            f"run.dir={run_dir} holds a run of global batch {wanted} on {state['world']} ranks, "
            f"which {world} ranks cannot share equally: use a number of ranks that divides "
            f"{wanted}, or another run.dir"
        )
    micro, accumulation = cut_share(wanted // world, ds_file.micro_batch)
    if micro != ds_file.micro_batch and state["config"]["data"].get("max_frames") is not None:
        raise UserError(
            f"run.dir={run_dir} holds a run of {wanted // ds_file.micro_batch} micro-batches of at "
            f"most data.max_frames per step, which {world} ranks cannot share equally: use a "
            "number of ranks that divides them"
        )
    logger(__name__).warning(
        "%s continue a run of %d: the global batch stays %d = %d × %d accumulated × %d "
        "(%s says %d × %d)",
        counted(world, "rank"), state["world"], wanted, micro, accumulation, world,
        ds_file.path, ds_file.micro_batch, ds_file.accumulation,
    )  # fmt: skip
    return replace(ds_file, micro_batch=micro, accumulation=accumulation)


def cut_share(trials: int, micro_batch: int) -> tuple[int, int]:
    """Return micro-batch, of at most ``micro_batch``, and accumulation for a rank's ``trials``."""
    micro = next(size for size in range(micro_batch, 0, -1) if trials % size == 0)
    return micro, trials // micro


def global_batch_of(state: dict[str, Any]) -> int:
    """Global batch of the run whose checkpoint holds this state."""
    micro, accumulation = _per_rank(state["deepspeed"])
    return int(state.get("global_batch", micro * accumulation * state["world"]))


def _per_rank(raw: dict[str, Any]) -> tuple[int, int]:
    return raw["train_micro_batch_size_per_gpu"], raw["gradient_accumulation_steps"]


def newest_state(folder: Path) -> dict[str, Any] | None:
    """State of the newest checkpoint that can be read; all of a run have one global batch."""
    store = CheckpointStore(folder)
    for step in reversed(store.steps()):
        try:
            return json.loads((folder / f"{STEP_PREFIX}{step:08d}" / STATE_FILE).read_text("utf-8"))
        except (OSError, ValueError):
            continue
    return None
