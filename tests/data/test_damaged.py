"""Damaged inputs by the thousand: a message or the right result, never a traceback or a hang."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import h5py
import numpy as np
import pytest
import torch

from b2t.data.dataset import load_trials
from b2t.data.prepare import PrepareOptions, prepare
from b2t.data.sources import detect
from b2t.evaluate import evaluate_command
from b2t.train.checkpoint import Checkpoint, CheckpointStore
from tests.evaluate.saved_runs import call, save_dataset, save_run

mne = pytest.importorskip("mne")

SEED = 20261124
DEEPSPEED = "ds_configs/zero2_fp16.json"
METRICS = (
    "loss/total", "loss/reconstruction", "loss/commitment", "grad_norm/total", "time/step_s",
    "signal/snr_db", "codebook/utilization/0", "codebook/utilization_worst",
    "codebook/perplexity/0",
)  # fmt: skip
_PATIENCE_S = 400.0
"""A reader in C that never comes back ends the test after so long."""

UNSEEN = {
    "hdf5": "values of signals and labels, names of trials: the release has no checksums",
    "fif": "samples and their calibration",
    "fif-epochs": "samples and their calibration",
    "edf": "samples; numbers of the header that remain numbers",
    "bdf": "samples; numbers of the header that remain numbers",
    "set": "samples; fields of the struct that remain of their kind (compressed files are checked)",
    "set-epochs": "the same",
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
RATE = 50
LABELS = ["Fz", "Cz", "Pz"]


@pytest.fixture
def bases(tmp_path, repository, t15_trial, write_edf, write_set):
    """One small whole input of each kind, in a folder of its own."""
    folder = tmp_path / "bases"
    for name in ("hdf5/t15.2023.08.11", "fif", "fif-epochs", "edf", "bdf", "set", "set-epochs"):
        (folder / name).mkdir(parents=True)
    _write_release(folder / "hdf5", t15_trial)
    microvolts = 50 * np.random.default_rng(0).standard_normal((3, 12 * RATE))
    _write_fif(folder, microvolts * 1e-6)
    write_edf(folder / "edf" / "a.edf", microvolts, RATE, LABELS)
    write_edf(folder / "bdf" / "a.bdf", microvolts, RATE, LABELS)
    write_set(folder / "set" / "a.set", microvolts, RATE, LABELS)
    write_set(folder / "set-epochs" / "a.set", microvolts.reshape(3, RATE, 12), RATE, LABELS)
    _write_datasets(folder)
    _write_run(folder)
    for name, source in (
        ("yaml", "b2t/presets/demo.yaml"),
        ("deepspeed", "ds_configs/zero2_fp16.json"),
    ):
        (folder / name).mkdir()
        (folder / name / os.path.basename(source)).write_bytes((repository / source).read_bytes())
    return folder


def _write_release(folder, t15_trial):
    generator = np.random.default_rng(1)
    for split, count in (("train", 3), ("val", 1)):
        with h5py.File(folder / "t15.2023.08.11" / f"data_{split}.hdf5", "w") as file:
            for index in range(count):
                signal = generator.standard_normal((12 + index, 4)).astype(np.float32)
                group = file.create_group(f"trial_{index:04d}")
                t15_trial(group, signal, text="It is fine.", phonemes=[40, 3, 7], trial=index)


def _write_fif(folder, volts):
    info = mne.create_info(LABELS, RATE, "eeg")
    raw = mne.io.RawArray(volts, info, verbose="ERROR")
    raw.save(folder / "fif" / "a_raw.fif", verbose="ERROR")
    events = np.stack([np.arange(0, 600, 50), np.zeros(12), np.ones(12)], 1).astype(int)
    epochs = mne.EpochsArray(volts.reshape(3, 12, 50).swapaxes(0, 1), info, events, verbose="ERROR")
    epochs.save(folder / "fif-epochs" / "a-epo.fif", verbose="ERROR")


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
