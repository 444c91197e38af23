"""The line about the data in a run's log."""

import logging
from types import SimpleNamespace

import pytest

from b2t.config import load_config
from b2t.data.dataset import dataset_info, load_trials
from b2t.evaluate.audit import AuditOptions
from b2t.model.tokenizer import byte_tokenizer
from b2t.train import data_audit
from tests.evaluate.audit_data import of_session, save, sound_rows


@pytest.fixture
def said(tmp_path, caplog):
    def look(rows, *overrides):
        path = str(save(tmp_path / f"data{len(list(tmp_path.iterdir()))}", rows))
        config = load_config("demo", [f"data.path={path}", *overrides])
        materials = SimpleNamespace(
            info=dataset_info(path),
            train=load_trials(path, "train"),
            validation=load_trials(path, "val"),
            tokenizer=byte_tokenizer(),
        )
        caplog.clear()
        with caplog.at_level(logging.INFO, "b2t"):
            data_audit.look_at_data(config, materials)
        return caplog.records

    return look


def test_a_run_says_in_one_line_what_is_wrong_with_its_data(said):
    (line,) = said(sound_rows())
    assert line.levelname == "INFO" and line.getMessage().startswith("audit of 24 trials in ")
    assert line.getMessage().endswith("no findings")
    rows = sound_rows()
    for row in of_session(rows, "day1"):
        row["signal"][:, 3] = 0.0
    rows[0]["phonemes"] = [1, 2] * 40
    (line,) = said(rows)
    assert line.levelname == "WARNING"
    assert "warning: dead channels, CTC frames (b2t audit " in line.getMessage()
    (line,) = said(rows, "model.phoneme_head.enabled=false")
    assert "warning: dead channels (b2t" in line.getMessage()


def test_it_can_be_left_out_and_never_ends_a_run(said, monkeypatch):
    assert said(sound_rows(), "data.audit_seconds=0") == []
    monkeypatch.setattr(data_audit, "audit_in_short", lambda *_: 1 / 0)
    (line,) = said(sound_rows())
    assert "could not be audited (ZeroDivisionError" in line.getMessage()


def test_its_time_is_bounded_and_shared_by_the_splits(monkeypatch):
    from b2t.evaluate.audit import reading
    from tests.evaluate.audit_data import as_splits

    assert AuditOptions().seconds is None
    clock = iter(range(1000))
    monkeypatch.setattr(reading.time, "monotonic", lambda: float(next(clock)))
    read = list(reading.read_trials(as_splits(sound_rows()), None, 9.0))
    counts = {split: sum(t.split == split for t in read) for split in ("train", "val", "test")}
    assert counts == {"train": 3, "val": 2, "test": 2}
    first = [trial.session for trial in read if trial.split == "train"]
    assert first == ["day0", "day1", "day2"]
