"""Which split a trial belongs to."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from b2t.data.prepare.options import PrepareOptions
from b2t.data.sources import Source
from b2t.data.sources.base import SPLITS
from b2t.errors import UserError


def assign_splits(source: Source, options: PrepareOptions) -> list[str]:
    """Return the split of every trial of ``source``.

    A source's own splits are kept. Other trials are shared out at random, a function of the seed
    and of their number; with ``disjoint_text``, trials of one text go together.
    """
    splits = [info.split for info in source.trials]
    free = [index for index, split in enumerate(splits) if split is None]
    groups: dict[str, list[int]] = defaultdict(list)
    for index in free:
        text = source.trials[index].text
        together = options.disjoint_text and text is not None
        groups[_text_key(str(text)) if together else f"\0{index}"].append(index)
    names = list(groups)
    missing = {
        split: share * len(free) for split, share in zip(SPLITS, options.fractions, strict=True)
    }
    for position in np.random.default_rng(options.seed).permutation(len(names)):
        split = max(missing, key=missing.__getitem__)
        for index in groups[names[position]]:
            splits[index] = split
            missing[split] -= 1
    return [str(split) for split in splits]


def require_filled(source: Source, splits: Sequence[str], options: PrepareOptions) -> None:
    """Refuse an empty split that was asked for.

    Raises:
        UserError: names the split and what to do.
    """
    counts = Counter(splits)
    if source.own_splits and any(info.split for info in source.trials):
        wanted = ["train"]
    else:
        wanted = [split for split, share in zip(SPLITS, options.fractions, strict=True) if share]
    empty = [split for split in wanted if not counts[split]]
    if empty:
        first = f"; the first is {source.trials[0].name}" if source.trials else ""
        raise UserError(
            f"the {empty[0]} split would be empty ({len(splits)} trials{first}: "
            f"{', '.join(f'{split} {counts[split]}' for split in SPLITS)}): give it a larger share "
            "with --split, cut shorter windows with --window, or bring more data"
        )


def _text_key(text: str) -> str:
    return re.sub(r"\s+", " ", text.strip().lower())
