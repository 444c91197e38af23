"""Error rates and overlap scores of decoded sentences and phoneme sequences.

Rates are pooled: edits summed over rows divided by target lengths summed over rows, as the
Brain-to-Text benchmarks score them, so that a long sentence weighs more than a short one.
"""

import re
import unicodedata
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import jiwer
import numpy as np
import sacrebleu
from rouge_score import rouge_scorer
from scipy.stats import bootstrap

_PLAIN = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "`": "'", "‐": "-", "‑": "-"})
_NOT_SCORED = re.compile(r"[^\w\s'\-]|_")
_REPAIRS = (("- ", " "), ("--", ""), (" '", "'"))
"""What the benchmark does to hyphens and apostrophes, in its order."""

NORMALISATION = (
    "as Brain-to-Text '25: every character but letters, digits, hyphens, apostrophes and spaces "
    "deleted (a.m. is am, 1,000 is 1000), lower case, a hyphen before a space and double hyphens "
    "deleted, an apostrophe joined to the word before it, spaces collapsed; before that Unicode "
    "NFKC, typographic apostrophes and hyphens made plain"
)


def normalise_text(text: str) -> str:
    """Return ``text`` as it is scored; ``NORMALISATION`` says what is done to it.

    Source: the scoring of Brain-to-Text '25, `remove_punctuation` in
    model_training/evaluate_model_helpers.py of Neuroprosthetics-Lab/nejm-brain-to-text, commit
    77dbcf8. That one also deletes digits and letters outside ASCII, which would make sentences
    equal that differ in a number, or empty ones of other languages: they are kept here. On ASCII
    text without digits the two agree. A text is normalised once: doing it again may change it.
    """
    text = unicodedata.normalize("NFKC", text).translate(_PLAIN).lower()
    text = _NOT_SCORED.sub("", re.sub(r"\s", " ", text))
    for found, kept in _REPAIRS:
        text = text.replace(found, kept)
    return " ".join(text.split())


@dataclass(frozen=True)
class EditCounts:
    """Edits and target lengths of one kind of unit, one entry per row.

    Attributes:
        edits: [R] int64, substitutions + deletions + insertions.
        lengths: [R] int64, units in the target.
    """

    edits: np.ndarray
    lengths: np.ndarray

    def rate(self) -> float | None:
        """Pooled error rate, a fraction that may exceed 1; None where no target has a unit."""
        total = int(self.lengths.sum())
        return float(self.edits.sum() / total) if total else None

    def interval(
        self, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
    ) -> tuple[float, float] | None:
        """Percentile bootstrap interval of the pooled rate, rows drawn with replacement.

        Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
        """
        if len(self.edits) < 2 or not self.lengths.any():
            rate = self.rate()
            return None if rate is None else (rate, rate)
        found = bootstrap(
            (self.edits, self.lengths),
            _pooled,
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=100,
            method="percentile",
            random_state=np.random.default_rng(seed),
        )
        tail = (1 - confidence) / 2
        low, high = np.nanquantile(found.bootstrap_distribution, [tail, 1 - tail])
        return float(low), float(high)


def _pooled(edits: np.ndarray, lengths: np.ndarray, axis: int = -1) -> np.ndarray:
    """Edits over units; NaN where no target drawn has a unit."""
    units = lengths.sum(axis)
    return edits.sum(axis) / np.where(units > 0, units, np.nan)


def count_edits(
    targets: Sequence[str], predictions: Sequence[str], unit: Literal["word", "character"]
) -> EditCounts:
    """Count word or character edits between sentences, which are taken as they are given.

    A target without a unit has length 0 and every predicted unit is an insertion.
    """
    _same_length(targets, predictions)
    process = jiwer.process_words if unit == "word" else jiwer.process_characters
    edits, lengths = [], []
    for target, prediction in zip(targets, predictions, strict=True):
        found = process(target, prediction)
        edits.append(found.substitutions + found.deletions + found.insertions)
        lengths.append(found.hits + found.substitutions + found.deletions)
    return EditCounts(np.array(edits, np.int64), np.array(lengths, np.int64))


def count_phoneme_edits(
    targets: Sequence[Sequence[Hashable]], predictions: Sequence[Sequence[Hashable]]
) -> EditCounts:
    """Count phoneme edits; a phoneme is anything with a distinct ``str`` without white space."""
    return count_edits(
        [" ".join(map(str, target)) for target in targets],
        [" ".join(map(str, prediction)) for prediction in predictions],
        unit="word",
    )


def word_error_rate(targets: Sequence[str], predictions: Sequence[str]) -> float | None:
    """Pooled WER over normalised sentences."""
    return count_edits(*_normalised(targets, predictions), unit="word").rate()


def character_error_rate(targets: Sequence[str], predictions: Sequence[str]) -> float | None:
    """Pooled CER over normalised sentences, spaces counted."""
    return count_edits(*_normalised(targets, predictions), unit="character").rate()


def phoneme_error_rate(
    targets: Sequence[Sequence[Hashable]], predictions: Sequence[Sequence[Hashable]]
) -> float | None:
    """Pooled PER, the silence between words counted as a phoneme, as Brain-to-Text '25 does."""
    return count_phoneme_edits(targets, predictions).rate()


def bleu(targets: Sequence[str], predictions: Sequence[str]) -> float | None:
    """Corpus BLEU-4 in 0–100 (sacrebleu, tokenizer 13a) over normalised sentences."""
    targets, predictions = _normalised(targets, predictions)
    return float(sacrebleu.corpus_bleu(predictions, [targets]).score) if targets else None


def rouge(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Mean ROUGE-1, ROUGE-2 and ROUGE-L F-measures in 0–100, without stemming.

    rouge-score reads ASCII letters and digits alone: in other scripts the scores are 0.
    """
    targets, predictions = _normalised(targets, predictions)
    if not targets:
        return {}
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = rouge_scorer.RougeScorer(kinds)
    scores = [scorer.score(t, p) for t, p in zip(targets, predictions, strict=True)]
    return {kind: 100 * float(np.mean([s[kind].fmeasure for s in scores])) for kind in kinds}


def distinct_ratio(targets: Sequence[str], predictions: Sequence[str]) -> float | None:
    """Distinct predictions divided by distinct targets, both normalised.

    A perfect decoder scores 1, one that says the same sentence whatever the brain does scores
    1 / (distinct targets). Two recordings of one sentence decoded differently push it above 1.
    """
    targets, predictions = _normalised(targets, predictions)
    return len(set(predictions)) / len(set(targets)) if targets else None


def exact_match(targets: Sequence[str], predictions: Sequence[str]) -> float | None:
    """Share of sentences decoded without an error, after normalisation."""
    targets, predictions = _normalised(targets, predictions)
    if not targets:
        return None
    return float(np.mean([t == p for t, p in zip(targets, predictions, strict=True)]))


def _normalised(targets: Sequence[str], predictions: Sequence[str]) -> tuple[list[str], list[str]]:
    _same_length(targets, predictions)
    return [normalise_text(t) for t in targets], [normalise_text(p) for p in predictions]


def _same_length(targets: Sequence, predictions: Sequence) -> None:
    if len(targets) != len(predictions):
        raise ValueError(f"{len(targets)} targets but {len(predictions)} predictions")
