import argparse

import pytest

from b2t.config import Config
from b2t.errors import UserError
from b2t.records import JsonlSink
from b2t.report import watch_command
from b2t.report.watch import sparkline


def test_sparkline_shows_the_course():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([5, 5, 5]) == "▄▄▄"
    assert sparkline([]) == ""
    assert len(sparkline(list(range(1000)), 40)) == 40
    assert sparkline([1, 1, 9, 9], 2) == "▁█"


def call(*arguments):
    parser = argparse.ArgumentParser()
    watch_command.add_arguments(parser)
    return watch_command.run(parser.parse_args([str(a) for a in arguments]))


def test_once_prints_verdict_courses_and_alerts(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(Config().to_yaml())
    call(tmp_path, "--once")
    assert "nothing recorded yet" in capsys.readouterr().out
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    for step in range(1, 20):
        record = {"step": step, "phase": "tokenizer", "time_s": 1.0, "loss/total": 1 / step}
        pace = {"time/step_s": 0.5, "throughput/frames_per_s": 1234.0}
        sink.write({**record, **pace, "codebook/utilization_worst": 0.02})
    sink.write({"step": 19, "alert": {"severity": "warning", "message": "codes [die]"}})
    call(tmp_path, "--once")
    printed = capsys.readouterr().out
    for part in ("critical", "loss/total", "█", "warning: codes [die]", "step 19 of 35,000"):
        assert part in printed
    assert "0.5 s/step · 1,234 frames/s · about 4 h 51 min left" in printed
    assert "try: " in printed


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        call(tmp_path, "--once")
