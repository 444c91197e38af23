"""What `train_ds.py` does: arguments, checks, `Trainer.fit`, exit status."""

import argparse
import os
import re
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import yaml

from b2t.config import COMPONENTS, Config, describe, load_config, preset_names
from b2t.errors import UserError
from b2t.log import configure, logger, quiet_libraries
from b2t.records import write_atomically
from b2t.train.ds_config import DeepSpeedFile, load_ds_config

EXIT_USER_ERROR = 2
EXIT_WAITED = 4
"""A rank waited for the others longer than stability.collective_timeout_s."""
EXIT_FAILED = 3
"""The run cannot learn any further (non-finite gradients, collapse); the log says why."""

log = logger(__name__)

_EPILOG = """\
examples:
  deepspeed train_ds.py --deepspeed_config ds_configs/zero2_fp16.json --config a5500x2 \\
      data.path=prepared/t15
  deepspeed --num_accelerators 2 train_ds.py --deepspeed_config ds_configs/zero2_cpu.json \\
      --config demo phases.0.steps=200 run.dir=runs/short
  python train_ds.py --config my.yaml --print-config

The same command again goes on from the newest checkpoint in run.dir.
exit status: 0 trained, 2 mistake in the input, 3 training failed, 4 a rank did not answer the
others in time, 75 stopped on request with a checkpoint (run the same command to go on), 76 left at
once after a second signal.
"""


def parser() -> argparse.ArgumentParser:
    """Arguments of `train_ds.py`."""
    arguments = argparse.ArgumentParser(
        prog="train_ds.py",
        description="Train a brain-to-text model under DeepSpeed. Start it with deepspeed, "
        "torchrun, accelerate launch or plain python.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments.add_argument(
        "--deepspeed_config",
        metavar="FILE",
        help="DeepSpeed JSON: batch size, accumulation, precision, ZeRO, clipping "
        "(default: ds_configs/zero2_fp16.json on GPUs, ds_configs/zero2_cpu.json without)",
    )
    arguments.add_argument(
        "--config",
        metavar="NAME|FILE",
        help=f"preset ({', '.join(preset_names())}) or a YAML file of your own",
    )
    arguments.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="override single keys; list items by number: phases.0.steps=200",
    )
    arguments.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto (default): go on where run.dir holds a checkpoint; never: refuse to",
    )
    arguments.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and leave"
    )
    arguments.add_argument(
        "--help-config", action="store_true", help="list every configuration key with its meaning"
    )
    arguments.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Train; return the exit status."""
    arguments = parser().parse_intermixed_args(argv)
    quiet_libraries()
    name_accelerator()
    rank = int(os.environ.get("RANK", "0"))
    configure(rank)
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.help_config:
            return print_keys()
        ds_file = load_ds_config(arguments.deepspeed_config or default_ds_config())
        if arguments.print_config:
            if rank == 0:
                print(config.to_yaml(), end="")
            return 0
        return train(config, ds_file, arguments.resume)
    except UserError as error:
        if rank == 0:
            print(f"train_ds.py: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def name_accelerator() -> None:
    """Spare DeepSpeed its search for accelerators, and its warning, where there is none."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def default_ds_config() -> Path:
    """The file for this machine: fp16 on GPUs, float32 on CPUs."""
    import torch

    name = "zero2_fp16.json" if torch.cuda.is_available() else "zero2_cpu.json"
    return Path(__file__).resolve().parents[2] / "ds_configs" / name


def print_keys() -> int:
    """Print every configuration key, its default and its meaning; return the exit status."""
    lines = [f"{key} (default {default})\n    {text}" for key, default, text in describe()]
    try:
        print(*lines, f"components: {', '.join(COMPONENTS)}", sep="\n", flush=True)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def train(config: Config, ds_file: DeepSpeedFile, resume: str) -> int:
    """Join the ranks, build, fit; return the exit status."""
    import torch

    from b2t.monitor.training import peak_flops
    from b2t.train.build import build
    from b2t.train.callbacks import Callback
    from b2t.train.flops import flops_of_phases
    from b2t.train.monitoring import Watch, build_monitors
    from b2t.train.ranks import WaitedTooLong, join, leave, timed_out, waiting_in
    from b2t.train.settings import check_lengths, check_losses
    from b2t.train.signals import EXIT_STOPPED, StopSignals
    from b2t.train.startup import (
        check_data,
        check_start,
        require_folder,
        require_same_everywhere,
    )
    from b2t.train.trainer import Stopped, Trainer, TrainingFailed
    from b2t.train.world_size import keep_global_batch

    check_precision(ds_file)
    check_lengths(config)
    if config.run.deterministic:
        # cuBLAS reads this when the device is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        ranks = join(config.stability.collective_timeout_s)
    except Exception as error:
        if not timed_out(error):
            raise
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        print(
            f"train_ds.py: error: rank {os.environ.get('RANK')} on {socket.gethostname()} waited "
            f"{config.stability.collective_timeout_s:g} s for the other ranks to join at {where}: "
            "one was not started, failed before, or cannot be reached (b2t doctor looks at network "
            "interfaces). stability.collective_timeout_s sets the wait",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_WAITED)
    stop = StopSignals()
    training = False
    try:
        require_same_everywhere(ranks, config, ds_file)
        require_folder(ranks, config.run.dir)
        ds_file = keep_global_batch(ds_file, config.run.dir, ranks.world)
        materials = build(config)
        check_losses(config, materials.model)
        check_data(ranks, str(config.data.path), config.run.seed)
        known = peak_flops(ranks.device) is not None and ds_file.precision != "fp32"
        flops = flops_of_phases(config, materials, ds_file.accumulation) if known else None
        monitors = build_monitors(config, materials, ranks, flops)
        callbacks: list[Callback] = [Watch(monitors)]
        if ranks.is_main:
            callbacks += main_callbacks(config, monitors)
        trainer = Trainer(config, ds_file, materials, ranks, callbacks, stop)
        if prepare_run(trainer, resume):
            log.info("already trained: %s holds a finished run", config.run.dir)
            return 0
        introduce(trainer)
        training = True
        check_start(trainer)
        trainer.fit()
        log.info("finished: %s", config.run.dir)
        return 0
    except Stopped as stopped:
        # A rank that left earlier would make the launcher signal those that still close files.
        ranks.barrier()
        log.warning("stopped at step %s with a checkpoint: the same command goes on", stopped)
        return EXIT_STOPPED
    except TrainingFailed as failure:
        # All ranks fail together, and rank 0 still writes the report.
        ranks.barrier()
        log.error("training failed: %s", failure)
        return EXIT_FAILED
    except UserError as error:
        # Before training all ranks find the same mistake; a bad trial is found by one.
        if ranks.is_main or training:
            print(f"train_ds.py: error: {error}", file=sys.stderr, flush=True)
        if training:
            os._exit(EXIT_USER_ERROR)
        return EXIT_USER_ERROR
    except Exception as error:
        if isinstance(error, WaitedTooLong) or (ranks.world > 1 and timed_out(error)):
            waited = isinstance(error, WaitedTooLong)
            text = str(error) if waited else ranks.explain_wait(waiting_in(error))
            print(f"train_ds.py: error: {text}", file=sys.stderr, flush=True)
            os._exit(EXIT_WAITED)
        # The other ranks may wait in a collective for this one: say why, and leave at once, so
        # that the launcher ends them too.
        if "Connection reset" in str(error) or "Connection closed" in str(error):
            print(f"rank {ranks.rank}: another rank left; its message says why", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    finally:
        stop.close()
        leave()


def main_callbacks(config: Config, monitors: Any) -> list[Any]:
    """Hooks of rank 0: console, metrics file, and what configuration or environment ask for."""
    from b2t.train.callbacks import (
        Console,
        MetricsFile,
        ProgressBar,
        Report,
        RunFiles,
        Webhook,
    )

    folder = config.run.dir
    chosen: list[Any] = [Console(), MetricsFile(folder), RunFiles(folder), Webhook()]
    if config.log.progress:
        chosen.append(ProgressBar())
    if config.log.wandb.enabled:
        from b2t.train.wandb_run import Wandb

        chosen.append(Wandb(config.log, config.run.dir, monitors))
    if config.log.report:
        chosen.append(Report(config.run.dir))
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


def prepare_run(trainer: Any, resume: str) -> bool:
    """Make the run folder or continue it; True where there is nothing left to train.

    Raises:
        UserError: the folder holds another run.
    """
    from b2t.train.started import keep_start

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
        refuse_other_run(trainer, checkpoint.state)
        trainer.restore(checkpoint)
        log.info(
            "resuming %s at step %d (phase %s, %d ranks then, %d now)",
            folder,
            trainer.progress.step,
            trainer.phase.name,
            checkpoint.state["world"],
            ranks.world,
        )
    error = None
    if ranks.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "config.yaml", config.to_yaml())
            keep_start(config, trainer.model)
            trainer.store.folder.mkdir(exist_ok=True)
        except OSError as problem:
            error = f"run.dir={folder}: cannot be written ({problem}); choose another run.dir"
    error = ranks.from_main(error)
    if error:
        raise UserError(error)
    return trainer.progress.finished


def require_same_checkpoint(ranks: Any, checkpoint: Any, folder: Path) -> None:
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
    "run.dir", "data.path", "data.workers", "log", "evaluation", "checkpoint", "monitor",
    "stability", "phases.evaluate_every", "phases.decode_trials",
)  # fmt: skip
"""Keys that a resumed run may change: they alter no weight."""


def refuse_other_run(trainer: Any, state: dict[str, Any]) -> None:
    """Refuse to continue a run with another configuration, batch or dataset."""
    from b2t.train.world_size import global_batch_of

    differences = list(_differences(state["config"], trainer.config.model_dump(mode="json")))
    then, now = global_batch_of(state), trainer.ds_file.global_batch(trainer.ranks.world)
    if then != now:
        differences.append(f"global batch: {then} then, {now} now")
    clipping = state.get("deepspeed", {}).get("gradient_clipping", trainer.ds_file.clipping)
    if clipping != trainer.ds_file.clipping:
        differences.append(
            f"gradient_clipping: {clipping:g} then, {trainer.ds_file.clipping:g} now "
            f"({trainer.ds_file.path})"
        )
    if state["data_fingerprint"] != trainer.materials.info.fingerprint:
        differences.append(
            f"data: fingerprint {state['data_fingerprint']} then, "
            f"{trainer.materials.info.fingerprint} now"
        )
    if differences:
        raise UserError(
            f"run.dir={trainer.config.run.dir} holds a run that differs:\n  "
            + "\n  ".join(differences)
            + "\n  Give the same settings to go on, or another run.dir to start anew."
        )


def _differences(then: Any, now: Any, prefix: str = "") -> Any:
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


def introduce(trainer: Any) -> None:
    """Say what is about to be trained, on what, by how many ranks."""
    info, ds_file, ranks = trainer.materials.info, trainer.ds_file, trainer.ranks
    parameters = sum(p.numel() for p in trainer.model.parameters())
    log.info(
        "%s%d train and %d validation trials, %d channels at %g Hz, %d sessions",
        "SIMULATED DATA: " if info.simulated else "",
        len(trainer.materials.train),
        len(trainer.materials.validation),
        info.channels,
        info.sampling_rate,
        len(info.sessions),
    )
    log.info(
        "%.1f M parameters, %d rank%s on %s, ZeRO-%d, %s, batch %d = %d × %d accumulated × %d",
        parameters / 1e6,
        ranks.world,
        "" if ranks.world == 1 else "s",
        ranks.device.type,
        ds_file.zero_stage,
        ds_file.precision,
        ds_file.global_batch(ranks.world),
        ds_file.micro_batch,
        ds_file.accumulation,
        ranks.world,
    )
