"""`b2t tokenize`: the codes of every trial as a column of a dataset."""

import argparse
from pathlib import Path

from b2t.counted import counted
from b2t.evaluate.evaluate_command import add_checkpoint, positive

SUMMARY = "write the discrete codes of every trial as a dataset column"
EPILOG = """\
example:
  b2t tokenize runs/demo data/demo/prepared data/demo/tokens
  python -c "from datasets import load_from_disk; print(load_from_disk('data/demo/tokens'))"

Column `codes` holds one list per latent frame with the code of each quantizer layer, coarse
first. `model.quantizer.decode` turns codes back into latents."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `b2t tokenize`."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, help="run folder, or a folder with a saved model")
    parser.add_argument("dataset", help="prepared folder, Hugging Face id, or parquet glob")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--splits", nargs="+", help="splits to tokenize (default: all)")
    parser.add_argument("--batch-size", type=positive, default=16, help="trials per forward (16)")
    parser.add_argument("--layers", type=positive, help="only the first LAYERS quantizer layers")
    parser.add_argument("--keep-signal", action="store_true", help="keep the signals as well")
    parser.add_argument("--device", help="torch device (default: a GPU where there is one)")
    add_checkpoint(parser)
    parser.add_argument(
        "--force",
        action="store_true",
        help="go on where the data are of another kind than the model was trained on",
    )


def run(args: argparse.Namespace) -> int:
    """Encode every trial and save the dataset with its codes."""
    from datasets import DatasetDict

    from b2t.data.dataset import dataset_info, load_trials
    from b2t.errors import UserError
    from b2t.evaluate import run_folder
    from b2t.evaluate.codes import tokenize_trials
    from b2t.records import require_writable

    if args.out.exists():
        raise UserError(f"{args.out}: exists already; name a new folder or remove it")
    require_writable(args.out.parent, "OUT")
    opened = run_folder.open_run(args.run, args.checkpoint)
    wanted = args.splits or list(dataset_info(args.dataset).splits)
    splits = [run_folder.choose_split(args.dataset, split) for split in wanted]
    model, _ = run_folder.load_model(opened, args.device)
    if model.quantizer is None:
        raise UserError(
            f"{opened.checkpoint}: the model has no quantizer (model.quantizer.enabled=false), so "
            "it has no codes"
        )
    layers = args.layers or model.quantizer.num_quantizers
    if layers > model.quantizer.num_quantizers:
        raise UserError(
            f"--layers {layers}: the model has {model.quantizer.num_quantizers} quantizer layers"
        )
    tokenized = {}
    for split in splits:
        batches = run_folder.load_batches(
            opened, model, args.dataset, split, None, args.batch_size, force=args.force
        )
        trials = load_trials(args.dataset, split)
        codes = tokenize_trials(model, batches, layers)
        kept = trials if args.keep_signal else trials.remove_columns("signal")
        tokenized[split] = _with_codes(kept, trials, codes)
    temporary = args.out.with_name(f".{args.out.name}.part")
    DatasetDict(tokenized).save_to_disk(str(temporary))
    temporary.rename(args.out)
    total = sum(len(split) for split in tokenized.values())
    print(f"written: {args.out} ({counted(total, 'trial')}, {counted(layers, 'code')} per frame)")
    return 0


def _with_codes(kept, trials, codes: dict):
    from datasets import List, Value

    from b2t.data.trials import row_ids

    column = [codes[row] for row in row_ids(trials)]
    # Not `cast`, which leaves a cache file in the user's dataset.
    return kept.add_column("codes", column, feature=List(List(Value("int32"))))
