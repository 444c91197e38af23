"""What makes a set of trials wrong although each can be read: doubles, and signals without life."""

from typing import NamedTuple

import numpy as np

from b2t.data.remarks import Remarks
from b2t.data.trials import signal_digest
from b2t.errors import UserError

_FAR = 1e4


class _Seen(NamedTuple):
    name: str
    split: str


class Looked(NamedTuple):
    """What one trial's signal shows, without any other.

    Attributes:
        remarks: what may be a mistake.
        digest: of its content, in hexadecimal.
        moves: not every channel is constant; those where all are may well be alike.
    """

    remarks: list[str]
    digest: str
    moves: bool


def look_at(signal: np.ndarray, *, z_scored: bool = False) -> Looked:
    """Look at one trial's signal [T, C], finite and not empty.

    Args:
        signal: as recorded.
        z_scored: it is in standard deviations of its channels.
    """
    remarks = ["lasts one time bin"] if len(signal) == 1 else []
    digest = signal_digest(signal).hex()
    # Most signals are neither, which two bins and a sum of squares tell without a copy.
    if (signal[-1] == signal[0]).all() and (signal == signal[0]).all():
        return Looked([*remarks, "never moves: every channel is constant"], digest, False)
    flat = signal.reshape(-1)
    if z_scored and not flat @ flat < _FAR**2 and np.abs(signal).max() > _FAR:
        remarks.append(f"lies more than {_FAR:g} standard deviations from the mean")
    return Looked(remarks, digest, True)


class TrialChecks:
    """Compares trials with those before them.

    Trials of one split need different names (session/block/trial): results are filed under them. A
    signal that occurs in two splits would be trained on and scored.

    Args:
        remarks: where what may be meant is counted.
        z_scored: the signals are in standard deviations of their channels.
        refuse_shared: refuse a signal that occurs in two splits, instead of counting it.
    """

    def __init__(
        self, remarks: Remarks, *, z_scored: bool = False, refuse_shared: bool = True
    ) -> None:
        self.remarks = remarks
        self.refuse_shared = refuse_shared
        self.z_scored = z_scored
        self._ids: dict[tuple[str, str], str] = {}
        self._signals: dict[str, _Seen] = {}

    def look(self, signal: np.ndarray, row_id: str, name: str, split: str) -> Looked:
        """Look at one trial's signal [T, C] and compare it. Errors as in `compare`."""
        looked = look_at(signal, z_scored=self.z_scored)
        self.compare(looked, row_id, name, split)
        return looked

    def compare(self, looked: Looked, row_id: str, name: str, split: str) -> None:
        """Compare one trial with those before it.

        Args:
            looked: what its signal shows.
            row_id: session/block/trial.
            name: where it lies, for messages.
            split: that it belongs to.

        Raises:
            UserError: a second trial of this name in the split, or its signal in another split.
        """
        other = self._ids.setdefault((split, row_id), name)
        if other != name:
            raise UserError(
                f"{name} and {other} are both trial {row_id} of {split}: were files copied? "
                "Remove or renumber one; `b2t prepare --skip-bad-trials` keeps the first of each"
            )
        for what in looked.remarks:
            self.remarks.add(what, name)
        if looked.moves:
            self._look_for_double(looked.digest, _Seen(name, split))

    def _look_for_double(self, digest: str, seen: _Seen) -> None:
        other = self._signals.setdefault(digest, seen)
        if other.split != seen.split and not self.refuse_shared:
            self.remarks.add("has the signal of a trial of another split", seen.name)
        elif other.split != seen.split:
            raise UserError(
                f"{seen.name} ({seen.split}) has the signal of {other.name} ({other.split}): "
                f"scores on {seen.split} would be of trials trained on. Remove one of them; `b2t "
                "prepare --skip-bad-trials` keeps the first"
            )
        elif other.name != seen.name:
            self.remarks.add("has the same signal as another trial of its split", seen.name)
