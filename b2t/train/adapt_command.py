"""`b2t adapt`: a new session without labels, by what a trained model hears in it."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from b2t.arguments import finite, seed
from b2t.counted import counted

if TYPE_CHECKING:
    from datasets import Dataset

    from b2t.data.batches import Batch
    from b2t.evaluate.run_folder import Run
    from b2t.model.brain_to_text import BrainToText
    from b2t.train.adaptation import PseudoLabel

SUMMARY = "adapt a trained model to a new session without labels"
EPILOG = """\
examples:
  b2t adapt runs/t15 prepared/new --out models/t15-new
  b2t adapt runs/t15 prepared/new --lm lm/t15 --out models/t15-new
  b2t evaluate models/t15-new --data prepared/new --split test

Only the maps of the channels of sessions that the model was not trained on are learnt, from the
phonemes that it hears in them itself, with --lm those of the words that a language model makes of
them; trials that it is sure of count. Labels of the dataset are not learnt from; where there are
any, error rates before and after are printed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `b2t adapt`."""
    parser.epilog = EPILOG
    parser.add_argument("run", type=Path, help="run folder, or a folder with a saved model")
    parser.add_argument("dataset", help="prepared folder, Hugging Face id, or parquet glob")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapted model")
    parser.add_argument("--split", default="train", help="split to adapt on (train)")
    parser.add_argument("--lm", type=Path, help="language model of `b2t lm` that corrects labels")
    parser.add_argument("--rounds", type=_count, default=4, help="times labels are made anew (4)")
    parser.add_argument("--epochs", type=_count, default=3, help="epochs in a round (3)")
    parser.add_argument("--lr", type=finite, default=1e-3, help="learning rate of AdamW (0.001)")
    parser.add_argument(
        "--keep",
        type=finite,
        default=0.8,
        help="share of the trials, the surest, learnt from (0.8)",
    )
    parser.add_argument("--batch-size", type=_count, default=16, help="trials per step (16)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of order and augmentation (0)")
    parser.add_argument("--device", help="torch device (default: a GPU where there is one)")
    parser.add_argument(
        "--checkpoint",
        default="best",
        metavar="WHICH",
        help="model of the run: best, last, the number of a step, or a folder (best)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="go on where the data are of another kind than the model was trained on",
    )


def run(args: argparse.Namespace) -> int:
    """Adapt, print each round, save the model."""
    from b2t.evaluate import run_folder
    from b2t.evaluate.evaluate_command import open_words
    from b2t.train.adaptation import AdaptationOptions, adapt, hear

    _check(args)
    opened = run_folder.open_run(args.run, args.checkpoint)
    model, source, new = _open(args, opened)
    reader = open_words(model, args.lm, rescoring=False)
    words = None if reader is None else reader.decoder
    options = AdaptationOptions(rounds=args.rounds, epochs=args.epochs, lr=args.lr, keep=args.keep)
    print(
        f"{counted(len(source.trials), 'trial')} of {', '.join(new)}, "
        f"{source.split} of {args.dataset}"
    )
    record = []
    maps = [model.config.sessions.index(name) for name in new]
    rounds = adapt(model, maps, lambda: hear(model, source.plain(), words), source.epoch, options)
    for number, found in enumerate(rounds):
        rate = source.error_rate(found.labels)
        known = (
            "" if rate is None else f" · PER {100 * rate:.1f} % (its labels are not learnt from)"
        )
        print(f"round {number}: confidence {found.confidence:.3f}{known}", flush=True)
        loss = None if number == 0 else found.loss
        record.append({"confidence": found.confidence, "loss": loss, "per": rate})
    if record[-1]["confidence"] < record[0]["confidence"]:  # type: ignore[operator]
        print("it is less sure than before: keep the model as it was, or try a lower --lr")
    model.save_pretrained(args.out)
    content = {
        "source": str(opened.checkpoint), "dataset": args.dataset, "split": source.split,
        "sessions": new, "options": vars(options), "seed": args.seed,
        "lm": None if args.lm is None else str(args.lm), "rounds": record,
    }  # fmt: skip
    (args.out / "adaptation.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    print(f"written: {args.out}")
    return 0


def _check(args: argparse.Namespace) -> None:
    from b2t.errors import UserError
    from b2t.records import require_writable

    if not 0 < args.keep <= 1 or args.lr <= 0:
        raise UserError(f"--keep={args.keep:g} --lr={args.lr:g}: expected 0 < keep ≤ 1 and lr > 0")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"--out={args.out}: it is there already; name a new folder")
    require_writable(args.out.parent, "--out")


def _open(args: argparse.Namespace, opened: "Run") -> "tuple[BrainToText, _Trials, list[str]]":
    """Return the model with maps of the new sessions, their trials, and their names."""
    from b2t.data.dataset import load_trials
    from b2t.data.trials import values_of
    from b2t.errors import UserError
    from b2t.evaluate import run_folder
    from b2t.train.adaptation import add_sessions

    split = run_folder.choose_split(args.dataset, args.split)
    trials = load_trials(args.dataset, split)
    model, _ = run_folder.load_model(opened, args.device)
    if model.phoneme_head is None:
        raise UserError(f"{opened.checkpoint}: no phoneme head, so that it hears no phonemes")
    sessions = values_of(trials, "session")
    present = set(sessions)
    new = sorted(present - set(model.config.sessions))
    if not new:
        raise UserError(
            f"{args.dataset}, {split}: the model was trained on all of its sessions "
            f"({', '.join(sorted(present)[:4])}); there is none to adapt to"
        )
    model = add_sessions(model, new)
    trials = trials.select([i for i, name in enumerate(sessions) if name in new])
    order = run_folder.require_same_kind(opened, model, args.dataset, trials, args.force)
    return model, _Trials(opened, model, trials, split, order, args), new


class _Trials:
    """Trials as the model reads them: plain, or an epoch of them augmented as in training."""

    def __init__(
        self,
        opened: "Run",
        model: "BrainToText",
        trials: "Dataset",
        split: str,
        order: list[int] | None,
        args: argparse.Namespace,
    ) -> None:
        from b2t.data.augment import Augment
        from b2t.data.batches import TrialRows

        smoothing = (model.config.signal or {}).get("smoothing_bins") or 0.0
        given = {} if opened.config is None else opened.config.data.augment.model_dump()
        given = given or {"enabled": False}
        given |= {"smoothing_ms": 0.0, "smoothing_bins": smoothing, "session_mixing": 0.0}
        self.augment = Augment(**given)
        self.trials, self.split, self.order, self.args = trials, split, order, args
        self.sessions = model.config.sessions
        self.rows = TrialRows(trials, None, self.sessions, self.augment, seed=args.seed)
        self.labels = [list(said or []) for said in trials["phonemes"]]

    def plain(self) -> "Iterator[Batch]":
        """Return batches of all trials without chance."""
        from b2t.data.batches import eval_batches

        size = self.args.batch_size
        batches = eval_batches(
            self.trials, None, self.sessions, augment=self.augment, batch_size=size
        )
        return (self._aligned(batch) for batch in batches)

    def epoch(self, number: int, chosen: set[str]) -> "Iterator[Batch]":
        """Yield augmented batches of the chosen rows, in an order of this epoch."""
        import numpy as np

        from b2t.data.batches import collate
        from b2t.data.trials import row_ids

        rows = [i for i, row in enumerate(row_ids(self.trials)) if row in chosen]
        generator = np.random.default_rng([self.args.seed, number])
        order, size = generator.permutation(rows), self.args.batch_size
        for first in range(0, len(order), size):
            examples = [self.rows.example(number, int(i)) for i in order[first : first + size]]
            yield self._aligned(collate(examples))

    def error_rate(self, heard: "dict[str, PseudoLabel]") -> float | None:
        """PER of what was heard, where the trials have labels."""
        from b2t.data.trials import row_ids
        from b2t.evaluate.metrics import phoneme_error_rate

        said = [heard[row].phonemes for row in row_ids(self.trials)]
        pairs = [pair for pair in zip(self.labels, said, strict=True) if pair[0]]
        return phoneme_error_rate(*zip(*pairs, strict=True)) if pairs else None

    def _aligned(self, batch: "Batch") -> "Batch":
        return batch if self.order is None else batch.with_channels(self.order)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text}")
    return value
