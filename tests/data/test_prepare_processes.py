"""Preparing on several processes, after being killed, in half precision, from several sources."""

import json
import os
import signal
import subprocess
import sys
import time

import h5py
import mne
import numpy as np
import pytest
from datasets import load_from_disk

from b2t.cli import main
from b2t.data.dataset import load_trials
from b2t.data.trials import read_signal

CHANNELS = ("a", "b", "c")


def write_tables(folder, *, sessions=3, trials=60, bins=10, channels=CHANNELS, seed=0):
    """Tables of epochs with a channel per column; each session another mean and deviation."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    for session in range(sessions):
        values = generator.standard_normal((trials * bins, len(channels))) * (session + 1) + session
        lines = [",".join(["Time:50Hz", "Epoch", *channels])]
        lines += [
            ",".join([f"{row / 50}", f"{row // bins}", *(repr(float(v)) for v in values[row])])
            for row in range(len(values))
        ]
        (folder / f"day{session}.csv").write_text("\n".join(lines) + "\n")
    return folder


def content(folder):
    """Everything in a prepared dataset that is not a mark of the moment."""
    record = json.loads((folder / "b2t.json").read_text())
    record.pop("arrow")
    rows = {
        split: [
            {**{k: v for k, v in row.items() if k != "signal"}, "signal": row["signal"].tobytes()}
            for row in dataset
        ]
        for split, dataset in load_from_disk(str(folder)).with_format("numpy").items()
    }
    return record, rows


def test_any_number_of_processes_writes_the_same(tmp_path, capsys):
    source = write_tables(tmp_path / "eeg")
    for workers in (1, 2):
        assert (
            main(["prepare", str(source), str(tmp_path / f"w{workers}"), "--workers", str(workers)])
            == 0
        )
    one, two = content(tmp_path / "w1"), content(tmp_path / "w2")
    assert one[0] == two[0]
    assert one[1] == two[1]
    assert "z-scored per block" in capsys.readouterr().out


def test_a_killed_preparation_goes_on_where_it_was(tmp_path, repository):
    source = write_tables(tmp_path / "eeg", sessions=6, trials=80)
    assert main(["prepare", str(source), str(tmp_path / "whole"), "--workers", "1"]) == 0
    words = ["prepare", str(source), str(tmp_path / "out"), "--workers", "1"]
    command = [sys.executable, "-m", "b2t.cli", *words]
    environment = {**os.environ, "PYTHONPATH": f"{repository}{os.pathsep}{repository / 'kernels'}"}
    partial = tmp_path / "out.partial"
    for pattern in ("measured-000003.npz", "chunk-000004.json"):
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while not list(partial.glob(pattern)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "out").exists()
        assert main(["inspect", str(partial), "--no-plot"]) == 2, (
            "an unfinished folder must not load"
        )
    written = {file.name: file.stat().st_mtime_ns for file in partial.glob("chunk-*.arrow")}
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "going on from" in ended.stderr and written
    assert str(content(tmp_path / "out")) == str(content(tmp_path / "whole")).replace(
        "whole", "out"
    )
    assert not partial.exists()


def test_two_calls_do_not_write_to_one_place(tmp_path, repository, capsys):
    """The second says so and changes nothing, the first goes on."""
    source = write_tables(tmp_path / "eeg", sessions=6, trials=80)
    words = ["prepare", str(source), str(tmp_path / "out"), "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": f"{repository}{os.pathsep}{repository / 'kernels'}"}
    first = subprocess.Popen([sys.executable, "-m", "b2t.cli", *words], env=environment)
    partial, deadline = tmp_path / "out.partial", time.monotonic() + 120
    while not list(partial.glob("measured-000001.npz")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    first.send_signal(signal.SIGSTOP)
    before = sorted((file, file.stat().st_mtime_ns) for file in partial.rglob("*"))
    assert main([*words, "--seed", "5"]) == 2
    assert "another call of `b2t prepare` is writing there" in capsys.readouterr().err
    assert sorted((file, file.stat().st_mtime_ns) for file in partial.rglob("*")) == before
    first.send_signal(signal.SIGCONT)
    assert first.wait() == 0 and not partial.exists()
    assert main(["inspect", str(tmp_path / "out"), "--no-plot", "--verify"]) == 0


def test_an_unfinished_folder_of_other_options_is_not_gone_on_from(tmp_path, monkeypatch):
    from b2t.data.prepare import run

    source = write_tables(tmp_path / "eeg")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "assemble", interrupted)
    words = ["prepare", str(source), str(tmp_path / "out")]
    assert main([*words, "--workers", "1"]) == 130
    assert (tmp_path / "out.partial").exists() and not (tmp_path / "out").exists()
    monkeypatch.undo()
    for name in ("out", "fresh"):
        words = ["prepare", str(source), str(tmp_path / name), "--seed", "5", "--workers", "1"]
        assert main(words) == 0
    assert (
        content(tmp_path / "out")[0]["fingerprint"] == content(tmp_path / "fresh")[0]["fingerprint"]
    )


def test_half_precision_says_what_it_rounds(tmp_path, capsys):
    source = write_tables(tmp_path / "eeg", sessions=1, trials=40, bins=100)
    assert main(["prepare", str(source), str(tmp_path / "whole")]) == 0
    assert main(["prepare", str(source), str(tmp_path / "half"), "--dtype", "float16"]) == 0
    printed = capsys.readouterr().out
    error = power = 0.0
    for split in ("train", "val", "test"):
        whole, half = (
            load_trials(tmp_path / name, split).with_format("arrow") for name in ("whole", "half")
        )
        for row in range(len(whole)):
            exact, rounded = read_signal(whole[row]), read_signal(half[row])
            np.testing.assert_array_equal(rounded, exact.astype(np.float16).astype(np.float32))
            error += float(((exact - rounded).astype(np.float64) ** 2).sum())
            power += float((exact.astype(np.float64) ** 2).sum())
    assert f"stored as float16: {10 * np.log10(power / error):.2f}".rstrip("0") in printed
    assert main(["inspect", str(tmp_path / "half"), "--verify"]) == 0
    assert sum(f.stat().st_size for f in (tmp_path / "half").rglob("*.arrow")) < 0.75 * sum(
        f.stat().st_size for f in (tmp_path / "whole").rglob("*.arrow")
    )


def test_values_that_half_precision_does_not_hold_are_refused(tmp_path, capsys):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        data = file.create_group("s").create_dataset("eeg", data=np.full((2, 3000), 1e6))
        data[0, ::7] = 3.0
        data.attrs["rsFreq"], data.attrs["chOrder"] = 50, ["x", "y"]
    words = ["prepare", str(tmp_path / "a.hdf5"), str(tmp_path / "out"), "--dtype", "float16"]
    assert main([*words, "--normalize", "none"]) == 2
    assert "reaches 1e+06, more than float16 holds" in capsys.readouterr().err
    assert not (tmp_path / "out.partial").exists()


def test_several_sources_are_aligned_by_name(tmp_path, capsys):
    one = write_tables(tmp_path / "one", sessions=1, trials=30)
    other = write_tables(
        tmp_path / "other", sessions=1, trials=30, channels=("c", "d", "a"), seed=1
    )
    whole = ["--statistics", "all"]  # the random splits of 60 and of 30 trials differ
    options = ["--licence", "CC0", *whole]
    assert main(["prepare", str(one), str(other), str(tmp_path / "out"), *options]) == 0
    printed = capsys.readouterr().out
    assert "one lacks 1 channel, 0 there (d)" in printed
    record, rows = content(tmp_path / "out")
    assert record["channels"] == ["a", "b", "c", "d"]
    assert record["missing_channels"] == {"one": ["d"], "other": ["b"]}
    sessions = {row["session"] for split in rows.values() for row in split}
    assert sessions == {"one:day0", "other:day0"}
    assert main(["prepare", str(other), str(tmp_path / "alone"), *whole]) == 0
    alone = {
        (row["session"], row["trial"]): np.frombuffer(row["signal"], np.float32).reshape(-1, 3)
        for split in content(tmp_path / "alone")[1].values()
        for row in split
    }
    for row in (row for split in rows.values() for row in split if row["session"] == "other:day0"):
        signal = np.frombuffer(row["signal"], np.float32).reshape(-1, 4)
        np.testing.assert_array_equal(signal[:, [2, 3, 0]], alone["day0", row["trial"]])
        assert not signal[:, 1].any()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Licence of the recordings: CC0." in card and "| train | 48 |" in card
    assert (tmp_path / "out" / "trials.png").stat().st_size > 5000


def test_units_that_differ_fit_together_once_they_are_z_scored(tmp_path, capsys):
    tables = write_tables(tmp_path / "tables", sessions=1, trials=40)  # nobody says in what unit
    values = np.random.default_rng(0).standard_normal((3, 2000)) * 1e-6
    info = mne.create_info(list(CHANNELS), 50.0, "eeg")
    mne.io.RawArray(values, info, verbose="error").save(tmp_path / "volts_raw.fif", verbose="error")
    words = ["prepare", str(tables), str(tmp_path / "volts_raw.fif"), str(tmp_path / "out")]
    assert main([*words, "--normalize", "none"]) == 2
    assert "have units None, SI (V, T)" in capsys.readouterr().err
    assert main(words) == 0
    record, rows = content(tmp_path / "out")
    assert record["unit"] == "z-score"
    for name in ("tables:day0", "volts_raw:volts"):
        found = [row["signal"] for row in rows["train"] if row["session"] == name]
        signal = np.concatenate([np.frombuffer(each, np.float32) for each in found])
        assert signal.std() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    "channels, rate, message",
    [(("x", "y"), "50", "no channel of the same name"), (CHANNELS, "25", "has sampling rate 50.0")],
)
def test_sources_that_do_not_fit_together(tmp_path, capsys, channels, rate, message):
    one = write_tables(tmp_path / "one", sessions=1, trials=12)
    other = write_tables(tmp_path / "other", sessions=1, trials=12, channels=channels)
    for file in other.iterdir():
        file.write_text(file.read_text().replace("Time:50Hz", f"Time:{rate}Hz"))
    assert main(["prepare", str(one), str(other), str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
