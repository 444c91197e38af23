"""Sentences that stand in more than one split, word for word or nearly."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from b2t.evaluate.audit.findings import CRITICAL, NOTE, WARNING, Finding
from b2t.evaluate.metrics import normalise_text

SENTENCES = "sentences"
_MUCH = 0.5
"""Share of shared sentences above which a score is one of recalling sentences."""

_CHUNK, _EXAMPLES = 256, 5


def shared_sentences(
    texts: Mapping[str, Sequence[str | None]], nearness: float = 0.8
) -> list[Finding]:
    """Compare the sentences of every pair of splits, as they are scored.

    A decoder that has learnt a sentence by heart scores well on it whatever it hears. Near ones
    differ in few words: 1 − word edits / words of the longer sentence is ``nearness`` at least.

    Args:
        texts: sentences by split, training first.
        nearness: in 0–1.

    Returns:
        One finding per pair of splits; its numbers are counted over the trials of the later split.
    """
    plain = {
        split: [normalise_text(text) for text in some if text and normalise_text(text)]
        for split, some in texts.items()
    }
    return [
        _compare(first, second, plain[first], plain[second], nearness)
        for first, second in itertools.combinations(plain, 2)
    ]


def _compare(
    first: str, second: str, known: Sequence[str], asked: Sequence[str], nearness: float
) -> Finding:
    if not known or not asked:
        lacking = second if known else first
        return Finding(SENTENCES, NOTE, f"{first} and {second}: {lacking} has no text to compare")
    nearest = nearest_sentences(known, sorted({*asked}), nearness)
    exact = [text for text in asked if nearest[text] == (text, 1.0)]
    near = [text for text in asked if 0 < nearest[text][1] < 1]
    numbers = {
        "splits": [first, second],
        "trials": len(asked),
        "exact": len(exact),
        "near": len(near),
        "exact_share": len(exact) / len(asked),
        "near_share": len(near) / len(asked),
        "nearness": nearness,
    }
    share = (len(exact) + len(near)) / len(asked)
    level = CRITICAL if share > _MUCH else WARNING if share else NOTE
    text = (
        f"{len(exact):,} of {len(asked):,} trials of {second} ({100 * len(exact) / len(asked):.1f} "
        f"%) say a sentence of {first}, {len(near):,} more one like it"
    )
    examples = list(dict.fromkeys(exact))[:_EXAMPLES]
    examples += [f"{other} ~ {nearest[other][0]}" for other in dict.fromkeys(near)][:_EXAMPLES]
    remedy = "read their scores apart, or split by sentence (`b2t prepare --split-by sentence`)"
    return Finding(SENTENCES, level, text, numbers, examples, remedy if share else "")


def nearest_sentences(
    known: Sequence[str], asked: Sequence[str], nearness: float
) -> dict[str, tuple[str, float]]:
    """Find the nearest known sentence of each one asked for.

    Args:
        known: plain sentences.
        asked: plain sentences, distinct.
        nearness: below it nothing counts as near.

    Returns:
        The sentence and its nearness, ("", 0.0) where none is near.
    """
    distinct = sorted({*known})
    if nearness >= 1:
        there = {*known}
        return {text: (text, 1.0) if text in there else ("", 0.0) for text in asked}
    words = [text.split() for text in distinct]
    found = {}
    for start in range(0, len(asked), _CHUNK):
        some = asked[start : start + _CHUNK]
        table = cdist(
            [text.split() for text in some],
            words,
            scorer=Levenshtein.normalized_similarity,
            score_cutoff=nearness - 1e-6,  # 1 − 1/5 is not quite 0.8
            dtype=np.float32,
        )
        for text, row in zip(some, table, strict=True):
            best = int(row.argmax())
            found[text] = (distinct[best], float(row[best])) if row[best] > 0 else ("", 0.0)
    return found
