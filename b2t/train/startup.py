"""Checks before the first step: one code on all ranks, room on disk, memory, a dry batch."""

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from b2t.config import Config
from b2t.config.flat import flattened
from b2t.data.verification import verify_sample
from b2t.errors import UserError
from b2t.log import logger
from b2t.records import existing_place, require_writable
from b2t.train.build import Materials
from b2t.train.dry_batch import DryBatch
from b2t.train.ds_config import DeepSpeedFile
from b2t.train.memory import GIB, describe_memory
from b2t.train.ranks import Ranks

log = logger(__name__)

_SAMPLE, _SAMPLE_SECONDS = 128, 2.0
"""Trials that a start compares with their checksums, and for how long at most."""


def check_start(
    config: Config,
    phase: int,
    materials: Materials,
    ds_file: DeepSpeedFile,
    ranks: Ranks,
) -> None:
    """Run all checks that need the whole run; call after `restore` and before `fit`.

    Args:
        config: the resolved configuration.
        phase: number of the phase that the run begins or goes on with.
        materials: data, tokenizer, model.
        ds_file: the checked DeepSpeed file.
        ranks: this process among all.

    Raises:
        UserError: on all ranks alike, but for a dry batch that one rank has no memory for.
    """
    size = checkpoint_bytes(materials.model, config.optim.weight_ema is not None)
    wanted = config.checkpoint.keep + 1 + len(config.phases)
    _on_main(ranks, lambda: require_disk(config.run.dir, size, wanted))
    phases = config.phases[phase:]
    log.info("%s", describe_memory(materials.model, phases, ds_file, ranks.world))
    if config.stability.dry_batch:
        ranks.place = "trying the longest trials"
        DryBatch(config, materials, ds_file, ranks).try_phases(phases)


def require_folder(ranks: Ranks, folder: Path) -> None:
    """Refuse a run folder that rank 0 cannot write, before anything is read or built.

    Raises:
        UserError: on all ranks alike.
    """
    _on_main(ranks, lambda: require_writable(folder))


def require_shared_folder(ranks: Ranks, folder: Path, patience_s: float = 10.0) -> None:
    """Refuse a run folder that not all hosts see: all ranks read what rank 0 writes there.

    Rank 0 leaves a file where the folder is, or will be, and the others look for it. Collective.

    Args:
        ranks: this process among all.
        folder: the run folder, which need not exist yet; rank 0 can write it.
        patience_s: how long a shared disk may take to show a new file.

    Raises:
        UserError: on all ranks; names those that do not see it, and their hosts.
    """
    if ranks.world == 1:
        return
    ranks.place = "looking for the run folder"
    left = existing_place(folder) / f".b2t-shared-{os.urandom(8).hex()}"
    left = ranks.from_main(left)
    if ranks.is_main:
        left.touch()
    ranks.barrier()
    patience_s = min(patience_s, ranks.timeout_s / 2)  # the others wait for the answer
    until = time.monotonic() + patience_s
    while not left.exists() and time.monotonic() < until:
        time.sleep(0.1)
    seen = ranks.gather((socket.gethostname(), left.exists()))
    if ranks.is_main:
        left.unlink()
    blind = [f"rank {n} on {host}" for n, (host, sees) in enumerate(seen) if not sees]
    if blind:
        raise UserError(
            f"run.dir={folder}: rank 0 on {seen[0][0]} has left a file in {left.parent}, and "
            f"{', '.join(blind)} did not see it within {patience_s:g} s: the run folder must be on "
            "a disk that all hosts share, mounted at the same path; choose such a run.dir"
        )


def check_data(ranks: Ranks, path: str, seed: int) -> None:
    """Compare a few trials with the checksums of prepared data, other ones on each rank.

    Raises:
        UserError: on all ranks alike.
    """
    ranks.place = "comparing checksums of the data"
    problem, compared = None, 0
    try:
        compared = verify_sample(
            path, limit=_SAMPLE, seconds=_SAMPLE_SECONDS, seed=(seed, ranks.rank)
        )
    except UserError as error:
        problem = str(error)
    problems = [each for each in ranks.gather(problem) if each]
    if problems:
        raise UserError(problems[0])
    if compared:
        log.info("%s: %d trials have the checksums that they were prepared with", path, compared)


def _on_main(ranks: Ranks, check: Callable[[], None]) -> None:
    """Let rank 0 check, and raise its error on all ranks."""
    error = None
    if ranks.is_main:
        try:
            check()
        except UserError as problem:
            error = str(problem)
    error = ranks.from_main(error)
    if error:
        raise UserError(error)


def require_same_everywhere(ranks: Ranks, config: Config, ds_file: DeepSpeedFile) -> None:
    """Refuse ranks that run other code, packages, configuration or DeepSpeed file than rank 0.

    Raises:
        UserError: on all ranks; names the ranks, their hosts and what differs.
    """
    everyone = ranks.gather((socket.gethostname(), identity(config, ds_file)))
    if ranks.world == 1:
        return
    _, first = everyone[0]
    problems = [
        f"rank {rank} on {host}: {key}: {mine.get(key)}, rank 0 has {first.get(key)}"
        for rank, (host, mine) in enumerate(everyone)
        for key in {**first, **mine}
        if mine.get(key) != first.get(key)
    ]
    if problems:
        raise UserError(
            "the ranks do not run the same thing:\n  "
            + "\n  ".join(problems[:12])
            + "\n  Install the same checkout and packages on all hosts, and start all ranks with "
            "the same arguments."
        )


def identity(config: Config, ds_file: DeepSpeedFile) -> dict[str, Any]:
    """What must be equal on all ranks: hash of the sources, versions, all settings by key."""
    import deepspeed

    import b2t
    import b2t_kernels

    flat = {"b2t sources": hash_sources(b2t), "b2t_kernels sources": hash_sources(b2t_kernels)}
    flat |= {"torch": str(torch.__version__), "deepspeed": str(deepspeed.__version__)}
    settings = {"config": config.model_dump(mode="json"), "DeepSpeed file": ds_file.raw}
    for name, tree in settings.items():
        flat |= {f"{name} {key}": json.dumps(value) for key, value in flattened(tree).items()}
    return flat


def hash_sources(package: ModuleType) -> str:
    """Hash of all Python and YAML files of a package, as 16 hexadecimal digits."""
    assert package.__file__ is not None
    root = Path(package.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".yaml")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def checkpoint_bytes(model: nn.Module, averaged: bool = False) -> int:
    """Largest size of a checkpoint: float32 weights, moments, averages of weights, buffers."""
    weights = sum(p.numel() for p in model.parameters())
    return (16 if averaged else 12) * weights + sum(
        b.numel() * b.element_size() for b in model.buffers()
    )


def require_disk(folder: Path, size: int, wanted: int) -> None:
    """Refuse a disk without room for one checkpoint; warn below `wanted` of them.

    Raises:
        UserError: less than one checkpoint fits.
    """
    free = shutil.disk_usage(folder).free
    text = f"{folder}: {free / GIB:.2f} GiB free, a checkpoint takes up to {size / GIB:.2f} GiB"
    if free < size:
        raise UserError(f"{text}: free some space, or choose another run.dir")
    if free < wanted * size:
        log.warning("%s, and up to %d are on disk at once", text, wanted)
