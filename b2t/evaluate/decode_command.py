"""`b2t decode`: text of trials, with or without known sentences."""

import argparse
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from b2t.arguments import seconds
from b2t.counted import counted
from b2t.evaluate.evaluate_command import (
    FASTER,
    add_checkpoint,
    add_no_rescoring,
    generation_options,
    open_words,
    positive,
)
from b2t.records import finite

SUMMARY = "decode the text of trials with a trained model"
EPILOG = """\
examples:
  b2t decode runs/demo data/demo/prepared
  b2t decode runs/t15 prepared/t15 --split test --beams 4 --out submission.csv
  b2t decode runs/t15 prepared/t15 --lm lm/t15 --n-best 10 --out hypotheses.jsonl
  acquire | b2t decode runs/causal --follow - --session t15.2024.01.01 --lm lm/t15

With --lm, words are read from the phonemes by a lexicon and a language model of `b2t lm`.
Prints one line per trial: its id (session/block/trial), a tab, the text. With --out FILE.jsonl the
lines are JSON objects with `row` and `prediction`, and with --n-best the hypotheses with their
scores; with --out FILE.csv they are those of the Brain-to-Text '25 competition: columns id, which
counts from 0 in the order of the dataset, and text, as it is scored.

With --follow, lines are the seconds of signal read, `partial` or `final`, and the text, at each
change. Bins are float32, little-endian, C values after each other, in the unit of the prepared
recordings (z-scored as `b2t prepare` does, not smoothed) and the model's order of channels; with
--raw, in the unit of the recordings."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `b2t decode`."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, help="run folder, or a folder with a saved model")
    parser.add_argument(
        "dataset", nargs="?", help="prepared folder, Hugging Face id, or parquet glob"
    )
    parser.add_argument("--split", default="test", help="split to decode (test)")
    parser.add_argument("--batch-size", type=positive, default=16, help="trials per forward (16)")
    parser.add_argument("--beams", type=positive, help="beams; 1 is greedy (default: the run's)")
    parser.add_argument("--max-new-tokens", type=positive, help="longest text (default: the run's)")
    parser.add_argument("--lm", type=Path, help="language model of `b2t lm`: words from phonemes")
    add_no_rescoring(parser)
    parser.add_argument(
        "--n-best", type=positive, metavar="N", help="with --lm and --out: N hypotheses per trial"
    )
    parser.add_argument("--device", help="torch device (default: a GPU where there is one)")
    parser.add_argument("--out", type=Path, help=".jsonl or .csv to write instead of printing")
    add_checkpoint(parser)
    _add_follow(parser)
    parser.add_argument(
        "--force",
        action="store_true",
        help="go on where the data are of another kind than the model was trained on",
    )


def _add_follow(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("as bins come (a causal model: model.encoder.causal)")
    group.add_argument(
        "--follow",
        metavar="SOURCE",
        help="read bins from standard input (-) or a growing file (raw float32, or .npy) instead "
        "of a dataset; a bin of NaN ends a sentence",
    )
    group.add_argument("--session", help="session of the bins (default: the mean of all)")
    group.add_argument(
        "--at-once",
        type=positive,
        default=1,
        metavar="N",
        help="bins read at once (1: as they come)",
    )
    group.add_argument(
        "--raw",
        action="store_true",
        help="bins come as recorded: reference, filters and z-scores are those of the training, "
        "with a running mean and deviation",
    )
    group.add_argument(
        "--forget",
        type=seconds,
        default=300.0,
        metavar="SECONDS",
        help="with --raw: time constant of the running mean and deviation (300)",
    )
    group.add_argument(
        "--start-from",
        type=Path,
        metavar="FOLDER",
        help="with --raw: prepared dataset whose statistics of the session, or of all its "
        "training trials, they start from (default: from nothing)",
    )
    group.add_argument(
        "--idle",
        type=seconds,
        default=5.0,
        metavar="SECONDS",
        help="a file that has not grown for so long has ended (5)",
    )


def run(args: argparse.Namespace) -> int:
    """Decode every trial of the split, in the order of the dataset."""
    from b2t.data.dataset import load_trials
    from b2t.data.trials import row_ids
    from b2t.errors import UserError
    from b2t.evaluate import run_folder
    from b2t.evaluate.decode import decode_batches, rank_batches, read_batches
    from b2t.evaluate.language_model import read_card
    from b2t.evaluate.waiting import with_time_left
    from b2t.records import write_atomically

    if (args.dataset is None) == (args.follow is None):
        raise UserError("give a dataset to decode, or --follow SOURCE for bins as they come")
    if args.follow is None and (args.raw or args.start_from):
        raise UserError("--raw and --start-from are for bins as they come: give --follow SOURCE")
    if args.follow is not None:
        from b2t.evaluate.follow import run as follow

        return follow(args)
    _check_out(args)
    opened = run_folder.open_run(args.run, args.checkpoint)
    split = run_folder.choose_split(args.dataset, args.split)
    if args.lm is not None:
        read_card(args.lm)  # a wrong folder is told before the model is loaded
    model, tokenizer = run_folder.load_model(opened, args.device)
    words = open_words(model, args.lm, not args.no_rescoring)
    if tokenizer is None and words is None:
        raise UserError(
            f"{opened.checkpoint}: the model has no text decoder, so there is no text to decode; "
            "--lm reads words from phonemes, `b2t tokenize` writes its codes"
        )
    batches = run_folder.load_batches(
        opened, model, args.dataset, split, tokenizer, args.batch_size, force=args.force
    )
    trials = run_folder.count_trials(args.dataset, split)
    batches = with_time_left(batches, f"decode {split}", trials, FASTER)
    ranked: dict[str, list[dict[str, Any]]] = {}
    if words is not None and args.n_best is not None:
        ranked = dict(rank_batches(model, batches, words, args.n_best))
        texts = {row: some[0]["text"] for row, some in ranked.items()}
    elif words is not None:
        texts = dict(read_batches(model, batches, words))
    else:
        options = generation_options(opened, model, args.beams, args.max_new_tokens)
        texts = dict(decode_batches(model, batches, tokenizer, **options))
    rows = row_ids(load_trials(args.dataset, split))
    if args.out is None:
        for row in rows:
            print(f"{row}\t{texts[row]}")
        return 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    written = _table(rows, texts) if args.out.suffix == ".csv" else _lines(rows, texts, ranked)
    write_atomically(args.out, written)
    print(f"written: {args.out} ({counted(len(rows), 'trial')} of {split})")
    return 0


def _check_out(args: argparse.Namespace) -> None:
    """Refuse places and kinds of output that cannot be, before the work."""
    from b2t.errors import UserError
    from b2t.records import require_file

    if args.out is not None:
        require_file(args.out, "--out")
    if args.n_best is not None and (
        args.lm is None or args.out is None or args.out.suffix == ".csv"
    ):
        raise UserError("--n-best: hypotheses come of --lm, and go to --out FILE.jsonl")


def _lines(
    rows: Sequence[str], texts: dict[str, str], ranked: dict[str, list[dict[str, Any]]]
) -> str:
    """Return one JSON object per row."""
    records: list[dict[str, Any]] = [{"row": row, "prediction": texts[row]} for row in rows]
    for record in records if ranked else ():
        record["n_best"] = [finite(hypothesis) for hypothesis in ranked[record["row"]]]
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _table(rows: Sequence[str], texts: dict[str, str]) -> str:
    """Return the competition's CSV."""
    from b2t.evaluate.metrics import normalise_text

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("id", "text"))
    writer.writerows((number, normalise_text(texts[row])) for number, row in enumerate(rows))
    return text.getvalue()
