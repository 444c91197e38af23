"""`b2t export`: a model of a run as a folder on its own, to keep or to share."""

import argparse
import shutil
from pathlib import Path
from typing import Any

SUMMARY = "write a model of a run as a folder that from_pretrained reads"
EPILOG = """\
examples:
  b2t export runs/t15 models/t15
  b2t export runs/t15 models/t15-phase1 --step 10000
  b2t export runs/t15 models/t15 --license cc-by-4.0 --program --push-to-hub me/t15

The folder holds config.json, model.safetensors in float32, tokenizer, generation config,
checksums, and a model card (README.md) with what the model was trained on and, where `b2t evaluate`
has scored it, its results beside their controls. After `import b2t`, transformers' AutoModel reads
it. The ends of phases stay among the checkpoints of a run, so that their steps can be exported when
the run is over; averaged weights (optim.weight_ema) are taken where there are any."""


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
    parser.add_argument("--license", metavar="ID", help="licence of the weights, for the card")
    parser.add_argument(
        "--program",
        action="store_true",
        help="also write tokenizer.pt2: signals to codes by torch.export, which needs no b2t",
    )
    parser.add_argument("--push-to-hub", metavar="NAME", help="repository of the Hub to write to")
    parser.add_argument("--public", action="store_true", help="make a new repository public")


def run(args: argparse.Namespace) -> int:
    """Read the model, check it, and write it whole or not at all."""
    from b2t.errors import UserError
    from b2t.evaluate.model_card import CARD_FILE, model_card, read_evaluation
    from b2t.evaluate.run_folder import load_model, open_run
    from b2t.model.program import PROGRAM_FILE, save_program
    from b2t.records import require_writable, write_atomically

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
    evaluation = read_evaluation(opened.folder, opened.label)
    name = args.push_to_hub or str(args.out)
    write_atomically(temporary / CARD_FILE, model_card(model, name, args.license, evaluation))
    if args.program:
        frames = save_program(model, temporary)
        print(f"{PROGRAM_FILE}: the model's own codes in {frames:,} frames of random signals")
    temporary.rename(args.out)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"written: {args.out} ({opened.label} of {args.run}, {millions:.1f} M parameters)")
    if evaluation is None:
        print(f"note: {args.run} has no results of this model: its card says so (`b2t evaluate`)")
    if args.push_to_hub is not None:
        print(f"pushed: {_push(args.out, args.push_to_hub, private=not args.public)}")
    return 0


def _push(folder: Path, name: str, private: bool) -> Any:
    """Send a folder to the Hub; return its address.

    Raises:
        UserError: the Hub cannot be reached, or refuses.
    """
    import huggingface_hub

    from b2t.errors import UserError

    hub = huggingface_hub.HfApi()
    try:
        address = hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Write model")
    except (OSError, ValueError) as error:  # the Hub's errors are kinds of these
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"--push-to-hub {name}: {reason}; the folder {folder} is whole: log in with `hf auth "
            "login` and push again with `hf upload`"
        ) from None
    return address
