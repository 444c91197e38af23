"""Data that `b2t prepare` has not checked, or not lately: read once, as training will read them."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from tqdm import tqdm

from b2t.data.phonemes import PHONEMES
from b2t.data.prepare import combined_fingerprint
from b2t.data.remarks import Remarks
from b2t.data.trial_checks import TrialChecks
from b2t.data.trials import COLUMNS, Fingerprint, read_signal, require_finite, row_id, row_ids
from b2t.errors import UserError


def examine(splits: dict[str, Dataset], path: str) -> str:
    """Read everything once: refuse bad trials, return the fingerprint.

    Raises:
        UserError: names the first row that cannot be trained on.
    """
    digests = {}
    checks = TrialChecks(Remarks(), refuse_shared=False)
    channels: tuple[int, str] | None = None
    for split, dataset in splits.items():
        mark = Fingerprint()
        rows = dataset.with_format("arrow")
        for index in tqdm(range(len(rows)), desc=f"checking {split}", unit="trial", disable=None):
            row, signal = checked_row(rows[index], f"{path}, {split}, row {index}")
            name = f"{row_id(row)} ({path}, {split}, row {index})"
            require_finite(signal, name)
            looked = checks.look(signal, row_id(row), name, split)
            channels = channels or (signal.shape[1], name)
            if signal.shape[1] != channels[0]:
                raise UserError(
                    f"trial {channels[1]} has {channels[0]} channels and trial {name} has "
                    f"{signal.shape[1]}: one dataset needs the same channels throughout"
                )
            mark.add(row, bytes.fromhex(looked.digest))
        digests[split] = mark.hexdigest()
    checks.remarks.say()
    return combined_fingerprint(digests)


def remark_on_doubles(splits: dict[str, Dataset], path: str) -> None:
    """Count rows of one name, which data prepared before this was refused may have."""
    remarks = Remarks()
    for split, dataset in splits.items():
        counts = Counter(row_ids(dataset))
        for name in [name for name, count in counts.items() if count > 1]:
            remarks.add(
                "names more than one row of its split, and results are filed under names: prepare "
                "the data again",
                f"{path}, {split}, {name}",
            )
    remarks.say()


def checked_row(table: pa.Table, place: str) -> tuple[dict[str, Any], np.ndarray]:
    """Read a row: its columns, and its signal [T, C], whose values may be anything.

    Args:
        table: the row.
        place: for messages.

    Raises:
        UserError: a value that no trial can have.
    """
    row = {name: table[name][0].as_py() for name in COLUMNS[1:-1]}
    for name in ("session", "block", "trial", "sampling_rate"):
        if row[name] is None:
            raise UserError(f"{place}: {name} is null, where every trial needs one")
    phonemes = row["phonemes"] or []
    if None in phonemes:
        raise UserError(f"{place}: phonemes holds null, where every one is a class")
    if phonemes and not 0 < min(phonemes) <= max(phonemes) < len(PHONEMES):
        raise UserError(
            f"{place}: phonemes holds {min(phonemes)} to {max(phonemes)}, expected classes 1 to "
            f"{len(PHONEMES) - 1}"
        )
    try:
        return row, read_signal(table)
    except (ValueError, AttributeError, pa.ArrowException) as error:
        raise UserError(
            f"{place}: signal is no list [bins] of lists [channels] of numbers: {first_line(error)}"
        ) from None


def first_line(error: BaseException) -> str:
    """Return the beginning of what an exception says."""
    return next(iter(str(error).splitlines()), "no detail")[:200]
