"""How to prepare trials."""

from dataclasses import dataclass
from typing import Any

from b2t.data.sources import SourceOptions


@dataclass(frozen=True)
class PrepareOptions:
    """How to prepare trials.

    Attributes:
        normalize: ``block``, ``session`` or ``recording`` (file) z-scores each channel within it;
            ``none`` keeps the source's unit; ``auto`` is ``block`` unless the source is z-scored
            already.
        statistics: ``train`` z-scores by training trials alone, ``all`` by all trials of a block,
            held-out ones included, as T15 was.
        like: a prepared folder whose statistics are taken for blocks and sessions that it knows.
        fractions: shares of train, val and test, where the source has no splits of its own.
        disjoint_text: no text of one split occurs in another.
        split_by: what stays together: each ``trial`` alone, or all of a ``session``, ``block``,
            ``subject`` or ``sentence``; anything but ``trial`` replaces the source's own splits.
        hold_out: sessions, blocks (session/block), subjects or sentences that are the test split;
            the others are shared out as without ``split_by``.
        skip_bad_trials: leave out trials that are empty, hold NaN or occur twice, instead of
            stopping.
        seed: of the random split.
        overwrite: replace an earlier prepared dataset.
        dtype: of the stored signals, ``float32`` or ``float16`` (half the disk, rounded).
    """

    normalize: str = "auto"
    statistics: str = "train"
    like: str | None = None
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    disjoint_text: bool = False
    split_by: str = "trial"
    hold_out: tuple[str, ...] = ()
    skip_bad_trials: bool = False
    seed: int = 0
    overwrite: bool = False
    dtype: str = "float32"


def source_options(options: PrepareOptions, **fields: Any) -> SourceOptions:
    """Return the options of a source that go with ``options``.

    Where whole recordings stay together they are not divided in time.
    """
    train, val, _ = options.fractions
    fractions = options.fractions
    if options.hold_out:
        fractions = (train / (train + val), val / (train + val), 0.0)
    elif options.split_by != "trial":
        fractions = (1.0, 0.0, 0.0)
    return SourceOptions(fractions=fractions, **fields)
