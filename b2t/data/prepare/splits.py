"""Which split a trial belongs to."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from b2t.data.prepare.options import PrepareOptions
from b2t.data.sources import Source, TrialInfo
from b2t.data.sources.base import SPLITS
from b2t.errors import UserError
from b2t.log import logger

GROUPS: dict[str, Callable[[TrialInfo], str | None]] = {
    "session": lambda info: info.session,
    "block": lambda info: f"{info.session}/{info.block}",
    "subject": lambda info: info.subject,
    "sentence": lambda info: None if info.text is None else _text_key(info.text),
}
"""What trials can stay together by, and its name for a trial; None: it stands alone."""


def assign_splits(source: Source, options: PrepareOptions) -> list[str]:
    """Return the split of every trial of ``source``.

    A source's own splits are kept, unless ``split_by`` asks for others. Other trials are shared out
    at random, a function of the seed and of their number; with ``disjoint_text``, trials of one
    text go together.

    Raises:
        UserError: ``split_by`` or ``hold_out`` cannot be met.
    """
    if options.hold_out:
        return _held_out(source, options)
    if options.split_by != "trial":
        return _grouped(source, options)
    splits = [info.split for info in source.trials]
    return _share_out(source, splits, options, options.fractions)


def _held_out(source: Source, options: PrepareOptions) -> list[str]:
    """Make the groups in ``hold_out`` the test split; the others are shared out without it."""
    if options.split_by == "trial":
        raise UserError("--hold-out needs --split-by: does it name sessions, blocks or subjects?")
    group = GROUPS[options.split_by]
    names = [group(info) for info in source.trials]
    wanted = set(options.hold_out)
    if options.split_by == "sentence":
        wanted = {_text_key(text) for text in wanted}
    unknown = sorted(wanted - {name for name in names if name is not None})
    if unknown:
        known = sorted({name for name in names if name is not None})
        raise UserError(
            f"--hold-out {unknown[0]}: no {options.split_by} is called so; there are "
            f"{', '.join(known[:12])}{' …' if len(known) > 12 else ''}"
        )
    splits: list[str | None] = []
    for name, info in zip(names, source.trials, strict=True):
        if name not in wanted and info.split == "test":
            raise UserError(
                f"--hold-out: {info.name} is of the source's own test split, which would join what "
                f"is held out; --split-by {options.split_by} alone shares all trials anew"
            )
        splits.append("test" if name in wanted else info.split)
    train, val, _ = options.fractions
    return _share_out(source, splits, options, (train / (train + val), val / (train + val), 0.0))


def _grouped(source: Source, options: PrepareOptions) -> list[str]:
    """Share out whole groups of trials, none of the splits asked for without one."""
    if options.disjoint_text and options.split_by != "sentence":
        raise UserError(
            f"--disjoint-text and --split-by {options.split_by} exclude each other: a text of two "
            f"{options.split_by}s would need both in one split; give one of them"
        )
    if source.own_splits:
        logger(__name__).info(
            "the source's own splits are replaced, as --split-by %s asks", options.split_by
        )
    group = GROUPS[options.split_by]
    groups: dict[str, list[int]] = defaultdict(list)
    for index, info in enumerate(source.trials):
        name = group(info)
        groups[f"\0{index}" if name is None else name].append(index)
    wanted = [split for split, share in zip(SPLITS, options.fractions, strict=True) if share]
    if len(groups) < len(wanted):
        raise UserError(
            f"--split-by {options.split_by}: {len(groups)} of them ({', '.join(sorted(groups))}) "
            f"cannot fill {', '.join(wanted)}: bring more recordings, give some splits no share "
            "(--split 0.9/0.1/0), or hold one out (--hold-out NAME)"
        )
    splits: list[str | None] = [None] * len(source.trials)
    return _deal(list(groups.values()), splits, options, options.fractions, fill=True)


def _share_out(
    source: Source,
    splits: Sequence[str | None],
    options: PrepareOptions,
    fractions: tuple[float, float, float],
) -> list[str]:
    """Share out the trials without a split, by text where texts are to stay apart."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, split in enumerate(splits):
        if split is None:
            text = source.trials[index].text
            together = options.disjoint_text and text is not None
            groups[_text_key(str(text)) if together else f"\0{index}"].append(index)
    return _deal(list(groups.values()), list(splits), options, fractions)


def _deal(
    groups: list[list[int]],
    splits: list[str | None],
    options: PrepareOptions,
    fractions: tuple[float, float, float],
    *,
    fill: bool = False,
) -> list[str]:
    """Give each group, in random order, to the split that lacks most trials.

    With ``fill`` the last groups go to splits that would stay empty.
    """
    count = sum(map(len, groups))
    missing = {split: share * count for split, share in zip(SPLITS, fractions, strict=True)}
    empty = [split for split, share in missing.items() if share]
    for done, position in enumerate(np.random.default_rng(options.seed).permutation(len(groups))):
        among = empty if fill and len(groups) - done <= len(empty) else missing
        split = max(among, key=missing.__getitem__)
        empty = [other for other in empty if other != split]
        for index in groups[position]:
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
