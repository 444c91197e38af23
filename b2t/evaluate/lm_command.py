"""`b2t lm`: a language model and a lexicon from texts, for words from phonemes."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from b2t.evaluate.evaluate_command import add_checkpoint, positive
from b2t.evaluate.ngram import DEFAULT_ORDER

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from b2t.data.batches import Batch
    from b2t.evaluate.language_model import LanguageModelCard, TextSource
    from b2t.evaluate.likelihood import CausalScorer
    from b2t.evaluate.ngram import NGramModel
    from b2t.evaluate.words import WordDecoder
    from b2t.model.brain_to_text import BrainToText

SUMMARY = "make an n-gram language model and a lexicon, which read words from phonemes"
EPILOG = """\
examples:
  b2t lm data/demo/prepared --out lm/demo
  b2t lm data/demo/prepared --out lm/demo --tune runs/demo
  b2t lm data/demo/prepared --out lm/demo --tune runs/demo --rescore gpt2
  b2t lm prepared/t15 news.txt --out lm/large --order 4 --prune 0 0 1 --max-words 125000
  b2t lm data/demo/prepared --out lm/words --lexicon-only --tune runs/demo
  b2t evaluate runs/demo --lm lm/demo

A dataset gives the sentences of its training split, and pronunciations from its phoneme labels; a
.txt file one sentence per line. Words that no label shows are looked up in the CMU dictionary;
those that it lacks are listed and never decoded. The n-grams are smoothed by modified Kneser-Ney
and written as ARPA. --tune chooses the weights of language model, words and blank on a split that
is neither trained on nor reported (val); without SOURCE it tunes a model that is there. A tuned
model is replaced only where --tune is given again. Where the run has a text decoder, or --rescore
names a causal language model of transformers, --tune also chooses the weights of joint scores: CTC,
n-grams and these judge the best hypotheses together."""

_ORDERS = range(2, 7)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `b2t lm`."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", nargs="*", help="datasets, or .txt files of sentences")
    parser.add_argument("--out", type=Path, required=True, help="folder of the language model")
    parser.add_argument("--split", default="train", help="split of datasets to learn from (train)")
    parser.add_argument(
        "--order",
        type=positive,
        default=DEFAULT_ORDER,
        help=f"words in an n-gram ({DEFAULT_ORDER})",
    )
    parser.add_argument(
        "--prune",
        type=int,
        nargs="+",
        default=[0],
        metavar="N",
        help="leave out n-grams seen at most N times, per order from 1 (0: none)",
    )
    parser.add_argument(
        "--lexicon-only",
        action="store_true",
        help="give the n-grams no weight: what the words of the texts alone make of phonemes",
    )
    parser.add_argument("--max-words", type=positive, help="keep the most frequent words only")
    parser.add_argument("--tune", type=Path, metavar="RUN", help="run whose phonemes tune weights")
    parser.add_argument("--tune-data", help="dataset to tune on (default: the run's data.path)")
    parser.add_argument("--tune-split", default="val", help="split to tune on (val)")
    parser.add_argument(
        "--rescore", metavar="MODEL", help="causal language model that judges too: folder or Hub id"
    )
    parser.add_argument(
        "--n-best", type=positive, default=50, help="hypotheses that are judged jointly (50)"
    )
    parser.add_argument("--limit", type=positive, help="tune on at most LIMIT trials")
    parser.add_argument("--batch-size", type=positive, default=16, help="trials per forward (16)")
    parser.add_argument("--device", help="torch device (default: a GPU where there is one)")
    add_checkpoint(parser)
    parser.add_argument("--force", action="store_true", help="tune on data of another kind")


def run(args: argparse.Namespace) -> int:
    """Make the model, tune it, or both."""
    from b2t.errors import UserError
    from b2t.evaluate.language_model import CARD_FILE, make, read_card
    from b2t.evaluate.run_folder import open_run
    from b2t.records import require_writable

    require_writable(args.out, "--out")
    if args.order not in _ORDERS:
        raise UserError(
            f"--order {args.order}: KenLM, which reads the model, takes n-grams of "
            f"{_ORDERS[0]} to {_ORDERS[-1]} words"
        )
    if not args.source and args.tune is None:
        raise UserError("name a dataset or a .txt file to learn from (see b2t lm --help)")
    if not args.source and not (args.out / CARD_FILE).is_file():
        raise UserError(f"{args.out}: no language model to tune; name what to learn it from")
    if args.source and args.tune is None and (args.out / CARD_FILE).is_file():
        tuned = read_card(args.out).tuned
        if tuned is not None:
            raise UserError(
                f"{args.out}: holds a language model whose weights were tuned on {tuned.run}, and "
                "without --tune they would be lost; name another folder or remove it"
            )
    if args.tune is not None:  # a run that is not there is told before anything is made
        open_run(args.tune, args.checkpoint)
    if args.source:
        sources = [read_source(name, args.split) for name in args.source]
        card, model = make(
            sources, args.out, args.order, args.prune, args.max_words, args.split, args.lexicon_only
        )
        _tell(card, model, args.out)
    if args.tune is not None:
        _tune(args)
    return 0


def read_source(name: str, split: str) -> "TextSource":
    """Read the sentences of a dataset's split, or the lines of a text file.

    Raises:
        UserError: it is neither, or holds no text.
    """
    from b2t.data.dataset import load_trials
    from b2t.data.description import SUFFIXES
    from b2t.errors import UserError
    from b2t.evaluate.language_model import TextSource

    path = Path(name)
    if path.suffix == ".txt":
        try:
            lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not a text in UTF-8 (byte {error.start})") from None
        return TextSource(name, lines, [None] * len(lines))
    if path.is_file() and path.suffix not in (".parquet", *SUFFIXES):
        raise UserError(
            f"{path}: expected a dataset, or sentences in a file whose name ends in .txt; rename "
            "it if it holds one sentence per line"
        )
    trials = load_trials(name, split).select_columns(["text", "phonemes"])
    texts, labels = list(trials["text"]), list(trials["phonemes"])
    kept = [i for i, text in enumerate(texts) if text]
    if not kept:
        raise UserError(f"{name}: the {split} split has no text to learn from")
    return TextSource(name, [texts[i] for i in kept], [labels[i] for i in kept])


def _tell(card: "LanguageModelCard", model: "NGramModel", folder: Path) -> None:
    grams = " / ".join(f"{len(grams):,}" for grams in model.log_probability)
    print(
        f"{card.sentences:,} sentences, {card.words:,} words ({card.learnt:,} pronounced as the "
        f"labels have it), {grams} n-grams of order 1–{card.order}"
    )
    if card.left_out:
        shown = ", ".join(card.left_out[:10]) + (" …" if len(card.left_out) > 10 else "")
        print(f"left out, as they have no pronunciation: {len(card.left_out):,} words: {shown}")
    fixed = [str(n + 1) for n, found in enumerate(card.discounts) if found is None]
    if fixed:
        print(f"too little text to estimate discounts of order {', '.join(fixed)}: 0.5, 1, 1.5")
    print(f"written: {folder}: lm.arpa, lexicon.txt, lm.json")


def _tune(args: argparse.Namespace) -> None:
    from b2t.data.dataset import dataset_info
    from b2t.errors import UserError
    from b2t.evaluate import run_folder
    from b2t.evaluate.language_model import Tuned, known_share, open_decoder, tune
    from b2t.evaluate.likelihood import CausalScorer

    decoder, card = open_decoder(args.out)
    opened = run_folder.open_run(args.tune, args.checkpoint)
    path = opened.data_path(args.tune_data)
    split = run_folder.choose_split(path, args.tune_split)
    if opened.config is not None and split == opened.config.data.train_split:
        raise UserError(
            f"--tune-split {split}: the model was trained on it, so that its phonemes are too good "
            "there; name a split that was held out"
        )
    model, _ = run_folder.load_model(opened, args.device)  # which says what is wrong with a device
    causal = None if args.rescore is None else CausalScorer(args.rescore, args.device)

    def batches() -> "Iterator[Batch]":
        return run_folder.load_batches(
            opened, model, path, split, None, args.batch_size, args.limit, args.force, texts=True
        )

    rows, targets = phoneme_logits(model, batches())
    if not rows:
        raise UserError(f"{path}: the {split} split has no text to tune by")
    search, wer, before, tries = tune(decoder, rows, targets, progress=True)
    card.search = search
    card.tuned = Tuned(
        run=str(args.tune),
        checkpoint=opened.label,
        fingerprint=dataset_info(path).fingerprint,
        split=split,
        trials=len(rows),
        tries=tries,
        wer=wer,
        wer_before=before,
    )
    print(
        f"tuned on {len(rows):,} trials of {split}, {tries} settings: language model "
        f"{search.lm_weight:g}, word {search.word_score:g}, blank {search.blank_penalty:g}; "
        f"WER there {100 * before:.1f} → {100 * wer:.1f} %"
    )
    card.rescoring = None
    _tune_jointly(args, card, decoder, model, causal, batches())
    card.write(args.out)
    known = known_share(args.out, targets)
    if known:
        print(f"note: {100 * known:.1f} % of these sentences stand in the model's text")


def _tune_jointly(
    args: argparse.Namespace,
    card: "LanguageModelCard",
    decoder: "WordDecoder",
    model: "BrainToText",
    causal: "CausalScorer | None",
    batches: "Iterable[Batch]",
) -> None:
    """Choose the weights of joint scores where there is more to judge than CTC and n-grams."""
    from b2t.evaluate.language_model import SURFACE_FILE
    from b2t.evaluate.rescoring import Rescoring, WordReader, collect, tune_rescoring
    from b2t.evaluate.surface import read_surface

    writes = model.text_decoder is not None and (
        model.config.trained is None or "text_decoder" in model.config.trained
    )
    if not writes and causal is None:
        return
    start = Rescoring(
        n_best=args.n_best,
        own=4 if writes else 0,
        lm_weight=card.search.lm_weight,
        word_score=card.search.word_score,
        causal=args.rescore,
    )
    reader = WordReader(
        decoder,
        start,
        model if writes else None,
        read_surface(args.out / SURFACE_FILE),
        causal,
    )
    trials, targets = collect(reader, model, batches)
    weights, wer, before, tries = tune_rescoring(trials, targets, start)
    card.rescoring = weights
    assert card.tuned is not None
    card.tuned.wer_joint = wer
    print(
        f"joint scores, {tries} settings: language model {weights.lm_weight:g}, word "
        f"{weights.word_score:g}, text decoder {weights.decoder_weight:g}, causal model "
        f"{weights.causal_weight:g}; WER there {100 * before:.1f} → {100 * wer:.1f} %"
    )


def phoneme_logits(
    model: "BrainToText", batches: "Iterable[Batch]"
) -> tuple[list["Tensor"], list[str]]:
    """Logits [P, 41] of the real frames of every row with text, and the texts.

    Raises:
        UserError: the model has no phoneme head.
    """
    import torch

    from b2t.errors import UserError
    from b2t.evaluate.decode import to_model

    if model.phoneme_head is None:
        raise UserError(
            "the model has no phoneme head (model.phoneme_head.enabled): a lexicon and a language "
            "model have nothing to read"
        )
    rows, targets = [], []
    with torch.no_grad():
        for batch in batches:
            output = model(to_model(batch, model), weights={"phoneme": 1.0})
            logits, masks = output.phoneme_logits.float().cpu(), output.frame_mask.cpu()
            for frames, mask, text in zip(logits, masks, batch.texts, strict=True):
                if text:
                    rows.append(frames[mask])
                    targets.append(text)
    return rows, targets
