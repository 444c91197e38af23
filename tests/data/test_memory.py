"""Training reads data from the disk: a process with little memory trains on much."""

import json
import subprocess
import sys

import numpy as np
from datasets import Dataset, DatasetDict

from b2t.data.trials import trial_features

LIMIT = 8
"""MiB that the process may allocate once it trains."""


def test_a_dataset_twenty_times_the_limit_trains_without_growing(repository, tmp_path):
    noise = np.random.default_rng(0).standard_normal((700, 256)).astype(np.float32)

    def rows(split):
        for trial in range(260 if split == "train" else 1):
            yield {
                "signal": np.roll(noise, trial, axis=0)[: 600 + trial % 100],
                "text": None,
                "phonemes": None,
                "session": "day0",
                "subject": "s",
                "block": 0,
                "trial": trial,
                "sampling_rate": 50.0,
                "split": split,
            }

    features = trial_features(256)
    splits = {
        split: Dataset.from_generator(
            rows, features=features, gen_kwargs={"split": split}, cache_dir=str(tmp_path)
        )
        for split in ("train", "val")
    }
    DatasetDict(splits).save_to_disk(str(tmp_path / "data"))
    assert splits["train"].data.nbytes > 20 * LIMIT * 2**20
    script = repository / "scripts" / "bench_data.py"
    command = [sys.executable, script, "--grow-on", tmp_path / "data", "--limit", str(LIMIT)]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=repository)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["epochs"] == 4 and found["grown_mib"] < 2
