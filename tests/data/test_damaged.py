"""Damaged inputs by the thousand: a message or the right result, never a traceback or a hang."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from b2t.data.dataset import load_trials
from b2t.data.prepare import PrepareOptions, prepare
from b2t.data.sources import detect
from b2t.evaluate import evaluate_command
from b2t.train.checkpoint import Checkpoint, CheckpointStore
from tests.data.damaged_bases import write_recordings
from tests.evaluate.saved_runs import call, save_dataset, save_run

for package in ("mne", "mne_bids", "pynwb", "mffpy"):
    pytest.importorskip(package)

SEED = 20261124
DEEPSPEED = "ds_configs/zero2_fp16.json"
METRICS = (
    "loss/total", "loss/reconstruction", "loss/commitment", "grad_norm/total", "time/step_s",
    "signal/snr_db", "codebook/utilization/0", "codebook/utilization_worst",
    "codebook/perplexity/0",
)  # fmt: skip
_PATIENCE_S = 900.0
"""A reader in C that never comes back ends the test after so long."""

UNSEEN = {
    "hdf5": "values of signals and labels, names of trials: the release has no checksums",
    "fif": "samples and their calibration",
    "fif-epochs": "samples and their calibration",
    "edf": "samples; numbers of the header that remain numbers",
    "bdf": "samples; numbers of the header that remain numbers",
    "set": "samples; fields of the struct that remain of their kind (compressed files are checked)",
    "set-epochs": "the same",
    "brainvision": "markers; settings that are allowed too",
    "bids": "descriptions of channels and events; the recordings are not damaged here",
    "t12": "values; MATLAB files that are not compressed have no checksums",
    "t12-73": "the same",
    "pickle": "values of signals and labels",
    "zuco": "values; texts of words, which are not read",
    "zuco-73": "the same",
    "nwb": "values; descriptions",
    "labram": "values",
    "mat": "values; another rate that is possible",
    "mat-73": "the same",
    "numpy": "values; other shapes and types of numbers (ZIP has checksums of what it holds)",
    "numpy-lines": "texts and names",
    "csv": "numbers that remain numbers; texts",
    "csv-zip": "names of files in the archive, which name sessions",
    "ctf": "samples, gains, markers, names",
    "kit": "samples, gains",
    "cnt": "samples, gains, names, events",
    "egi": "samples, events",
    "mff": "samples, names",
    "parquet": "values: pages have no checksums by default",
    "run-json": "results that people read; models and checkpoints have checksums",
    "run-lines": "metrics and predictions that people read; broken lines are counted",
    "run-config": "other values that are allowed too",
    "yaml": "other values that are allowed too",
    "deepspeed": "other values that are allowed too",
}
"""Damage after which the wrong content is read and nothing can tell, by kind of input.

Not in it: prepared folders, models and checkpoints, which carry checksums.
"""


@pytest.fixture
def bases(tmp_path, repository, t15_trial, write_edf, write_set):
    """One small whole input of each kind, in a folder of its own."""
    folder = tmp_path / "bases"
    write_recordings(folder, t15_trial, write_edf, write_set)
    _write_datasets(folder)
    _write_run(folder)
    for name, source in (
        ("yaml", "b2t/presets/demo.yaml"),
        ("deepspeed", "ds_configs/zero2_fp16.json"),
    ):
        (folder / name).mkdir()
        (folder / name / os.path.basename(source)).write_bytes((repository / source).read_bytes())
    return folder


def _write_datasets(folder):
    for name in ("prepared", "prepared-json"):
        prepare(detect(folder / "hdf5"), folder / name, PrepareOptions())
    (folder / "parquet").mkdir()
    for split in ("train", "val"):
        load_trials(folder / "prepared", split).to_parquet(
            str(folder / "parquet" / f"{split}-0.parquet")
        )


def _write_run(folder):
    data = save_dataset(folder.parent / "data")
    run = save_run(folder / "run", data)
    lines = [json.dumps(record) + "\n" for record in _metrics()]
    (run / "metrics.jsonl").write_text("".join(lines))
    (run / "status.json").write_text(json.dumps({"state": "finished", "step": 8, "time": 1.0}))
    (run / "environment.json").write_text(json.dumps({"simulated_data": True, "world": 1}))
    weights = {"a": torch.ones(9)}
    checkpoint = Checkpoint(weights, {"a": torch.zeros(9)}, {"progress": {"step": 8}, "world": 1})
    CheckpointStore(run / "checkpoints").save(8, checkpoint)
    call(evaluate_command, run, "--no-noise")
    for name in ("run-json", "run-lines", "run-config"):
        shutil.copytree(run, folder / name)


def _metrics():
    generator = np.random.default_rng(2)
    for step in range(1, 9):
        place = {"step": step, "phase": "joint"}
        yield {
            **place,
            "time_s": 2.0 * step,
            **{name: float(generator.random()) for name in METRICS},
        }
        if step % 4 == 0:
            yield {**place, "val/loss": 1.0 / step}
    alert = {"name": "use", "severity": "warning", "message": "low use", "cause": "a"}
    yield {"step": 5, "phase": "joint", "alert": {**alert, "remedy": "b"}}


@pytest.fixture
def outcomes(bases, tmp_path, repository):
    """How each damaged input ended, and how each whole one did, by kind."""
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-m", "tests.data.damaged_worker", str(bases)]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{repository}{os.pathsep}{repository / 'kernels'}",
        "HF_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        try:
            status = subprocess.run(
                [*command, str(tmp_path / "work"), str(SEED)],
                stdout=out,
                stderr=err,
                cwd=repository,
                env=environment,
                timeout=_PATIENCE_S,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            status = "no end"
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert status == 0, (status, lines[-1:], (tmp_path / "err").read_text()[-3000:])
    started = {(line["kind"], line["number"]): line for line in lines if "damage" in line}
    ended = [{**started[each["kind"], each["number"]], **each} for each in lines if "end" in each]
    whole = {each["kind"]: each for each in ended if each["number"] < 0}
    return whole, [each for each in ended if each["number"] >= 0]


def test_no_damage_ends_in_a_traceback_a_hang_or_a_wrong_result_that_could_be_seen(outcomes):
    whole, ended = outcomes
    assert all(each["end"] == "read" for each in whole.values()), whole
    assert len(ended) >= 1000 and set(Counter(each["kind"] for each in ended)) == set(whole)
    for bad in ("traceback", "slow"):
        assert not [each for each in ended if each["end"] == bad]
    refused = [each for each in ended if each["end"] == "refused"]
    assert not [each for each in refused if "MemoryError" in each["message"]]
    assert not [each for each in refused if not each["named"]]
    told = {each["kind"] for each in refused}
    assert told | {"run-lines"} == set(whole), "each kind has damage that is refused"
    wrong = Counter(
        each["kind"]
        for each in ended
        if each["end"] == "read"
        and each["content"] != whole[each["kind"]]["content"]
        and not each["said"]
    )
    assert set(wrong) <= set(UNSEEN), wrong
