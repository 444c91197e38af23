"""A run from its settings to its end: ranks, checks, data, model, hooks, training."""

import os
import shutil
import socket

from b2t.config import Config
from b2t.counted import counted
from b2t.errors import UserError
from b2t.log import logger
from b2t.model.attention_backends import without_plans_per_length
from b2t.monitor.monitors import Monitors
from b2t.monitor.training import peak_flops
from b2t.run_files import PROFILE
from b2t.train.admission import prepare_run
from b2t.train.build import Materials, build
from b2t.train.callback import Callback, Run
from b2t.train.callbacks import Console, MetricsFile, ProgressBar, Report, RunFiles, Webhook
from b2t.train.data_audit import look_at_data
from b2t.train.determinism import ask_for_determinism
from b2t.train.ds_config import DeepSpeedFile
from b2t.train.flops import flops_of_phases
from b2t.train.monitoring import Watch, build_monitors
from b2t.train.pace import Pace
from b2t.train.profiling import Profiler, record_collectives
from b2t.train.ranks import (
    Ranks,
    WaitedTooLong,
    cores,
    join,
    leave,
    ranks_on_host,
    timed_out,
)
from b2t.train.settings import check_lengths, check_losses
from b2t.train.signals import StopSignals
from b2t.train.startup import (
    check_data,
    check_start,
    require_folder,
    require_same_everywhere,
    require_shared_folder,
)
from b2t.train.trainer import Trainer
from b2t.train.world_size import keep_global_batch

__all__ = ["Launch", "WaitedTooLong", "join_ranks", "leave", "prepare_torch"]

log = logger(__name__)


def prepare_torch(config: Config, ds_file: DeepSpeedFile) -> None:
    """Refuse what this machine or configuration cannot train; set torch's algorithms.

    Raises:
        UserError: fp16 without a GPU, compiled blocks under ZeRO-3, no C++ compiler for what needs
            one, or lengths that do not fit together.
    """
    check_precision(ds_file)
    check_compiling(config, ds_file)
    require_compiler(config, ds_file)
    check_lengths(config)
    if config.log.profile.collectives:
        record_collectives(config.run.dir / PROFILE)
    without_plans_per_length()
    if config.run.deterministic:
        ask_for_determinism()


def join_ranks(timeout_s: float) -> Ranks:
    """Join the process group.

    Raises:
        WaitedTooLong: the others did not come within ``timeout_s`` seconds.
    """
    try:
        return join(timeout_s)
    except Exception as error:
        if not timed_out(error):
            raise
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise WaitedTooLong(
            f"rank {os.environ.get('RANK')} on {socket.gethostname()} waited "
            f"{timeout_s:g} s for the other ranks to join at {where}: "
            "one was not started, failed before, or cannot be reached (b2t doctor looks at network "
            "interfaces). stability.collective_timeout_s sets the wait"
        ) from error


class Launch:
    """One run on ranks that have joined.

    Args:
        config: the resolved configuration.
        ds_file: the checked DeepSpeed file.
        ranks: this process among all.
        stop: signals to listen to.

    Attributes:
        training: whether the ranks have begun to train: from there on one may fail alone.
    """

    def __init__(
        self, config: Config, ds_file: DeepSpeedFile, ranks: Ranks, stop: StopSignals
    ) -> None:
        self.config = config
        self.ds_file = ds_file
        self.ranks = ranks
        self.stop = stop
        self.training = False

    def go(self, resume: str) -> None:
        """Train from the start or from the newest checkpoint, to the end. Collective.

        Args:
            resume: `auto`, or `never` to refuse a folder with checkpoints.

        Raises:
            UserError: a mistake in the input.
            Stopped: on request, with a checkpoint.
            TrainingFailed: the run cannot learn any further.
        """
        trainer = self._build()
        if prepare_run(trainer, resume):
            log.info("already trained: %s holds a finished run", self.config.run.dir)
            return
        introduce(trainer)
        if self.ranks.is_main and not trainer.progress.step:
            look_at_data(self.config, trainer.materials)
        self.training = True
        phase = trainer.progress.phase
        check_start(self.config, phase, trainer.materials, trainer.ds_file, self.ranks)
        trainer.fit()
        log.info("finished: %s", self.config.run.dir)

    def _build(self) -> Trainer:
        config, ranks = self.config, self.ranks
        require_same_everywhere(ranks, config, self.ds_file)
        require_folder(ranks, config.run.dir)
        require_shared_folder(ranks, config.run.dir)
        ds_file = keep_global_batch(self.ds_file, config.run.dir, ranks.world)
        materials = build(config, ranks.rank, ranks.world)
        check_losses(config, materials.model)
        check_data(ranks, str(config.data.path), config.run.seed)
        callbacks = self._callbacks(materials, ds_file)
        return Trainer(config, ds_file, materials, ranks, callbacks, self.stop)

    def _callbacks(self, materials: Materials, ds_file: DeepSpeedFile) -> list[Callback]:
        config, ranks = self.config, self.ranks
        known = peak_flops(ranks.device) is not None and ds_file.precision != "fp32"
        flops = flops_of_phases(config, materials, ds_file.accumulation) if known else None
        monitors = build_monitors(config, materials, ranks, flops)
        shared: list[Callback] = [Pace(), Watch(monitors)] if ranks.world > 1 else [Watch(monitors)]
        profile = config.log.profile
        if profile.steps or profile.memory:
            shared.append(Profiler(profile, config.run.dir, ranks.rank))
        return [*shared, *main_callbacks(config, monitors)] if ranks.is_main else shared


def main_callbacks(config: Config, monitors: Monitors) -> list[Callback]:
    """Hooks of rank 0: console, metrics file, and what configuration or environment ask for."""
    folder = config.run.dir
    chosen: list[Callback] = [Console(), MetricsFile(folder), RunFiles(folder), Webhook()]
    if config.log.progress:
        chosen.append(ProgressBar())
    if config.log.wandb.enabled:
        from b2t.train.wandb_run import Wandb

        chosen.append(Wandb(config.log, folder, monitors))
    if config.log.report:
        chosen.append(Report(folder))
    return chosen


def check_precision(ds_file: DeepSpeedFile) -> None:
    """Refuse a precision that this machine cannot train in."""
    if ds_file.precision != "fp16":
        return
    from deepspeed.accelerator import get_accelerator

    if not get_accelerator().is_fp16_supported():
        raise UserError(
            f"{ds_file.path}: fp16 needs a GPU, and none was found; without one use "
            "--deepspeed_config ds_configs/zero2_cpu.json"
        )


def check_compiling(config: Config, ds_file: DeepSpeedFile) -> None:
    """Refuse compiled blocks under ZeRO-3, whose hooks fetch weights in the middle of them."""
    if config.model.compile_blocks and ds_file.zero_stage == 3:
        raise UserError(
            f"model.compile_blocks=true with {ds_file.path}: ZeRO-3 fetches weights while a block "
            "runs, which cannot be compiled; take a file of stage 1 or 2, or leave blocks as "
            "they are (model.compile_blocks=false)"
        )


def require_compiler(config: Config, ds_file: DeepSpeedFile) -> None:
    """Refuse what is compiled in C++ where it is first used, without a compiler for it."""
    import torch

    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is not None:
        return
    remedy = "install one (Debian: apt install g++), or name it in CXX"
    if ds_file.offload:
        raise UserError(
            f"{ds_file.path}: an optimizer on the CPU (offload_optimizer) is compiled by a C++ "
            f"compiler, and there is no {compiler}: {remedy}, or take a file without offload"
        )
    if config.model.compile_blocks and not torch.cuda.is_available():
        raise UserError(
            f"model.compile_blocks=true takes a C++ compiler, and there is no {compiler}: "
            f"{remedy}, or leave blocks as they are (model.compile_blocks=false)"
        )


def introduce(trainer: Run) -> None:
    """Say what is about to be trained, on what, by how many ranks."""
    info, ds_file, ranks = trainer.materials.info, trainer.ds_file, trainer.ranks
    parameters = sum(p.numel() for p in trainer.model.parameters())
    log.info(
        "%s%d train and %s, %s at %g Hz, %s",
        "SIMULATED DATA: " if info.simulated else "",
        len(trainer.materials.train),
        counted(len(trainer.materials.validation), "validation trial"),
        counted(info.channels, "channel"),
        info.sampling_rate,
        counted(len(info.sessions), "session"),
    )
    log.info(
        "%.1f M parameters, %s on %s, %s, %s, batch %d = %d × %d accumulated × %d",
        parameters / 1e6,
        counted(ranks.world, "rank"),
        ranks.device.type,
        f"ZeRO-{ds_file.zero_stage}"
        if ds_file.zero_stage
        else "no ZeRO (one rank in float32 has "
        "nothing to share; optim.zero_on_one_rank=true keeps it)",
        ds_file.precision,
        ds_file.global_batch(ranks.world),
        ds_file.micro_batch,
        ds_file.accumulation,
        ranks.world,
    )
    workers, here = trainer.config.data.workers, ranks_on_host()
    if workers * here > cores():
        log.info(
            "data.workers=%d: %d processes would read for %d cores of this host; fewer do as well",
            workers, workers * here, cores(),
        )  # fmt: skip
