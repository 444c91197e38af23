"""The rank that the others wait for is named, with how long."""

import logging
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from b2t.train import pace
from b2t.train.pace import EncoderClock, Own, Pace, waits_for


def own(encode_s, data_s=0.0, bins=100):
    return Own("host", encode_s, data_s, bins)


def test_a_host_of_half_the_speed_makes_the_others_wait_half_the_time():
    """Three do a step of 1 s in 0.5 s, and wait for the fourth, whose encoder takes 0.2 of 1 s."""
    ranks = [own(1.0), own(1.0), own(2.0), own(1.0)]
    share, factor = waits_for(2, ranks, seconds=10.0)
    assert (share, factor) == pytest.approx((0.5, 2.0))
    assert waits_for(0, ranks, seconds=10.0)[0] == 0.0


def test_late_batches_are_waited_for_as_long_as_they_are_late():
    ranks = [own(1.0, data_s=0.5), own(1.0, data_s=4.5)]
    assert waits_for(1, ranks, seconds=10.0) == pytest.approx((0.4, 1.0))
    assert waits_for(0, ranks, seconds=10.0)[0] == 0.0


def test_longer_trials_are_no_slowness():
    assert waits_for(1, [own(1.0), own(2.0, bins=200)], seconds=10.0) == (0.0, 1.0)


class Sleepy(nn.Module):
    def forward(self, signal):
        time.sleep(0.02)
        return signal


def test_training_forwards_are_timed_and_no_others():
    module = Sleepy()
    clock = EncoderClock(module, torch.device("cpu"))
    for _ in range(3):
        module(torch.zeros(2, 7, 4))
    with torch.no_grad():
        module.eval()(torch.zeros(2, 7, 4))
    seconds, bins = clock.read()
    assert bins == 3 * 14 and 0.06 <= seconds < 0.5
    assert clock.read() == (0, 0)
    clock.close()
    module.train()(torch.zeros(2, 7, 4))
    assert clock.read() == (0, 0)


@pytest.fixture
def records(monkeypatch, caplog):
    """Lets a hook see records of two ranks, of which the second has the given time per bin."""
    monkeypatch.setattr(logging.getLogger("b2t"), "propagate", True)
    caplog.set_level(logging.INFO, "b2t")
    monkeypatch.setattr(pace.socket, "gethostname", lambda: "near")

    def play(*factors):
        hook, record = Pace(), {}
        for factor in factors:
            other = Own("far", 0.2 * factor, 0.0, 100)
            ranks = SimpleNamespace(gather=lambda mine, other=other: [own(0.2), other])
            for _ in range(20):
                hook.on_step(None, None)
            record = {"time/step_s": 0.1, "time/data_wait_fraction": 0.0}
            hook.on_log(SimpleNamespace(ranks=ranks), record)
        return record, [each.message for each in caplog.records if "is slow" in each.message]

    return play


def test_a_few_steps_are_no_evidence(records):
    hook = Pace()
    for _ in range(19):
        hook.on_step(None, None)
        record = {"time/step_s": 0.1, "time/data_wait_fraction": 0.5}
        hook.on_log(SimpleNamespace(ranks=None), record)
        assert len(record) == 2


def test_a_slow_host_is_named_after_two_records_and_not_at_each(records):
    record, said = records(2.0, 2.0, 2.0, 2.0)
    assert record["time/slowest_rank"] == 1.0
    assert record["time/rank_wait_fraction"] == pytest.approx(0.5)
    assert len(said) == 1 and "rank 1 on far is slow" in said[0]
    assert "about 50 % of the time" in said[0] and "2.0 ×" in said[0]


def test_a_single_slow_record_is_not_named(records):
    record, said = records(2.0, 1.0, 2.0, 1.02)
    assert said == [] and record["time/rank_wait_fraction"] == pytest.approx(1 - 1 / 1.02)
