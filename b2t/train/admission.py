"""Whether a run begins, goes on from a checkpoint, or is refused because it is another one."""

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from b2t.config import Config, completed
from b2t.errors import UserError
from b2t.log import logger
from b2t.records import write_atomically
from b2t.run_files import CONFIG_FILE
from b2t.train.checkpoint import Checkpoint
from b2t.train.ds_config import DeepSpeedFile
from b2t.train.ranks import Ranks
from b2t.train.started import keep_start
from b2t.train.trainer import Trainer
from b2t.train.world_size import global_batch_of

log = logger(__name__)


def prepare_run(trainer: Trainer, resume: str) -> bool:
    """Make the run folder or continue it; True where there is nothing left to train.

    Raises:
        UserError: the folder holds another run.
    """
    config, ranks = trainer.config, trainer.ranks
    folder = config.run.dir
    if ranks.is_main:
        trainer.store.recover()
    ranks.place = "reading the checkpoint"
    ranks.barrier()
    checkpoint = trainer.store.load()
    require_same_checkpoint(ranks, checkpoint, folder)
    if checkpoint is not None:
        if resume == "never":
            raise UserError(
                f"run.dir={folder} holds a run and --resume never was given: choose another "
                "run.dir, or delete the folder"
            )
        refuse_other_run(
            checkpoint.state,
            config,
            trainer.ds_file,
            ranks.world,
            trainer.materials.fingerprint,
        )
        trainer.restore(checkpoint)
        log.info(
            "resuming %s at step %d (phase %s, %d ranks then, %d now)",
            folder,
            trainer.progress.step,
            trainer.phase.name,
            checkpoint.state["world"],
            ranks.world,
        )
    _claim_folder(trainer)
    return trainer.progress.finished


def _claim_folder(trainer: Trainer) -> None:
    """Make the run folder, and write down there what the run is. Collective.

    Raises:
        UserError: on all ranks, where rank 0 cannot write it.
    """
    config, folder, ranks = trainer.config, trainer.config.run.dir, trainer.ranks
    error = None
    if ranks.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / CONFIG_FILE, config.to_yaml())
            keep_start(config, trainer.model)
            trainer.store.folder.mkdir(exist_ok=True)
        except OSError as problem:
            error = f"run.dir={folder}: cannot be written ({problem}); choose another run.dir"
    error = ranks.from_main(error)
    if error:
        raise UserError(error)


def require_same_checkpoint(ranks: Ranks, checkpoint: Checkpoint | None, folder: Path) -> None:
    """Refuse ranks that found different checkpoints, as on hosts that do not share a disk.

    Raises:
        UserError: on all ranks.
    """
    step = None if checkpoint is None else checkpoint.state["progress"]["step"]
    found = ranks.gather((socket.gethostname(), step))
    if len({each for _, each in found}) > 1:
        seen = ", ".join(
            f"rank {rank} on {host} {'none' if each is None else f'step {each}'}"
            for rank, (host, each) in enumerate(found)
        )
        raise UserError(
            f"run.dir={folder}: the ranks find different checkpoints ({seen}); the folder must be "
            "on a disk that all hosts share"
        )


_MAY_DIFFER = (
    "run.dir", "data.path", "data.more.path", "data.workers", "log", "evaluation", "checkpoint",
    "monitor", "stability", "phases.evaluate_every", "phases.decode_trials",
)  # fmt: skip
"""Keys that a resumed run may change: they alter no weight."""


def refuse_other_run(
    state: dict[str, Any],
    config: Config,
    ds_file: DeepSpeedFile,
    world: int,
    fingerprint: str,
) -> None:
    """Refuse to continue a run with another configuration, batch or dataset.

    Args:
        state: of the run's checkpoint.
        config, ds_file: what is asked for now.
        world: number of ranks now.
        fingerprint: of the data now.

    Raises:
        UserError: names all that differs.
    """
    before = completed(state["config"])
    differences = list(_differences(before, config.model_dump(mode="json")))
    then, now = global_batch_of(state), ds_file.global_batch(world)
    if then != now:
        differences.append(f"global batch: {then} then, {now} now")
    clipping = state.get("deepspeed", {}).get("gradient_clipping", ds_file.clipping)
    if clipping != ds_file.clipping:
        differences.append(
            f"gradient_clipping: {clipping:g} then, {ds_file.clipping:g} now ({ds_file.path})"
        )
    if state["data_fingerprint"] != fingerprint:
        differences.append(f"data: fingerprint {state['data_fingerprint']} then, {fingerprint} now")
    if differences:
        raise UserError(
            f"run.dir={config.run.dir} holds a run that differs:\n  "
            + "\n  ".join(differences)
            + "\n  Give the same settings to go on, or another run.dir to start anew."
        )


def _differences(then: Any, now: Any, prefix: str = "") -> Iterator[str]:
    general = re.sub(r"\.\d+", "", prefix)
    if any(general == key or general.startswith(f"{key}.") for key in _MAY_DIFFER):
        return
    if isinstance(then, dict) and isinstance(now, dict):
        for key in {**then, **now}:
            yield from _differences(
                then.get(key), now.get(key), f"{prefix}.{key}" if prefix else key
            )
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for index, (a, b) in enumerate(zip(then, now, strict=True)):
            yield from _differences(a, b, f"{prefix}.{index}")
    elif then != now:
        short = [yaml.safe_dump(v, default_flow_style=True).split("\n...")[0] for v in (then, now)]
        yield f"{prefix}: {short[0].strip()} then, {short[1].strip()} now"
