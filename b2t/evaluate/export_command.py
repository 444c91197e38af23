"""`b2t export`: a model of a run as a folder on its own."""

import argparse
import shutil
from pathlib import Path

SUMMARY = "write a model of a run as a folder that from_pretrained reads"
EPILOG = """\
examples:
  b2t export runs/t15 models/t15
  b2t export runs/t15 models/t15-phase1 --step 10000

The folder holds config.json, model.safetensors in float32, tokenizer, generation config and
checksums. The ends of phases stay among the checkpoints of a run, so that their steps can be
exported when the run is over; averaged weights (optim.weight_ema) are taken where there are any."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `b2t export`."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", metavar="N", help="model of the checkpoint of this step")
    which.add_argument(
        "--checkpoint",
        default="best",
        metavar="WHICH",
        help="model of the run: best, last, the number of a step, or a folder (best)",
    )


def run(args: argparse.Namespace) -> int:
    """Read the model, check it, and write it whole or not at all."""
    from b2t.errors import UserError
    from b2t.evaluate.run_folder import load_model, open_run
    from b2t.records import require_writable

    if args.out.exists():
        raise UserError(f"{args.out}: exists already; name a new folder or remove it")
    require_writable(args.out.parent, "OUT")
    which = args.checkpoint if args.step is None else args.step
    if args.step is not None and not args.step.isdigit():
        raise UserError(f"--step {args.step}: expected the number of a step")
    opened = open_run(args.run, which)
    model, _ = load_model(opened, "cpu")
    temporary = args.out.with_name(f".{args.out.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    temporary.rename(args.out)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"written: {args.out} ({opened.label} of {args.run}, {millions:.1f} M parameters)")
    return 0
