"""Word n-gram language models: estimated with modified Kneser–Ney smoothing, written as ARPA.

Readers of ARPA files are plentiful (KenLM, flashlight-text); the estimators are programs to build
from C++ source. What is estimated here follows Chen and Goodman, An Empirical Study of Smoothing
Techniques for Language Modeling (1998), and Heafield et al., Scalable Modified Kneser-Ney Language
Model Estimation (2013), whose counts at the beginning of sentences and pruning it shares.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from b2t.errors import UserError
from b2t.records import write_atomically

DEFAULT_ORDER = 3
"""Words in an n-gram where nobody says how many."""

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
NEVER = -99.0
"""What ARPA writes as the log10 of zero."""

_FALLBACK = (0.5, 1.0, 1.5)
"""Discounts where a text is too small to estimate them, as of lmplz --discount_fallback."""

Gram = tuple[str, ...]


@dataclass(frozen=True)
class NGramModel:
    """An interpolated n-gram model in back-off form.

    Attributes:
        order: N, words in the longest n-gram.
        log_probability: per order (0 is unigrams) log10 p(w | h) of each n-gram hw.
        log_backoff: per order below N log10 of what each context leaves to shorter n-grams.
        discounts: per order the discounts of counts 1, 2 and 3 or more; None where the text was too
            small to estimate them, and 0.5, 1, 1.5 were taken.
        sentences: that were counted.
    """

    order: int
    log_probability: list[dict[Gram, float]]
    log_backoff: list[dict[Gram, float]]
    discounts: list[tuple[float, float, float] | None]
    sentences: int

    @property
    def words(self) -> list[str]:
        """Words that a sentence may hold, without the three marks."""
        marks = (BEGIN, END, UNKNOWN)
        return [gram[0] for gram in self.log_probability[0] if gram[0] not in marks]

    def score(self, words: Sequence[str]) -> float:
        """Return log10 of the probability of a sentence, its end included."""
        history: Gram = (BEGIN,)
        total = 0.0
        for word in (*words, END):
            word = word if (word,) in self.log_probability[0] else UNKNOWN
            total += self._next(history, word)
            history = (*history, word)
        return total

    def perplexity(self, sentences: Iterable[Sequence[str]]) -> float:
        """Perplexity per word, sentence ends counted as words; NaN without sentences."""
        total, words = 0.0, 0
        for sentence in sentences:
            total += self.score(sentence)
            words += len(sentence) + 1
        return 10 ** (-total / words) if words else math.nan

    def write(self, path: Path) -> None:
        """Write the model as an ARPA file, which KenLM and other toolkits read."""
        lines = ["\\data\\"]
        lines += [f"ngram {n + 1}={len(g)}" for n, g in enumerate(self.log_probability)]
        for n, grams in enumerate(self.log_probability):
            lines += ["", f"\\{n + 1}-grams:"]
            backoff = self.log_backoff[n] if n < self.order - 1 else {}
            for gram in sorted(grams):
                tail = f"\t{backoff.get(gram, 0.0):.7f}" if n < self.order - 1 else ""
                lines.append(f"{grams[gram]:.7f}\t{' '.join(gram)}{tail}")
        write_atomically(path, "\n".join([*lines, "", "\\end\\", ""]))

    def _next(self, history: Gram, word: str) -> float:
        context = history[max(0, len(history) - self.order + 1) :]
        penalty = 0.0
        while True:
            found = self.log_probability[len(context)].get((*context, word))
            if found is not None:
                return penalty + found
            penalty += self.log_backoff[len(context) - 1].get(context, 0.0)
            context = context[1:]


def estimate(
    sentences: Iterable[Sequence[str]], order: int = DEFAULT_ORDER, prune: Sequence[int] = (0,)
) -> NGramModel:
    """Estimate a model by interpolated modified Kneser–Ney smoothing.

    Counts are kept in memory: about 1 GB for ten million words and order 3.

    Args:
        sentences: words of each sentence, without marks.
        order: N, from 1.
        prune: n-grams of order n seen at most ``prune[n]`` times are left out (n from 0, the last
            value stands for all longer ones); the first is 0, and values may not fall.

    Raises:
        UserError: no words, or options that cannot be.
    """
    limits = _limits(order, prune)
    raw: list[Counter[Gram]] = [Counter() for _ in range(order)]
    number = 0
    for words in sentences:
        number += 1
        marked = (BEGIN, *words, END)
        for n in range(order):
            raw[n].update(tuple(marked[i : i + n + 1]) for i in range(len(marked) - n))
    if len(raw[0]) <= 2:
        raise UserError("no words to count: expected text of at least one sentence")
    adjusted = [_adjusted(raw, n) for n in range(order)]
    kept = [{g for g, c in raw[n].items() if c > limits[n]} for n in range(order)]
    for n in range(1, order):
        kept[n] = {g for g in kept[n] if g[:-1] in kept[n - 1] and g[1:] in kept[n - 1]}
    probability: list[dict[Gram, float]] = []
    backoffs: list[dict[Gram, float]] = []
    discounts = []
    # <unk> comes to the words, <s> is never predicted.
    lower: dict[Gram, float] = {(): 1.0 / len(raw[0])}
    for n in range(order):
        found = _discounts(adjusted[n])
        discounts.append(found)
        lower, backoff = _interpolate(adjusted[n], found or _FALLBACK, kept[n], lower, n)
        probability.append(lower)
        if n:
            backoffs.append(backoff)
    return NGramModel(
        order,
        [{g: _log10(p) for g, p in grams.items()} for grams in probability],
        [{g: _log10(w) for g, w in weights.items()} for weights in backoffs],
        discounts,
        number,
    )


def _limits(order: int, prune: Sequence[int]) -> list[int]:
    if order < 1:
        raise UserError(f"order {order}: expected a whole number from 1")
    limits = [*prune, *[prune[-1]] * order][:order] if prune else [0] * order
    if limits[0] != 0 or any(b < a for a, b in itertools.pairwise(limits)):
        raise UserError(
            f"prune {' '.join(map(str, prune))}: expected 0 for single words and then numbers that "
            "do not fall, as in 0 0 1"
        )
    return limits


def _adjusted(raw: list[Counter[Gram]], n: int) -> dict[Gram, int]:
    """Counts of the highest order; below it, how many words an n-gram was seen after.

    Nothing stands before a sentence's beginning: n-grams that start with it keep their count.
    """
    if n == len(raw) - 1:
        return {gram: count for gram, count in raw[n].items() if gram != (BEGIN,)}
    counts: Counter[Gram] = Counter(gram[1:] for gram in raw[n + 1])
    for gram, count in raw[n].items():
        if gram[0] == BEGIN and n > 0:
            counts[gram] = count
    return counts


def _discounts(counts: dict[Gram, int]) -> tuple[float, float, float] | None:
    """Discounts of counts 1, 2 and 3 or more; None where they cannot be estimated."""
    of = Counter(counts.values())
    if any(of[k] == 0 for k in (1, 2, 3)):
        return None
    y = of[1] / (of[1] + 2 * of[2])
    values = [k - (k + 1) * y * of[k + 1] / of[k] for k in (1, 2, 3)]
    if any(not 0 <= value <= k for k, value in zip((1, 2, 3), values, strict=True)):
        return None
    return values[0], values[1], values[2]


def _interpolate(
    counts: dict[Gram, int],
    discounts: tuple[float, float, float],
    kept: set[Gram],
    lower: dict[Gram, float],
    n: int,
) -> tuple[dict[Gram, float], dict[Gram, float]]:
    """Return p(w | h) of the n-grams kept, and what each context h leaves to shorter ones."""
    totals: defaultdict[Gram, int] = defaultdict(int)
    left: defaultdict[Gram, float] = defaultdict(float)
    for gram, count in counts.items():
        totals[gram[:-1]] += count
        left[gram[:-1]] += discounts[min(count, 3) - 1] if gram in kept else count
    backoff = {context: left[context] / total for context, total in totals.items()}
    probability = {}
    for gram, count in counts.items():
        if gram in kept:
            context = gram[:-1]
            shorter = lower[()] if n == 0 else lower[gram[1:]]
            direct = (count - discounts[min(count, 3) - 1]) / totals[context]
            probability[gram] = direct + backoff[context] * shorter
    if n == 0:
        probability[(UNKNOWN,)] = backoff[()] * lower[()]
        probability[(BEGIN,)] = 0.0
    return probability, backoff


def _log10(value: float) -> float:
    return math.log10(value) if value > 0 else NEVER
