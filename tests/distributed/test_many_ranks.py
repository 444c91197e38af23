"""Forked ranks of the real trainer: as one rank, shards whole, resumed bit for bit."""

import json
import subprocess
import sys

import pytest

from tests.distributed.conftest import environment

pytestmark = pytest.mark.distributed


def test_four_ranks_learn_what_one_does_and_go_on_from_the_middle(repository, dataset, tmp_path):
    script = repository / "scripts" / "simulate_training_ranks.py"
    command = [str(script), "--ranks", "4", "--batch", "32", "--data", str(dataset)]
    done = subprocess.run(
        [sys.executable, *command, "--json", str(tmp_path / "found.json")],
        cwd=repository,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    (row,) = json.loads((tmp_path / "found.json").read_text())
    assert row["ranks"] == 4 and row["problems"] == []
    assert 0 < row["loss_off"] < 1e-4, "other sums, so other rounding"
    trained = row["shard"] // 12
    assert 12 * 4 * trained < 1.1 * row["checkpoint"], "each rank holds its quarter"
