"""Trials as an audit reads them: one after another, also those that training would refuse."""

import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from datasets import Dataset

from b2t.data.examine import checked_row
from b2t.data.trials import row_id, spread_over_sessions
from b2t.errors import UserError
from b2t.evaluate.audit.findings import CRITICAL, NOTE, Finding

NUMBERS = "numbers"
_EXAMPLES = 5
_STRIDE = 8


class Trial(NamedTuple):
    """One trial.

    Attributes:
        split: that it belongs to.
        row: its position there.
        name: session/block/trial.
        session: its session.
        signal: [T, C] float32.
    """

    split: str
    row: int
    name: str
    session: str
    signal: np.ndarray


def read_trials(
    splits: Mapping[str, Dataset], limit: int | None = None, seconds: float | None = None
) -> Iterator[Trial]:
    """Yield trials of all splits.

    Args:
        splits: rows by split.
        limit: trials of each split at most, spread evenly over its sessions.
        seconds: no trial is begun after so long, of which every split has its share.

    Raises:
        UserError: a row that is no trial, or has other channels than those before it.
    """
    began = time.monotonic()
    channels: int | None = None
    for number, (split, dataset) in enumerate(splits.items()):
        rows = dataset.with_format("arrow")
        chosen = spread_over_sessions(dataset, len(dataset) if limit is None else limit)
        if seconds is not None:  # what is read until then lies in all sessions
            chosen = [row for start in range(_STRIDE) for row in chosen[start::_STRIDE]]
        for row in chosen:
            spent = time.monotonic() - began
            if seconds is not None and spent > seconds * (number + 1) / len(splits):
                break
            columns, signal = checked_row(rows[row], f"{split}, row {row}")
            name = row_id(columns)
            channels = signal.shape[1] if channels is None else channels
            if signal.size and signal.shape[1] != channels:
                raise UserError(
                    f"trial {name} ({split}, row {row}) has {signal.shape[1]} channels, those "
                    f"before it have {channels}: one dataset needs the same channels throughout"
                )
            yield Trial(split, row, name, columns["session"], signal)


class NotFinite:
    """Collects trials that hold NaN or infinity, which no other check can measure."""

    def __init__(self, channels: list[str]) -> None:
        self._channels = channels
        self._places: list[dict[str, object]] = []
        self._trials = 0

    def accept(self, trial: Trial) -> bool:
        """Whether every value of ``trial`` is finite."""
        self._trials += 1
        bad = ~np.isfinite(trial.signal)
        if not bad.any():
            return True
        at, channel = np.argwhere(bad)[0]
        self._places.append(
            {
                "split": trial.split,
                "trial": trial.name,
                "session": trial.session,
                "channel": self._channels[channel],
                "channels": int(bad.any(0).sum()),
                "bin": int(at),
                "values": int(bad.sum()),
            }
        )
        return False

    def finding(self) -> Finding:
        """Say what was found."""
        if not self._places:
            return Finding(NUMBERS, NOTE, f"all values of {self._trials:,} trials are finite")
        return Finding(
            NUMBERS,
            CRITICAL,
            f"{len(self._places):,} of {self._trials:,} trials hold NaN or infinity",
            {"places": self._places},
            [
                f"{place['trial']} ({place['split']}): {place['values']} values, first channel "
                f"{place['channel']}, bin {place['bin']}"
                for place in self._places[:_EXAMPLES]
            ],
            "repair them, or leave such trials out with `b2t prepare --skip-bad-trials`",
        )
