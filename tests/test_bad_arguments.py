"""Numbers and places on the command line that cannot be: one message, status 2, no traceback."""

import errno
import os

import h5py
import numpy as np
import pytest

from b2t import cli
from b2t.data.prepare import PrepareOptions, prepare
from b2t.data.sources import detect
from b2t.errors import UserError
from b2t.records import require_writable


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """A release of one session, eight trials of 8 channels."""
    folder = tmp_path_factory.mktemp("release") / "t15.2023.08.11"
    folder.mkdir()
    generator = np.random.default_rng(0)
    with h5py.File(folder / "data_train.hdf5", "w") as file:
        for index in range(8):
            group = file.create_group(f"trial_{index:04d}")
            group["input_features"] = generator.standard_normal((20, 8)).astype(np.float32)
    return folder.parent


def status_and_message(capsys, *words):
    try:
        status = cli.main([str(word) for word in words])
    except SystemExit as left:
        status = left.code
    printed = capsys.readouterr().err.strip().splitlines()
    return status, printed[-1] if printed else ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "-1"], "argument --seed: expected a whole number from 0, found -1"),
        (["--seed", "nan"], "argument --seed: invalid seed value: 'nan'"),
        (["--resample", "nan"], "--resample nan: "),
        (["--resample", "inf"], "--resample inf: "),
        (["--resample", "0.001"], "--resample 0.001: "),
        (["--resample", "1e9"], "--resample 1e+09: "),
        (["--resample", "-50"], "--resample -50: "),
        (["--split", "nan/0/0"], "--split nan/0/0: expected three shares"),
    ],
)
def test_prepare(recording, tmp_path, capsys, words, message):
    status, said = status_and_message(capsys, "prepare", recording, tmp_path / "out", *words)
    assert status == 2 and said.startswith("b2t prepare: error: ") and message in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seed", "-1", "argument --seed: expected a whole number from 0"),
        ("--speaking-rate", "nan", "argument --speaking-rate: expected a finite number"),
        ("--speaking-rate", "1e9", "speaking rate 1000000000.0, expected 1 to 1000"),
        ("--variability", "inf", "argument --variability: expected a finite number"),
        ("--tuning", "1e9", "tuning 1000000000.0, expected 0 to 100"),
        ("--noise", "-1", "noise -1.0, expected 0 to 100"),
        ("--drift", "1e6", "crossings in a bin"),
        ("--electrodes", "1000000000", "1000000000 electrodes, more than 65536"),
        ("--select-from", "1000000000", "1000000000 electrodes, more than 65536"),
        ("--trials", "1000000000 1 1", "more than 1000000 altogether"),
        ("--jobs", "-1", "-1 jobs"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_simulate(tmp_path, capsys, option, value, message):
    small = {"--electrodes": "4", "--trials": "4 1 1", "--sessions": "2", "--jobs": "1"}
    words = [word for pair in {**small, option: value}.items() for word in " ".join(pair).split()]
    status, said = status_and_message(capsys, "simulate", tmp_path / "out", *words)
    assert status == 2 and message in said


def test_no_more_processes_than_blocks(tmp_path, capsys, monkeypatch):
    asked = []

    def count(simulator, blocks, jobs):
        asked.append((jobs, len(blocks)))
        raise UserError("enough")

    monkeypatch.setattr("b2t.data.simulate._recordings", count)
    words = ["--electrodes", "4", "--trials", "1", "1", "1", "--sessions", "1"]
    status_and_message(capsys, "simulate", tmp_path / "out", *words, "--jobs", 10**9)
    assert asked == [(3, 3)]


@pytest.mark.parametrize("every", ["nan", "inf", "0", "-1", "1e9"])
def test_watch(tmp_path, capsys, every):
    status, said = status_and_message(capsys, "watch", tmp_path, "--every", every)
    assert status == 2 and "argument --every: expected seconds above 0" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "two"], "argument --gpus: expected a whole number from 1, found two"),
        (["--price", "-2"], "argument --price: expected a number from 0, found -2"),
        (["--reserve", "-1"], "argument --reserve: expected a number from 0, found -1"),
        (["--efficiency", "1.5"], "argument --efficiency: expected a share"),
        (["--gpus", "16", "--gpus-per-host", "3"], "--gpus 16: 3 on a host do not divide them"),
        (["--gpus", "10"], "--gpus 10: 8 on a host do not divide them"),
    ],
)
def test_plan(capsys, words, message):
    common = ["plan", "--config", "demo", "--deepspeed_config", "zero2_fp16"]
    status, said = status_and_message(capsys, *common, *words)
    assert status == 2 and message in said


def test_a_place_below_a_file_is_refused_before_anything_is_done(recording, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")
    prepared = tmp_path / "data"
    prepare(detect(recording), prepared, PrepareOptions())
    below = tmp_path / "file" / "out"
    for words in (
        ["prepare", recording, below],
        ["simulate", below],
        ["tokenize", tmp_path / "run", prepared, below],
        ["decode", tmp_path / "run", prepared, "--out", below],
        ["report", tmp_path / "run", "--out", below],
        ["inspect", prepared, "--plot", below / "a.png"],
    ):
        status, said = status_and_message(capsys, *words)
        assert status == 2, words
        assert "is not a folder" in said or "no folder" in said, said


def test_a_full_disk_is_a_message(recording, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "out"))

    monkeypatch.setattr("b2t.data.prepare.work.ShardWriter", full)
    status, said = status_and_message(capsys, "prepare", recording, tmp_path / "out")
    assert status == 2 and f"{tmp_path / 'out'}: No space left on device" in said


def test_a_disk_that_fills_up_names_the_place(recording, mounted, capsys):
    folder = mounted("size=64k")
    status, said = status_and_message(capsys, "prepare", recording, folder / "out", "--overwrite")
    assert status == 2 and f"{folder / 'out'}" in said and "No space left on device" in said


def test_a_read_only_disk_is_a_message(recording, mounted, capsys):
    folder = mounted("ro,size=64k")
    status, said = status_and_message(capsys, "prepare", recording, folder / "out")
    assert status == 2 and "cannot be written (Read-only file system)" in said


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path):
    require_writable(tmp_path / "not" / "yet", "--out")
    assert list(tmp_path.iterdir()) == []
