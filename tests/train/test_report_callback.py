"""The report is written however a run ends."""

from types import SimpleNamespace

import pytest

from b2t.config import Config
from b2t.monitor.alerts import Alert
from b2t.records import JsonlSink
from b2t.train.callbacks import Report


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.yaml").write_text(Config().to_yaml())
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write({"step": 1, "phase": "tokenizer", "optim/grad_norm": 1.0})
    sink.close()
    return tmp_path


@pytest.mark.parametrize(
    ("outcome", "written"),
    [
        ("finished", True),
        ("failed: loss/total is not finite", True),
        ("crashed: RuntimeError: out of memory", True),
        ("stopped on request", False),
    ],
)
def test_at_the_end_unless_a_scheduler_waits(folder, outcome, written):
    Report(folder).on_end(SimpleNamespace(outcome=outcome))
    assert (folder / "report" / "report.html").is_file() == written


def test_on_a_warning_in_another_process(folder):
    report = Report(folder)
    report.on_alert(None, Alert("info", "warm"))
    assert report._writer is None
    report.on_alert(None, Alert("warning", "low"))
    report.on_end(SimpleNamespace(outcome="stopped on request"))
    assert report._writer.returncode == 0
    assert (folder / "report" / "report.html").is_file()
