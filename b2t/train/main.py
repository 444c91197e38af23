"""What `train_ds.py` does: arguments, and the exit status of the run that they describe."""

import argparse
import os
import sys
import traceback
from typing import TYPE_CHECKING, NoReturn

from b2t.closed_pipe import until_closed
from b2t.config import COMPONENTS, Config, describe, load_config, preset_names
from b2t.errors import UserError
from b2t.log import configure, logger, quiet_libraries
from b2t.run_files import PROFILE
from b2t.terminal import show_in_any_encoding
from b2t.train.ds_config import DeepSpeedFile, load_ds_config
from b2t.train.launched import check_numbers

if TYPE_CHECKING:
    from b2t.train.ranks import Ranks

EXIT_USER_ERROR = 2
EXIT_FAILED = 3
"""The run cannot learn any further (non-finite gradients, collapse); the log says why."""
EXIT_WAITED = 4
"""A rank waited for the others longer than stability.collective_timeout_s."""

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
        metavar="NAME|FILE",
        help="DeepSpeed JSON, or the name of one in ds_configs/: batch size, accumulation, "
        "precision, ZeRO, clipping (default: zero2_fp16 on GPUs, zero2_cpu without)",
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
    return until_closed(lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    show_in_any_encoding()
    arguments = parser().parse_intermixed_args(argv)
    quiet_libraries()
    name_accelerator()
    try:
        check_numbers()
    except UserError as error:
        print(f"train_ds.py: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
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


def default_ds_config() -> str:
    """The file for this machine, by name: fp16 on GPUs, float32 on CPUs."""
    import torch

    return "zero2_fp16" if torch.cuda.is_available() else "zero2_cpu"


def print_keys() -> int:
    """Print every configuration key, its default and its meaning; return the exit status."""
    lines = [f"{key} (default {default})\n    {text}" for key, default, text in describe()]
    print(*lines, f"components: {', '.join(COMPONENTS)}", sep="\n")
    return 0


def train(config: Config, ds_file: DeepSpeedFile, resume: str) -> int:
    """Join the ranks, build, fit; return the exit status, or leave with one at once."""
    from b2t.train import launch
    from b2t.train.signals import EXIT_STOPPED, StopSignals
    from b2t.train.trainer import Stopped, TrainingFailed

    launch.prepare_torch(config, ds_file)
    try:
        ranks = launch.join_ranks(config.stability.collective_timeout_s)
    except launch.WaitedTooLong as error:
        _leave_at_once(EXIT_WAITED, str(error))
    except UserError as error:  # of one rank, which need not be the first
        _leave_at_once(EXIT_USER_ERROR, str(error))
    stop = StopSignals()
    run = launch.Launch(config, ds_file, ranks, stop)
    try:
        run.go(resume)
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
        if run.training:
            _leave_at_once(EXIT_USER_ERROR, str(error))
        if ranks.is_main:
            print(f"train_ds.py: error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except Exception as error:
        _leave_crashed(error, ranks, config)
    finally:
        stop.close()
        launch.leave()


def _leave_at_once(status: int, message: str) -> NoReturn:
    """End this process without waiting for the other ranks, who may wait for it."""
    print(f"train_ds.py: error: {message}", file=sys.stderr, flush=True)
    os._exit(status)


def _leave_crashed(error: Exception, ranks: "Ranks", config: Config) -> NoReturn:
    """Say why, and leave at once: the other ranks may wait in a collective for this one.

    The launcher then ends them too.
    """
    from b2t.train.profiling import write_collectives
    from b2t.train.ranks import WaitedTooLong, timed_out, waiting_in

    if config.log.profile.collectives:
        written = write_collectives(config.run.dir / PROFILE, ranks.rank)
        print(f"rank {ranks.rank}: its last collectives are in {written}", file=sys.stderr)
    if isinstance(error, WaitedTooLong):
        _leave_at_once(EXIT_WAITED, str(error))
    if ranks.world > 1 and timed_out(error):
        _leave_at_once(EXIT_WAITED, ranks.explain_wait(waiting_in(error)))
    if "Connection reset" in str(error) or "Connection closed" in str(error):
        print(f"rank {ranks.rank}: another rank left; its message says why", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)
