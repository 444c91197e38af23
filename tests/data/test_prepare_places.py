"""Preparing below the folder that is read, and what becomes of processes that end."""

from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest

from b2t.cli import main
from b2t.data.prepare import PrepareOptions, Reopen, prepare, run, work
from b2t.data.sources import SourceOptions, detect
from b2t.errors import UserError
from tests.data.test_prepare import Memory, with_nan
from tests.data.test_prepare_processes import content, write_tables


def arrays(folder):
    folder.mkdir()
    for number in range(3):
        signal = np.random.default_rng(number).standard_normal((3000, 3))
        np.save(folder / f"day{number}.npy", signal)
    return folder


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_dataset_within_its_source_is_no_recording(tmp_path, monkeypatch, capsys):
    source = arrays(tmp_path / "mine")
    words = ["prepare", str(source), "--rate", "50", "--workers", "1"]
    assert main([*words, str(tmp_path / "beside")]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(run, "assemble", interrupted)
        assert main([*words, str(source / "out")]) == 130
    assert list((source / "out.partial").glob("*.npz")), "arrays, as recordings are"
    assert len(detect(source, SourceOptions(rate="50")).trials) == 90
    assert main([*words, str(source / "out")]) == 0
    assert "going on from" in capsys.readouterr().err
    assert main([*words, str(source / "out"), "--overwrite"]) == 0
    assert content(source / "out")[1] == content(tmp_path / "beside")[1]


def test_a_recording_in_a_folder_called_partial_is_one(tmp_path):
    source = arrays(tmp_path / "subject.partial")
    inner = arrays(source / "day.partial")
    assert len(detect(source, SourceOptions(rate="50")).trials) == 180
    (inner / "key.json").write_text("1")
    assert len(detect(source, SourceOptions(rate="50")).trials) == 90
    assert len(detect(inner, SourceOptions(rate="50")).trials) == 90


def test_a_folder_of_the_user_is_not_taken_for_an_unfinished_dataset(tmp_path):
    mine = tmp_path / "out.partial" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(UserError, match=r"out.partial is in the way"):
        prepare(Memory(), tmp_path / "out", PrepareOptions())
    assert mine.read_text() == "mine"
    mine.rename(mine.with_name("key.tmp"))  # as a call that was killed at once leaves it
    prepare(Memory(), tmp_path / "out", PrepareOptions())


def threads(monkeypatch, do):
    """Let threads stand in for processes that do ``do``."""
    for name, value in {
        "_do": do,
        "_start": lambda *_: None,
        "ProcessPoolExecutor": lambda count, _, initializer: ThreadPoolExecutor(1),
    }.items():
        monkeypatch.setattr(work, name, value)


def test_a_process_that_ends_on_the_way_loses_nothing(tmp_path, monkeypatch, capsys):
    source = write_tables(tmp_path / "eeg")
    done = []

    def ended(task, *call):
        done.append(task)
        if len(done) == 3:
            raise BrokenProcessPool
        return task(opened, plan, *call), []

    reopen = Reopen((source,), SourceOptions())
    opened = reopen.open()
    plan = run._plan(opened, ["train"] * 180, PrepareOptions(), tmp_path / "out.partial")
    words = ["prepare", str(source), str(tmp_path / "out"), "--split", "1/0/0", "--workers", "2"]
    with monkeypatch.context() as patched:
        threads(patched, ended)
        assert main(words) == 2
    said = capsys.readouterr().err
    assert "a process that was reading ended" in said and "fewer --workers" in said
    kept = sorted(file.name for file in (tmp_path / "out.partial").glob("measured-*"))
    assert kept == ["measured-000000.npz", "measured-000001.npz"]
    assert main([*words[:-1], "1"]) == 0


def test_what_a_process_cannot_open_is_said(tmp_path, monkeypatch):
    plan = run._plan(Memory(), [], PrepareOptions(), tmp_path)
    monkeypatch.setattr(work, "_here", None)
    monkeypatch.setattr(work.logging, "disable", lambda _: None)
    monkeypatch.setenv("TQDM_DISABLE", "0")
    work._start(Reopen((tmp_path / "gone",), SourceOptions()), plan)
    with pytest.raises(UserError, match="gone: no such file or folder"):
        work._do(work.measure, [0])


def test_a_split_without_a_sound_trial_is_told(tmp_path, caplog):
    splits = ["val", *["train"] * 9]
    source = Memory(10, bad={0: with_nan}, splits=splits)
    source.own_splits = True
    with caplog.at_level("WARNING", logger="b2t"):
        prepare(source, tmp_path / "out", PrepareOptions(skip_bad_trials=True))
    assert "there is no val split: all of its trials are bad" in caplog.text
    assert "no train split" not in caplog.text
