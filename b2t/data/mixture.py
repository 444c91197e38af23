"""Several prepared datasets trained on as one, each as often as its weight says."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from datasets import Dataset, concatenate_datasets

from b2t.data.dataset import DatasetInfo, dataset_info, load_trials
from b2t.data.trials import row_ids
from b2t.errors import UserError

_SAME = ("channels", "sampling_rate", "channel_names", "unit", "processing")
"""Facts that datasets must agree on to be trained on together."""


def mixed(
    path: str, split: str, more: Sequence[tuple[str, float]]
) -> tuple[DatasetInfo, Dataset, np.ndarray | None]:
    """Open a dataset and what is trained on beside it.

    Args:
        path: of the first, which says what is validated on.
        split: that is trained on.
        more: path and weight of each further one.

    Returns:
        What they hold together, the trials of all, and how often each comes in an epoch, [rows];
        None where there is one dataset.

    Raises:
        UserError: as `load_trials`; datasets that do not fit together, or share a trial's name.
    """
    info, trials = dataset_info(path), load_trials(path, split)
    if not more:
        return info, trials, None
    opened = [(place, dataset_info(place), load_trials(place, split)) for place, _ in more]
    for place, found, rows in opened:
        _require_fit(path, info, trials, place, found, rows)
    together = [trials, *(rows for *_, rows in opened)]
    _require_distinct([path, *(place for place, _ in more)], together)
    infos = [info, *(found for _, found, _ in opened)]
    weights = np.repeat([1.0, *(weight for _, weight in more)], [len(rows) for rows in together])
    marks = ",".join(
        f"{found.fingerprint}*{weight:g}"
        for found, (_, weight) in zip(infos[1:], more, strict=True)
    )
    digest = hashlib.blake2b(marks.encode(), digest_size=6).hexdigest()
    joined = replace(
        info,
        sessions=sorted({session for found in infos for session in found.sessions}),
        simulated=any(found.simulated for found in infos),
        has_text=any(found.has_text for found in infos),
        has_phonemes=any(found.has_phonemes for found in infos),
        splits={**info.splits, split: sum(map(len, together))},
        fingerprint=f"{info.fingerprint}-{digest}",
    )
    return joined, concatenate_datasets(together), weights


def _require_fit(
    path: str, info: DatasetInfo, trials: Dataset, place: str, found: DatasetInfo, rows: Dataset
) -> None:
    for name in _SAME:
        wanted, other = getattr(info, name), getattr(found, name)
        if wanted != other and None not in (wanted, other):
            raise UserError(
                f"data.more: {place} has {name} {_short(other)} and {path} has {_short(wanted)}: "
                "datasets that are trained on together need the same; prepare them with --like, or "
                "as one dataset with `b2t prepare A B OUT`, which aligns channels by name"
            )
    if rows.features["signal"] != trials.features["signal"]:
        raise UserError(
            f"data.more: {place} stores signals as {rows.features['signal'].dtype}, {path} as "
            f"{trials.features['signal'].dtype}: prepare one of them again with the other's --dtype"
        )


def _require_distinct(paths: list[str], datasets: list[Dataset]) -> None:
    seen: dict[str, str] = {}
    for path, rows in zip(paths, datasets, strict=True):
        for name in row_ids(rows):
            if seen.setdefault(name, path) != path:
                raise UserError(
                    f"data.more: {path} and {seen[name]} both have a trial {name}, and results are "
                    "filed under names: rename the session of one"
                )


def _short(value: object) -> str:
    return f"{str(value)[:60]} …" if len(str(value)) > 60 else str(value)
