"""Checks before the first step: one code on all ranks, room on disk, memory, a dry batch."""

import hashlib
import json
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from b2t.config import COMPONENTS, Config, PhaseConfig
from b2t.data.batches import TrialRows, collate
from b2t.data.verification import verify_sample
from b2t.errors import UserError
from b2t.log import logger
from b2t.records import require_writable
from b2t.train.ds_config import DeepSpeedFile
from b2t.train.ranks import Ranks

if TYPE_CHECKING:
    from b2t.train.trainer import Trainer

log = logger(__name__)

_GIB = 2**30
_SAMPLE, _SAMPLE_SECONDS = 128, 2.0
"""Trials that a start compares with their checksums, and for how long at most."""
_WIDTH = {"fp16": 2, "bf16": 2, "fp32": 4}


def check_start(trainer: "Trainer") -> None:
    """Run all checks that need the whole run; call after `restore` and before `fit`.

    Raises:
        UserError: on all ranks alike, but for a dry batch that one rank has no memory for.
    """
    config, ranks = trainer.config, trainer.ranks
    size = checkpoint_bytes(trainer.model, config.optim.weight_ema is not None)
    wanted = config.checkpoint.keep + 1 + len(config.phases)
    _on_main(ranks, lambda: require_disk(config.run.dir, size, wanted))
    phases = config.phases[trainer.progress.phase :]
    log.info("%s", describe_memory(trainer.model, phases, trainer.ds_file, ranks.world))
    if config.stability.dry_batch:
        ranks.place = "trying the longest trials"
        dry_batches(trainer, phases)


def require_folder(ranks: Ranks, folder: Path) -> None:
    """Refuse a run folder that rank 0 cannot write, before anything is read or built.

    Raises:
        UserError: on all ranks alike.
    """
    _on_main(ranks, lambda: require_writable(folder))


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


# ---- the same everywhere


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
    flat |= dict(_flatten(config.model_dump(mode="json"), "config"))
    flat |= dict(_flatten(ds_file.raw, "DeepSpeed file"))
    return flat


def hash_sources(package: Any) -> str:
    """Hash of all Python and YAML files of a package, as 16 hexadecimal digits."""
    root = Path(package.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".yaml")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _flatten(value: Any, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flatten(item, f"{prefix} {key}" if " " not in prefix else f"{prefix}.{key}")
    else:
        yield prefix, json.dumps(value)


# ---- disk and memory


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
    text = f"{folder}: {free / _GIB:.2f} GiB free, a checkpoint takes up to {size / _GIB:.2f} GiB"
    if free < size:
        raise UserError(f"{text}: free some space, or choose another run.dir")
    if free < wanted * size:
        log.warning("%s, and up to %d are on disk at once", text, wanted)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, activations not counted.

    Attributes:
        weights: parameters in the engine's precision, this rank's share under ZeRO-3.
        gradients: of trained parameters, this rank's share under ZeRO-2 and ZeRO-3.
        optimizer: float32 masters and Adam's moments, this rank's share; 0 under CPU offload.
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
        optimizer=0 if ds_file.offload else 12 * share,
        buffers=sum(b.numel() * b.element_size() for b in model.buffers()),
    )


def describe_memory(
    model: nn.Module, phases: Sequence[PhaseConfig], ds_file: DeepSpeedFile, world: int
) -> str:
    """Return the estimate of the phase that needs most, in words."""
    phase = max(phases, key=lambda p: estimate_memory(model, p, ds_file, world).total)
    memory = estimate_memory(model, phase, ds_file, world)
    parts = [
        f"{name} {getattr(memory, name) / _GIB:.2f}"
        for name in ("weights", "gradients", "optimizer", "buffers")
    ]
    return (
        f"about {memory.total / _GIB:.2f} GiB per rank before activations in phase {phase.name} "
        f"({', '.join(parts)})"
    )


# ---- dry batch


def dry_batches(trainer: "Trainer", phases: Sequence[PhaseConfig]) -> None:
    """Forward and backward of the longest trials in every phase to come; nothing is changed.

    Runs on the bare model before DeepSpeed wraps it, in the engine's precision, beside a block of
    memory as large as the gradients and optimizer state to come. Collective: the regularisers sum
    over ranks.

    Raises:
        UserError: out of memory, on the ranks that it happens to.
    """
    batch = longest_batch(trainer)
    for phase in phases:
        with _as_trained(trainer, phase):
            try:
                _dry_batch(trainer, phase, batch)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                raise UserError(_no_memory(trainer, phase, batch, error)) from None
    if trainer.ranks.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(trainer.ranks.device) / _GIB
        log.info("dry batch of the longest trials: %.2f GiB at most", peak)
        torch.cuda.empty_cache()


def longest_batch(trainer: "Trainer") -> Any:
    """Return this rank's micro-batch of the longest training trials, as training augments them."""
    micro, ranks = trainer.ds_file.micro_batch, trainer.ranks
    longest = np.argsort(-trainer.plan.lengths, kind="stable")[: micro * ranks.world]
    rows = TrialRows(
        trainer.materials.train,
        trainer.materials.tokenizer,
        trainer.materials.info.sessions,
        trainer.materials.augment,
        seed=trainer.config.run.seed,
        max_tokens=trainer.config.data.max_text_tokens,
    )
    return collate([rows.example(0, int(row)) for row in longest[ranks.rank :: ranks.world]])


def _dry_batch(trainer: "Trainer", phase: PhaseConfig, batch: Any) -> None:
    model, ranks = trainer.model, trainer.ranks
    memory = estimate_memory(model, phase, trainer.ds_file, ranks.world)
    held = memory.optimizer + memory.gradients if ranks.device.type == "cuda" else 0
    ballast = torch.empty(held, dtype=torch.uint8, device=ranks.device)
    dtype = next(p for p in model.parameters()).dtype
    output = model(batch.to(ranks.device, dtype), weights=phase.losses.model_dump())
    output.loss.backward()
    del ballast


@contextmanager
def _as_trained(trainer: "Trainer", phase: PhaseConfig) -> Iterator[None]:
    """Lend the model as a phase trains it: frozen, cast, codebooks in use; then put all back."""
    model, device = trainer.model, trainer.ranks.device
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[
        trainer.ds_file.precision
    ]
    present = [name for name in COMPONENTS if getattr(model, name) is not None]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    before = {name: (p.data, p.requires_grad) for name, p in model.named_parameters()}
    training = model.training
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            model.freeze([name for name in present if name not in phase.trainable])
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)
            if model.quantizer is not None:
                codebooks = model.quantizer.codebooks
                codebooks.initialized.fill_(model.quantizer.num_quantizers)
            model.train()
            yield
        finally:
            for name, parameter in model.named_parameters():
                parameter.data, parameter.requires_grad = before[name]
                parameter.grad = None
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(buffers[name])
            model.train(training)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)


def _no_memory(trainer: "Trainer", phase: PhaseConfig, batch: Any, error: BaseException) -> str:
    ds_file = trainer.ds_file
    return (
        f"rank {trainer.ranks.rank}: out of memory in a dry batch of phase {phase.name} with the "
        f"{len(batch)} longest trials ({batch.signal.shape[1]} bins, "
        f"{', '.join(batch.rows[:2])} …): {str(error).splitlines()[0]}\n"
        f"  In {ds_file.path} lower train_micro_batch_size_per_gpu (now {ds_file.micro_batch}) and "
        f"raise gradient_accumulation_steps (now {ds_file.accumulation}) as much; or set "
        "model.activation_checkpointing to 1, or use ds_configs/zero2_offload.json."
    )
