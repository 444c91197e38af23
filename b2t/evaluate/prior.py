"""What could be said without a brain: one sentence for every trial, or what is likely to be said.

A decoder is worth what it says beyond this. The best constant answer is often better than noise
through a trained model, and much better than nothing where sentences repeat.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from b2t.evaluate import metrics

_LOOKED_AT = 500
"""Sentences that a constant answer is chosen among, and by, at most."""


def text_prior(
    training: Sequence[str], targets: Sequence[str], seed: int = 0, draws: int = 20
) -> dict[str, Any]:
    """Word error rates of what training texts alone suggest.

    Args:
        training: sentences of the training split.
        targets: of the split that is scored.
        seed: of what is drawn.
        draws: random answers to average over.

    Returns:
        `most_frequent` (the sentence), `wer_most_frequent`; `constant`, the training sentence with
        the fewest word errors as an answer to the others, and `wer_constant`; `wer_random`, of
        training sentences drawn for each trial. Empty without texts.
    """
    plain = [text for text in map(metrics.normalise_text, training) if text]
    meant = [metrics.normalise_text(target) for target in targets]
    if not plain or not any(meant):
        return {}
    generator = np.random.default_rng(seed)
    frequent = min(Counter(plain).items(), key=lambda item: (-item[1], item[0]))[0]
    constant = _best_constant(plain, generator)
    random = [
        metrics.count_edits(meant, list(generator.choice(plain, len(meant))), "word").rate()
        for _ in range(draws)
    ]
    return {
        "most_frequent": frequent,
        "wer_most_frequent": metrics.count_edits(meant, [frequent] * len(meant), "word").rate(),
        "constant": constant,
        "wer_constant": metrics.count_edits(meant, [constant] * len(meant), "word").rate(),
        "wer_random": float(np.mean([rate for rate in random if rate is not None])),
    }


def _best_constant(plain: Sequence[str], generator: np.random.Generator) -> str:
    """The sentence with the fewest word errors against the others, of at most 500."""
    some = list(plain)
    if len(some) > _LOOKED_AT:
        some = [some[i] for i in sorted(generator.choice(len(some), _LOOKED_AT, replace=False))]
    distinct = sorted({*some})
    edits = cdist(
        [text.split() for text in distinct],
        [text.split() for text in some],
        scorer=Levenshtein.distance,
        dtype=np.int32,
    )
    return distinct[int(edits.sum(1).argmin())]
