"""A small dataset in which nothing is wrong, and ways to spoil it."""

from collections.abc import Callable

import numpy as np
from datasets import Dataset, DatasetDict
from scipy.signal import lfilter

from b2t.data.trials import trial_features
from b2t.evaluate.audit import Audit, AuditOptions, Subject, audit
from b2t.model.tokenizer import byte_tokenizer

RATE, BINS, CHANNELS = 160.0, 320, 16
SESSIONS = ("day0", "day1", "day2")
SPLITS = {"train": 6, "val": 2, "test": 2}
NAMES = [f"E{number}" for number in range(CHANNELS)]
_WORDS = "abcdefghij"

Rows = list[dict]
Spoil = Callable[[Rows], None]


def sound_rows(seed: int = 0, unit: float = 1.0) -> Rows:
    """Trials of a few sources that all channels hear, each in its own way, as EEG is."""
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((8, CHANNELS))
    rows = []
    for session in SESSIONS:
        for split, count in SPLITS.items():
            for number in range(count):
                sources = lfilter([1.0], [1.0, -0.9], generator.standard_normal((BINS, 8)), axis=0)
                signal = sources @ mixing + generator.standard_normal((BINS, CHANNELS))
                serial = len(rows)
                rows.append(
                    {
                        "signal": (unit * signal / signal.std(0)).astype("float32"),
                        "text": f"{_WORDS[serial // 10] * 3} {_WORDS[serial % 10] * 3}",
                        "phonemes": [1 + serial % 39, 5, 5, 40],
                        "session": session,
                        "subject": "s",
                        "block": {"train": 1, "val": 2, "test": 3}[split],
                        "trial": number,
                        "sampling_rate": RATE,
                        "split": split,
                    }
                )
    return rows


def as_splits(rows: Rows) -> dict[str, Dataset]:
    """Rows as they are loaded."""
    return {
        split: Dataset.from_list(
            [row for row in rows if row["split"] == split], features=trial_features(CHANNELS)
        )
        for split in SPLITS
    }


def save(path, rows: Rows):
    """Write rows as a dataset that nobody has prepared."""
    DatasetDict(as_splits(rows)).save_to_disk(str(path))
    return path


def look(rows: Rows, unit: str | None = "z-score", **options) -> Audit:
    """Audit rows."""
    options = {"tokenizer": byte_tokenizer(), **options}
    subject = Subject(as_splits(rows), NAMES, RATE, unit)
    return audit(subject, AuditOptions(**options))


def row(rows: Rows, session: str, split: str = "train", trial: int = 0) -> dict:
    """The row of one trial."""
    return next(
        r for r in rows if (r["session"], r["split"], r["trial"]) == (session, split, trial)
    )


def of_session(rows: Rows, session: str) -> Rows:
    """The rows of one session."""
    return [r for r in rows if r["session"] == session]
