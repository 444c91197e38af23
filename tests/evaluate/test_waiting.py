"""The bar and the warning of what takes long."""

import logging
from types import SimpleNamespace

import pytest

from b2t.evaluate.waiting import with_time_left


def batches(clock: list[float], seconds: float, sizes: list[int]):
    for size in sizes:
        clock[0] += seconds
        yield SimpleNamespace(rows=["row"] * size)


@pytest.fixture
def warned(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("b2t"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records]


def wait(seconds: float, trials: int | None):
    clock = [1000.0]
    some = batches(clock, seconds, [16] * 5)
    return list(with_time_left(some, "decode val", trials, "fewer", clock=lambda: clock[0]))


def test_a_long_wait_is_told_once_with_what_would_be_shorter(warned):
    assert len(wait(90.0, 80)) == 5
    told = ["decode val: 16 of 80 trials took 90 s; up to 6 minutes are left (fewer)"]
    assert warned() == told


@pytest.mark.parametrize(("seconds", "trials"), [(70.0, 80), (900.0, None)])
def test_a_short_wait_or_one_of_unknown_length_is_not(warned, seconds, trials):
    assert len(wait(seconds, trials)) == 5
    assert not warned()


def test_the_bar_counts_trials_and_says_what_is_left(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    wait(1.0, 80)
    shown = capsys.readouterr().err
    assert "decode val:" in shown
    assert "/80 [" in shown
