"""Fixtures shared by all tests."""

import logging
import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def log_as_it_was():
    """Takes back what a command that a test runs does to the log: the next may want to read it."""
    log = logging.getLogger("b2t")
    propagate, level, handlers = log.propagate, log.level, list(log.handlers)
    yield
    log.propagate, log.handlers[:] = propagate, handlers
    log.setLevel(level)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real recordings: $B2T_REAL_DATA, or shared/data beside the checkout."""
    folder = Path(os.environ.get("B2T_REAL_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real recordings at {folder}; set B2T_REAL_DATA to test on them")
    return folder


@pytest.fixture(scope="session")
def tiny_trials(tmp_path_factory) -> Path:
    """A dataset folder of 36 short random trials of 6 channels, with text and phonemes."""
    import numpy as np
    from datasets import Dataset, DatasetDict

    from b2t.data.trials import trial_features

    generator = np.random.default_rng(0)
    splits = {}
    for split, count in (("train", 36), ("val", 6)):
        rows = [
            {
                "signal": generator.standard_normal((20 + 3 * index % 31, 6)).astype("float32"),
                "text": f"say {index}",
                "phonemes": [1 + index % 40, 40],
                "session": f"day{index % 2}",
                "subject": "s",
                "block": 0,
                "trial": index,
                "sampling_rate": 50.0,
                "split": split,
            }
            for index in range(count)
        ]
        splits[split] = Dataset.from_list(rows, features=trial_features(6))
    folder = tmp_path_factory.mktemp("trials") / "data"
    DatasetDict(splits).save_to_disk(str(folder))
    return folder


@pytest.fixture
def mounted(tmp_path):
    """Mounts a small tmpfs with options of ``mount``; skips where that is not allowed."""
    folder = tmp_path / "disk"

    def mount(options: str) -> Path:
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small tmpfs cannot be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)
