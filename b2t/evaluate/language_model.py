"""A folder with an n-gram model, a lexicon and the weights of their search: made, tuned, opened."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from tqdm import tqdm

from b2t.errors import UserError
from b2t.evaluate import metrics
from b2t.evaluate.lexicon import RULE, build_lexicon, read_lexicon
from b2t.evaluate.likelihood import CausalScorer
from b2t.evaluate.ngram import DEFAULT_ORDER, NGramModel, estimate
from b2t.evaluate.rescoring import Rescoring, WordReader, require_text_decoder
from b2t.evaluate.surface import learn_surface, read_surface
from b2t.evaluate.words import SearchOptions, WordDecoder, emissions
from b2t.records import write_atomically

if TYPE_CHECKING:
    from b2t.model.brain_to_text import BrainToText

ARPA_FILE = "lm.arpa"
LEXICON_FILE = "lexicon.txt"
CARD_FILE = "lm.json"
SENTENCES_FILE = "sentences.npy"
SURFACE_FILE = "surface.json"

_GRID: dict[str, tuple[float, ...]] = {
    "lm_weight": (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0),
    "word_score": (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0),
    "blank_penalty": (0.0, 0.7, 1.4, 2.1),
}


class Tuned(BaseModel):
    """What the weights were chosen by.

    Attributes:
        run: run folder, and `checkpoint` in it.
        fingerprint: of the dataset, and its `split`.
        trials: decoded per try.
        tries: settings that were tried.
        wer: of the chosen one, which is too good by having been chosen.
        wer_before: of the weights before.
        wer_joint: of the joint scores, likewise; None where nothing but CTC and n-grams judges.
    """

    model_config = ConfigDict(extra="forbid")

    run: str
    checkpoint: str
    fingerprint: str
    split: str
    trials: int
    tries: int
    wer: float
    wer_before: float
    wer_joint: float | None = None


class LanguageModelCard(BaseModel):
    """What `lm.json` says of a language model.

    Attributes:
        source: datasets or text files, and the `split` of datasets.
        order: N of the n-grams, pruned by `prune` (see `b2t.evaluate.ngram.estimate`).
        sentences: that were counted, `words` of them different.
        discounts: per order, null where the text was too small to estimate them.
        learnt: words pronounced as labels have it.
        left_out: words without a pronunciation, which are never decoded.
        pronunciation: rule of the lexicon.
        search: weights and widths.
        rescoring: weights of the joint scores, None where none were tuned.
        tuned: what chose the weights, None for the defaults.
    """

    model_config = ConfigDict(extra="forbid")

    source: list[str]
    split: str | None
    order: int
    prune: list[int]
    sentences: int
    words: int
    discounts: list[tuple[float, float, float] | None]
    learnt: int
    left_out: list[str]
    pronunciation: str = RULE
    search: SearchOptions = SearchOptions()
    rescoring: Rescoring | None = None
    tuned: Tuned | None = None

    def write(self, folder: Path) -> None:
        """Write `lm.json`."""
        write_atomically(folder / CARD_FILE, self.model_dump_json(indent=2) + "\n")


@dataclass(frozen=True)
class TextSource:
    """Text to learn from.

    Attributes:
        name: file or dataset.
        texts: sentences as they stand.
        labels: phoneme class ids of each, None where there are none.
    """

    name: str
    texts: Sequence[str]
    labels: Sequence[Sequence[int] | None]


def make(
    sources: Sequence[TextSource],
    folder: Path,
    order: int = DEFAULT_ORDER,
    prune: Sequence[int] = (0,),
    max_words: int | None = None,
    split: str | None = None,
    lexicon_only: bool = False,
) -> tuple[LanguageModelCard, NGramModel]:
    """Estimate a model and a lexicon from texts and write them.

    Args:
        sources: where the texts come from.
        folder: to write into.
        order: N of the n-grams.
        prune: see `estimate`.
        max_words: keep the most frequent words only; the others count as unknown.
        split: recorded.
        lexicon_only: give the n-grams no weight: words are those of the lexicon, all alike.

    Raises:
        UserError: no text, or no word with a pronunciation.
    """
    sentences = [
        plain.split() for source in sources for text in source.texts if (plain := _plain(text))
    ]
    if not sentences:
        raise UserError(f"{', '.join(s.name for s in sources)}: no text to learn from")
    words = _vocabulary(sentences, max_words)
    labelled = [
        (text, labels)
        for source in sources
        for text, labels in zip(source.texts, source.labels, strict=True)
        if text and labels
    ]
    lexicon = build_lexicon(words, labelled)
    known = lexicon.spellings.keys()
    # An unknown word breaks a sentence: n-grams across it would be n-grams that nobody said.
    model = estimate((part for s in sentences for part in _known_parts(s, known)), order, prune)
    card = LanguageModelCard(
        source=[source.name for source in sources],
        split=split,
        order=order,
        prune=list(prune),
        sentences=len(sentences),
        words=len(known),
        discounts=model.discounts,
        search=SearchOptions(lm_weight=0.0 if lexicon_only else SearchOptions().lm_weight),
        learnt=lexicon.learnt,
        left_out=lexicon.missing,
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.write(folder / ARPA_FILE)
    lexicon.write(folder / LEXICON_FILE)
    learn_surface(text for source in sources for text in source.texts).write(folder / SURFACE_FILE)
    np.save(folder / SENTENCES_FILE, np.unique([_hash(" ".join(s)) for s in sentences]))
    card.write(folder)
    return card, model


def read_card(folder: Path) -> LanguageModelCard:
    """Read `lm.json`.

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / CARD_FILE
    if not path.is_file():
        raise UserError(f"{folder}: no language model there ({CARD_FILE}); `b2t lm` makes one")
    try:
        return LanguageModelCard.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path}: {where}: {first['msg']}; make it anew with `b2t lm`") from None


def open_decoder(folder: Path, **search: float) -> tuple[WordDecoder, LanguageModelCard]:
    """Open a folder that `make` has written.

    Args:
        folder: with the three files.
        search: replaces weights of the card.

    Raises:
        UserError: a file is missing or damaged.
    """
    card = read_card(folder)
    lexicon = read_lexicon(folder / LEXICON_FILE)
    options = SearchOptions.model_validate({**card.search.model_dump(), **search})
    return WordDecoder(folder / ARPA_FILE, lexicon, options), card


def open_reader(folder: Path, model: "BrainToText", rescoring: bool = True) -> WordReader:
    """Open a folder to read words of what a model makes of signals.

    Args:
        folder: that `make` has written.
        model: a `BrainToText`.
        rescoring: read by joint scores too, where their weights were tuned.

    Raises:
        UserError: a file is missing or damaged, or the model lacks what was tuned.
    """
    decoder, card = open_decoder(folder)
    weights = card.rescoring
    if weights is None or not rescoring:
        return WordReader(decoder)
    causal = None
    if weights.causal is not None and weights.causal_weight:
        causal = CausalScorer(weights.causal, str(next(model.parameters()).device))
    return WordReader(
        decoder,
        weights,
        require_text_decoder(model, weights, str(folder)),
        read_surface(folder / SURFACE_FILE),
        causal,
    )


def known_share(folder: Path, targets: Iterable[str]) -> float | None:
    """Share of target sentences that stand in the text of the model; None if not known."""
    path = folder / SENTENCES_FILE
    wanted = np.array([_hash(metrics.normalise_text(target)) for target in targets], np.uint64)
    if not path.is_file() or not len(wanted):
        return None
    return float(np.isin(wanted, np.load(path)).mean())


def tune(
    decoder: WordDecoder,
    rows: Sequence[Tensor],
    targets: Sequence[str],
    progress: bool = False,
) -> tuple[SearchOptions, float, float, int]:
    """Choose the weights of a search by WER, one weight after another, twice over a grid.

    A language model of weight 0 keeps it: its words are read by the lexicon alone.

    Args:
        decoder: keeps the chosen weights.
        rows: phoneme logits [P, 41] of the real frames of each trial.
        targets: what was meant.
        progress: show a bar, on a terminal.

    Returns:
        The weights, their WER, that of the weights before, and the number of settings tried.
    """
    seen: dict[SearchOptions, tuple[float, float]] = {}

    def score(options: SearchOptions) -> tuple[float, float]:
        if options not in seen:
            seen[options] = _rates(decoder.with_options(options), rows, targets)
        return seen[options]

    before = best = decoder.options
    grids = {n: g for n, g in _GRID.items() if before.lm_weight or n != "lm_weight"}
    steps = [(name, value) for _ in range(2) for name, grid in grids.items() for value in grid]
    for name, value in tqdm(steps, desc="tune", disable=None if progress else True, leave=False):
        tried = best.model_copy(update={name: value})
        if score(tried) < score(best):
            best = tried
    decoder.with_options(best)
    return best, score(best)[0], score(before)[0], len(seen)


def _rates(
    decoder: WordDecoder, rows: Sequence[Tensor], targets: Sequence[str]
) -> tuple[float, float]:
    """WER and, to decide between equals, CER."""
    said = []
    for row in rows:
        everything = row.new_ones(1, len(row)).bool()
        frames = emissions(row[None], everything, decoder.options.blank_penalty)
        said.append(decoder.n_best(frames[0], 1)[0].text)
    words = metrics.word_error_rate(targets, said)
    characters = metrics.character_error_rate(targets, said)
    return (words or 0.0, characters or 0.0)


def _plain(text: str | None) -> str:
    return metrics.normalise_text(text) if text else ""


def _vocabulary(sentences: Sequence[Sequence[str]], max_words: int | None) -> list[str]:
    counts = Counter(word for sentence in sentences for word in sentence)
    ordered = sorted(counts, key=lambda word: (-counts[word], word))
    return ordered[:max_words]


def _known_parts(sentence: Sequence[str], known: Iterable[str]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in sentence:
        if word in known:
            parts[-1].append(word)
        else:
            parts.append([])
    return [part for part in parts if part]


def _hash(sentence: str) -> np.uint64:
    return np.frombuffer(hashlib.blake2b(sentence.encode(), digest_size=8).digest(), np.uint64)[0]
