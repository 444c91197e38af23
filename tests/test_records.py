import json
import math

import pytest

from b2t import records
from b2t.records import JsonlSink, read_jsonl, rewind


def test_records_come_back_in_order(tmp_path):
    sink = JsonlSink(tmp_path / "deep" / "metrics.jsonl")
    for step in range(3):
        sink.write({"step": step, "loss/total": step / 7, "phase": "é"})
        assert len(read_jsonl(sink.path).records) == step + 1
    assert read_jsonl(sink.path).records[2] == {"step": 2, "loss/total": 2 / 7, "phase": "é"}


def test_a_torn_last_line_costs_only_itself(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JsonlSink(path).write({"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "loss/to')
    assert read_jsonl(path) == ([{"step": 1}], [2])
    JsonlSink(path).write({"step": 3})
    assert read_jsonl(path) == ([{"step": 1}, {"step": 3}], [2])


def test_malformed_lines_of_every_kind_are_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\n[1]\n\xff\xfe\n{"step": }\n\x00\x00\n3\n{"step": 2}\n')
    found = read_jsonl(path)
    assert [r["step"] for r in found.records] == [1, 2]
    assert found.malformed == [3, 4, 5, 6, 7]


def test_a_missing_or_empty_file_has_no_records(tmp_path):
    assert read_jsonl(tmp_path / "none.jsonl") == ([], [])
    (tmp_path / "empty.jsonl").touch()
    assert read_jsonl(tmp_path / "empty.jsonl") == ([], [])


def test_non_finite_numbers_are_null_and_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JsonlSink(path).write({"step": 1, "a": math.nan, "b": -math.inf, "c": 1.0})
    text = path.read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text) == {"step": 1, "a": None, "b": None, "c": 1.0, "non_finite": ["a", "b"]}


def test_rewinding_drops_what_a_resumed_run_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write({"event": "start", "step": None})
    for step in (10, 20, 30):
        sink.write({"step": step})
    sink.close()
    with path.open("a") as file:
        file.write('{"st')
    assert rewind(path, 20) == 1
    assert read_jsonl(path) == ([{"event": "start", "step": None}, {"step": 10}, {"step": 20}], [])
    assert rewind(tmp_path / "none.jsonl", 3) == 0


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "evaluation.json"
    path.write_text("old")

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(records.os, "replace", full)
    with pytest.raises(OSError):
        records.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
