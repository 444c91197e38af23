"""`b2t plan`: what a run will need and how long it will take, before anything is started."""

import argparse
import json

from b2t.arguments import finite
from b2t.errors import UserError

SUMMARY = "plan a run: memory, largest micro-batch, traffic, time, cost and scaling"
EPILOG = """\
examples:
  b2t plan --config a5500x2 --deepspeed_config ds_configs/zero2_fp16.json --gpus 2 --gpu-memory 24
  b2t plan --config a5500x2 --deepspeed_config ds_configs/zero2_fp16.json --gpus 8 \\
      --gpu "H100 80GB HBM3" --link nvlink4 --network ndr --price 2.5 data.path=prepared/t15

Memory and traffic are counted: the model is built without memory and its step run on fake tensors.
Seconds are a prediction from data sheets and from what is assumed (printed); they have not been
held against a GPU. Without data.path trials are those that --channels … --sessions describe."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `b2t plan`."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", metavar="NAME|FILE", help="preset or YAML file")
    parser.add_argument(
        "--deepspeed_config", metavar="NAME|FILE", required=True, help="DeepSpeed JSON"
    )
    parser.add_argument("--gpus", type=_whole, default=2, metavar="N", help="GPUs of the run (2)")
    parser.add_argument(
        "--gpu-memory", type=_positive, metavar="GB", help="memory of one (that of --gpu)"
    )
    parser.add_argument("--gpu", metavar="NAME", help="kind of GPU, for time (RTX A5500)")
    parser.add_argument("--link", default="pcie4", help="between GPUs of a host (pcie4)")
    parser.add_argument("--network", default="25gbe", help="between hosts (25gbe)")
    parser.add_argument("--gpus-per-host", type=_whole, metavar="N", help="(--gpus, at most 8)")
    parser.add_argument(
        "--price", type=_not_negative, metavar="PER_HOUR", help="of one GPU for an hour"
    )
    parser.add_argument("--reserve", type=_not_negative, default=1.0, metavar="GIB",
                        help="of a GPU for CUDA, NCCL and gaps, assumed (1)")  # fmt: skip
    parser.add_argument("--efficiency", type=_share, default=0.6, metavar="SHARE",
                        help="of the peak that matrix products reach, assumed (0.6)")  # fmt: skip
    trials = parser.add_argument_group("trials, without data.path")
    trials.add_argument("--channels", type=_whole, default=512, help="(512)")
    trials.add_argument("--rate", type=_positive, default=50.0, help="bins per second (50)")
    trials.add_argument("--longest", type=_positive, default=20.0, help="seconds (20)")
    trials.add_argument("--typical", type=_positive, default=10.0, help="seconds (10)")
    trials.add_argument("--sessions", type=_whole, default=45, help="(45)")
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")


def run(args: argparse.Namespace) -> int:
    """Plan and print."""
    from b2t.train.main import name_accelerator

    name_accelerator()
    from b2t.train.planning.table import print_plan

    found = make_plan(args)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print_plan(found)
    return 0 if found["fits"] else 1


def make_plan(args: argparse.Namespace) -> dict:
    """Return the plan as JSON values.

    Raises:
        UserError: a configuration, a file or a name that cannot be used.
    """
    from b2t.config import load_config
    from b2t.train.ds_config import load_ds_config
    from b2t.train.planning.machines import Assumptions, cluster, memory_of

    config = load_config(args.config, args.overrides)
    ds_file = load_ds_config(args.deepspeed_config)
    gpu = args.gpu or "RTX A5500"
    assumed = Assumptions(efficiency=args.efficiency, reserve=args.reserve * 2**30)
    on_host = args.gpus_per_host or min(args.gpus, 8)
    if args.gpus > on_host and args.gpus % on_host:
        raise UserError(
            f"--gpus {args.gpus}: {on_host} on a host do not divide them; give another --gpus, or "
            "--gpus-per-host"
        )
    machine = cluster(gpu, args.link, args.network, on_host, assumed)
    memory = args.gpu_memory * 10**9 if args.gpu_memory else memory_of(gpu)
    room = memory - assumed.reserve
    if room <= 0:
        raise UserError(f"--reserve {args.reserve:g} GiB leaves nothing of {memory / 1e9:g} GB")

    from b2t.train.plain import without_needless_zero  # slow: mistakes above are told at once
    from b2t.train.planning.plan import Planner

    ds_file = without_needless_zero(ds_file, config.optim, args.gpus)
    planner = Planner(config, ds_file, args.gpus, _workload(args, config))
    known = ds_file.precision != "fp32"
    found = planner.plan(room, machine if known else None, args.price)
    return {"config": args.config, "deepspeed_config": str(ds_file.path), **found}


def _workload(args: argparse.Namespace, config):  # type: ignore[no-untyped-def]
    from b2t.train.planning.workload import assumed, of_dataset

    tokens = config.data.max_text_tokens
    named = any(override.startswith("data.path=") for override in args.overrides)
    if named:
        return of_dataset(config, tokens)
    return assumed(
        args.channels, args.rate, args.longest, min(args.typical, args.longest),
        args.sessions, tokens,
    )  # fmt: skip


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 10**6:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, found {text}")
    return int(text)


def _not_negative(text: str) -> float:
    value = finite(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a number from 0, found {text}")
    return value


def _share(text: str) -> float:
    value = _positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"expected a share, above 0 and at most 1, found {text}")
    return value


def _positive(text: str) -> float:
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return value
