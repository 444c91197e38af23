import errno
import json
import math
import os

import pytest

from b2t import records
from b2t.records import JsonlSink, read_jsonl, rewind, write_atomically


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


class HalfFull:
    """A file on a disk that takes some bytes of a write and no more, as write(2) may."""

    def __init__(self, file, room):
        self._file, self.room = file, room

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, line):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self._file.write(line[: self.room])
        self.room -= taken
        return taken


@pytest.mark.parametrize("room", [0, 1, 7])
def test_a_record_that_does_not_fit_leaves_nothing(tmp_path, room):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write({"step": 1})
    whole = sink._file
    sink._file = HalfFull(whole, room)
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            sink.write({"step": 2})
        assert caught.value.errno == errno.ENOSPC
        assert read_jsonl(sink.path) == ([{"step": 1}], [])
    sink._file = whole
    sink.write({"step": 3})
    assert read_jsonl(sink.path) == ([{"step": 1}, {"step": 3}], [])


def test_a_full_disk_takes_records_again_once_there_is_room(mounted):
    disk = mounted("size=64k")
    sink = JsonlSink(disk / "metrics.jsonl")
    sink.write({"step": 1})
    with (disk / "ballast").open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(512))
    lost = 0
    for step in range(2, 200):
        try:
            sink.write({"step": step, "text": "x" * 100})
        except OSError:
            lost += 1
    assert lost > 100
    (disk / "ballast").unlink()
    sink.write({"step": 200})
    found = read_jsonl(sink.path)
    assert found.malformed == []
    assert len(found.records) == 200 - lost
    assert found.records[-1] == {"step": 200}


def test_a_log_that_cannot_be_written_raises_nothing(monkeypatch):
    import sys

    from b2t.log import configure, logger

    class Gone:
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

        flush = isatty = lambda self: False

    monkeypatch.setattr(sys, "stderr", Gone())
    configure()
    try:
        logger("b2t.test").error("nobody can read this")
    finally:
        logger().handlers.clear()
        logger().propagate = True


@pytest.mark.parametrize("umask, mode", [(0o077, 0o600), (0o002, 0o664), (0o022, 0o644)])
def test_files_are_for_whom_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "said.json", "{}")
        write_atomically(tmp_path / "said.json", "[]")
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["said.json"]
    assert (tmp_path / "said.json").stat().st_mode & 0o777 == mode
