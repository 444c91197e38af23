"""`b2t evaluate`: error rates beside their controls, codebook use, decoded sentences."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from b2t.arguments import seed
from b2t.records import require_writable, write_atomically
from b2t.run_files import METRICS_FILE

if TYPE_CHECKING:
    from b2t.evaluate.rescoring import WordReader
    from b2t.evaluate.results import Evaluation
    from b2t.evaluate.run_folder import Run
    from b2t.model.brain_to_text import BrainToText

COMPARISON_FILE = "comparison.json"
FASTER = "faster: fewer --beams, fewer --max-new-tokens"

SUMMARY = "score a trained model on held-out trials, with a noise control beside it"
EPILOG = """\
examples:
  b2t evaluate runs/demo
  b2t evaluate runs/demo --split val --beams 4
  b2t evaluate runs/demo --lm lm/demo
  b2t evaluate runs/demo runs/other --split test
  b2t evaluate runs/t15 --data prepared/t15 --batch-size 32 --out results/t15

Text is decoded freely: the model never sees the target. Beside every error rate stand its
controls: the same model fed Gaussian noise with each trial's channel means, deviations and length,
noise of equal spectrum, its own codes in another order, another trial's signal, and what the
training texts suggest without a brain. A model that has learnt the language and not the brain
scores alike on all: where one does not beat its controls, the first line says so.
With --lm, words are also read from the phonemes by a lexicon and a language model of `b2t lm`,
and by joint scores with the text decoder or a causal model, where these were tuned.
Of two runs each is evaluated, then both are compared trial by trial (paired bootstrap).
Writes evaluation.json, predictions.jsonl and evaluation.png into the run folder."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `b2t evaluate`."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "run", type=Path, nargs="+", help="run folder, or a folder with a saved model; two compare"
    )
    parser.add_argument("--data", help="dataset to evaluate on (default: the run's data.path)")
    parser.add_argument("--split", help="split (default: test, or val if it alone has text)")
    parser.add_argument("--batch-size", type=positive, default=16, help="trials per forward (16)")
    parser.add_argument("--beams", type=positive, help="beams; 1 is greedy (default: the run's)")
    parser.add_argument("--max-new-tokens", type=positive, help="longest text (default: the run's)")
    parser.add_argument("--lm", type=Path, help="language model of `b2t lm`: words from phonemes")
    add_no_rescoring(parser)
    parser.add_argument(
        "--phoneme-beam",
        type=positive,
        metavar="N",
        help="read phonemes by a CTC prefix beam of width N (default: each frame alone)",
    )
    parser.add_argument("--limit", type=positive, help="at most LIMIT trials, from all sessions")
    parser.add_argument("--no-noise", action="store_true", help="leave out the noise control")
    parser.add_argument(
        "--controls",
        nargs="*",
        choices=("spectrum", "codes", "lm_alone"),
        metavar="CONTROL",
        help="besides white noise: spectrum (noise of equal spectrum), codes (in another order), "
        "lm_alone (the language model without phonemes); default: all, with --no-noise none",
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the controls (0)")
    parser.add_argument("--device", help="torch device (default: a GPU where there is one)")
    parser.add_argument("--out", type=Path, help="folder for the results (default: the run's)")
    add_checkpoint(parser)
    parser.add_argument(
        "--force",
        action="store_true",
        help="go on where the data are of another kind than the model was trained on",
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate one run, or two and their difference."""
    from b2t.errors import UserError
    from b2t.evaluate.comparison import compare_evaluations, told

    if len(args.run) > 2:
        raise UserError(f"{len(args.run)} runs: expected one, or two to compare")
    if len(args.run) == 1:
        evaluate(args, args.run[0], args.out)
        return 0
    names = [str(run) for run in args.run]
    places = [None, None] if args.out is None else [args.out / "a", args.out / "b"]
    a, b = (evaluate(args, *pair) for pair in zip(args.run, places, strict=True))
    found = compare_evaluations(a, b, seed=args.seed)
    print("\n".join(told(names, found)))
    record = {
        "a": names[0],
        "b": names[1],
        **{field: comparison._asdict() for field, comparison in found.items()},
    }
    path = (args.out or args.run[1]) / COMPARISON_FILE
    write_atomically(path, json.dumps(record, indent=2) + "\n")
    print(f"written: {path}")
    return 0


def evaluate(args: argparse.Namespace, run: Path, out: Path | None) -> "Evaluation":
    """Evaluate one run, print, and write the results."""
    from b2t.evaluate import run_folder
    from b2t.evaluate.evaluation import evaluate_model
    from b2t.evaluate.figure import draw_evaluation
    from b2t.evaluate.language_model import read_card
    from b2t.evaluate.provenance import note_language_model, note_provenance
    from b2t.evaluate.table import print_evaluation
    from b2t.evaluate.verdict import verdict
    from b2t.evaluate.waiting import with_time_left
    from b2t.evaluate.words import PhonemeBeam
    from b2t.records import read_jsonl

    opened = run_folder.open_run(run, args.checkpoint)
    require_writable(out or opened.folder, "--out")
    path = opened.data_path(args.data)
    split = run_folder.choose_split(path, args.split)
    if args.lm is not None:
        read_card(args.lm)  # a wrong folder is told before the model is loaded
    model, tokenizer = run_folder.load_model(opened, args.device)
    words = open_words(model, args.lm, not args.no_rescoring)
    batches = run_folder.load_batches(
        opened,
        model,
        path,
        split,
        tokenizer,
        args.batch_size,
        args.limit,
        args.force,
        texts=words is not None,
    )
    trials = run_folder.count_trials(path, split, args.limit)
    remedy = f"{FASTER}, --limit, --no-noise"
    result = evaluate_model(
        model,
        with_time_left(batches, f"evaluate {split}", trials, remedy),
        tokenizer,
        split=split,
        simulated=run_folder.is_simulated(model, path),
        noise_control=not args.no_noise,
        seed=args.seed,
        words=words,
        controls=_controls(args),
        phonemes=None if args.phoneme_beam is None else PhonemeBeam(args.phoneme_beam),
        **generation_options(opened, model, args.beams, args.max_new_tokens),
    )
    note_provenance(result, opened, model, path, args.split, args.seed)
    if args.lm is not None:
        note_language_model(result, args.lm, path)
    result.verdict = verdict(result)
    folder = out or opened.folder
    result.save(folder)
    print_evaluation(result, str(run))
    records = read_jsonl(opened.folder / METRICS_FILE).records
    draw_evaluation(result, folder / "evaluation.png", str(run), records)
    print(f"written: {folder / 'evaluation.json'}, predictions.jsonl, evaluation.png")
    return result


def _controls(args: argparse.Namespace) -> tuple[str, ...]:
    from b2t.evaluate.evaluation import CONTROLS

    if args.controls is not None:
        return tuple(dict.fromkeys(args.controls))
    return () if args.no_noise else CONTROLS


def open_words(
    model: "BrainToText", folder: Path | None, rescoring: bool = True
) -> "WordReader | None":
    """Open the language model of `--lm`, None where there is none.

    Args:
        model: a `BrainToText`.
        folder: of the language model.
        rescoring: read by joint scores too, where they were tuned.

    Raises:
        UserError: it cannot be read, or the model has no phonemes.
    """
    if folder is None:
        return None
    from b2t.errors import UserError
    from b2t.evaluate.language_model import open_reader

    if model.phoneme_head is None:
        raise UserError(
            "--lm: the model has no phoneme head (model.phoneme_head.enabled), so there are no "
            "phonemes to read words from"
        )
    return open_reader(folder, model, rescoring)


def generation_options(
    run: "Run", model: "BrainToText", beams: int | None, max_new_tokens: int | None
) -> dict[str, Any]:
    """Options of text generation: the arguments, else the run's own, else the model's."""
    options: dict[str, Any] = {}
    if model.generation_config is not None:
        own = model.generation_config
        options = {"num_beams": own.num_beams or 1, "max_new_tokens": own.max_new_tokens}
    if run.config is not None:
        options["num_beams"] = run.config.evaluation.num_beams
        options["max_new_tokens"] = run.config.evaluation.max_new_tokens
    if beams is not None:
        options["num_beams"] = beams
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    return options


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Declare `--checkpoint`."""
    parser.add_argument(
        "--checkpoint",
        default="best",
        metavar="WHICH",
        help="model of the run: best, last, the number of a step, or a folder (best)",
    )


def add_no_rescoring(parser: argparse.ArgumentParser) -> None:
    """Declare `--no-rescoring`."""
    parser.add_argument(
        "--no-rescoring",
        action="store_true",
        help="with --lm: leave out the joint scores that `b2t lm --tune` chose weights for",
    )


def positive(text: str) -> int:
    """Read a whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text}")
    return value
