"""Whether a difference is more than chance: against other trials, and between two decoders."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from b2t.evaluate.metrics import EditCounts, count_edits

ROWS = 1000
"""Trials that a permutation test looks at, at most: its table has this many squared entries."""


def permutation_p_value(
    targets: Sequence[str], predictions: Sequence[str], permutations: int = 2000, seed: int = 0
) -> float | None:
    """Chance that predictions given to other trials at random fit as well as they do to their own.

    p = (1 + permutations with as few word errors) / (1 + permutations); it is never 0. Of more
    than 1,000 trials that many are drawn.

    Source: Phipson and Smyth, Permutation p-values should never be zero (2010).

    Args:
        targets: plain sentences, words separated by single spaces.
        predictions: likewise.
        permutations: random ones.
        seed: of them.

    Returns:
        None for fewer than two trials.
    """
    generator = np.random.default_rng(seed)
    rows = list(range(len(targets)))
    if len(rows) < 2:
        return None
    if len(rows) > ROWS:
        rows = np.sort(generator.choice(rows, ROWS, replace=False)).tolist()
    meant = [targets[row].split() for row in rows]
    said = [predictions[row].split() for row in rows]
    edits = cdist(meant, said, scorer=Levenshtein.distance, dtype=np.int32)
    own, place = int(np.trace(edits)), np.arange(len(rows))
    as_good = sum(
        int(edits[place, generator.permutation(place)].sum()) <= own for _ in range(permutations)
    )
    return (1 + as_good) / (1 + permutations)


class Comparison(NamedTuple):
    """Two decoders on the same trials; rates are pooled word error rates."""

    rate_a: float
    rate_b: float
    difference: float
    """rate_b − rate_a."""
    interval: tuple[float, float]
    """95 % percentile interval of the difference, trials drawn with replacement."""
    p: float
    """Two-sided: chance of so large a difference if either decoder had said each output."""


def compare_rates(
    a: EditCounts, b: EditCounts, resamples: int = 10_000, seed: int = 0
) -> Comparison:
    """Compare two decoders by a paired bootstrap and a paired sign-flip test.

    Source: Bisani and Ney, Bootstrap estimates for confidence intervals in ASR performance
    evaluation (2004); Efron and Tibshirani (1993), chapter 15.

    Args:
        a: edits of the one decoder per trial.
        b: of the other, on the same trials in the same order.
        resamples: of the bootstrap, and flips of the test.
        seed: of both.

    Raises:
        ValueError: the targets differ, or there are none.
    """
    if len(a.edits) != len(b.edits) or (a.lengths != b.lengths).any():
        raise ValueError("the two decoders were not scored against the same targets")
    total = int(a.lengths.sum())
    if not total:
        raise ValueError("no target has a word")
    generator = np.random.default_rng(seed)
    gap, rows = (b.edits - a.edits).astype(np.int64), len(a.edits)
    differences, flipped = np.empty(resamples), np.empty(resamples)
    for resample in range(resamples):
        chosen = generator.integers(0, rows, rows)
        differences[resample] = gap[chosen].sum() / max(int(a.lengths[chosen].sum()), 1)
        flipped[resample] = abs(int((gap * generator.choice((-1, 1), rows)).sum()))
    low, high = np.quantile(differences, [0.025, 0.975])
    observed = abs(int(gap.sum()))
    return Comparison(
        float(a.edits.sum() / total),
        float(b.edits.sum() / total),
        float(gap.sum() / total),
        (float(low), float(high)),
        float((1 + (flipped >= observed).sum()) / (1 + resamples)),
    )


def compare_texts(
    targets: Sequence[str], a: Sequence[str], b: Sequence[str], seed: int = 0
) -> Comparison:
    """Compare two decoders' plain sentences by words; see `compare_rates`."""
    first = count_edits(targets, a, "word")
    return compare_rates(first, count_edits(targets, b, "word"), seed=seed)
