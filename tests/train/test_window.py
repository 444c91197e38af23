"""Sums between two log steps, taken over by another number of ranks."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from b2t.train.window import Window


class Together:
    """Ranks of one process: what each gathers or adds up is given."""

    def __init__(self, rank, world, shares=()):
        self.rank, self.world, self.shares = rank, world, shares
        self.is_main, self.device = rank == 0, torch.device("cpu")

    def gather(self, value):
        assert value == self.shares[self.rank]
        return list(self.shares)

    def sum(self, values):
        return [math.fsum(column) for column in zip(*self.shares, strict=True)]


TOTALS = {"frames": 7.0, "bins": 70.0, "padded": 90.0}


def window(rank, world, steps):
    """A window of this rank after steps of (loss, squared error)."""
    filled = Window(Together(rank, 1))
    for loss, error in steps:
        output = SimpleNamespace(
            losses={"reconstruction": torch.tensor(loss)},
            loss=torch.tensor(loss),
            metrics={"squared_error": torch.tensor(error), "signal_power": torch.tensor(9.0)},
        )
        filled.add(output, 1)
        report = SimpleNamespace(revived=[1, 2], nonfinite=torch.tensor(4))
        filled.close_step(TOTALS, 0.5, 0.1, report)
    return filled


def sums(filled):
    return {name: float(value) for name, value in filled._sums.items()}


@pytest.fixture
def state():
    windows = [window(rank, 2, [(0.1, 0.3 + rank), (0.7, 0.11 + rank)]) for rank in range(2)]
    shares = [[float(w._sums[name]) for name in sorted(w._sums)] for w in windows]
    windows[0].ranks = Together(0, 2, shares)
    return windows, windows[0].state()


def test_the_same_ranks_go_on_with_their_own_sums(state):
    windows, saved = state
    for rank, before in enumerate(windows):
        again = Window(Together(rank, 2))
        again.load_state(saved)
        assert sums(again) == sums(before)
        assert {n: v.dtype for n, v in again._sums.items()} == {
            n: v.dtype for n, v in before._sums.items()
        }
        assert again._steps == 2 and again._frames == 14.0 and again._revived == 6
        assert float(again._nonfinite) == 8


@pytest.mark.parametrize("world", [1, 3])
def test_other_ranks_take_over_losses_as_they_are_and_elements_once(state, world):
    windows, saved = state
    again = [Window(Together(rank, world)) for rank in range(world)]
    for each in again:
        each.load_state(saved)
    for name in ("loss/total", "loss/reconstruction"):
        assert {sums(each)[name] for each in again} == {sums(windows[0])[name]}
    for name in ("squared_error", "signal_power"):
        assert sum(sums(each)[name] for each in again) == pytest.approx(
            sum(sums(each)[name] for each in windows), rel=1e-15
        )


def test_no_state_is_a_new_window():
    fresh = Window(Together(0, 1))
    fresh.load_state(None)
    assert fresh._steps == 0 and not fresh._sums


def test_records_are_means_over_steps_micro_batches_and_ranks(monkeypatch):
    """Two ranks that do the same, two steps of two micro-batches, one skipped step between."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(2))
    ranks = Together(0, 2)
    ranks.sum = lambda values: [2 * value for value in values]
    filled = Window(ranks)

    def micro_batch(loss, **rows):
        values = {"squared_error": 1.0, "signal_power": 10.0, "tokens": 4, "tokens_correct": 1}
        filled.add(
            SimpleNamespace(
                losses={"reconstruction": torch.tensor(loss)},
                loss=torch.tensor(2 * loss),
                metrics={name: torch.tensor(value) for name, value in {**values, **rows}.items()},
            ),
            2,
        )

    for first, second in ((1.0, 3.0), (math.nan, 3.0), (5.0, 7.0)):
        micro_batch(first, phoneme_rows=3, phoneme_rows_too_short=0)
        micro_batch(second, phoneme_rows=0, phoneme_rows_too_short=1, text_rows_too_short=2)
        if math.isnan(first):
            assert filled.not_finite() == ["loss/reconstruction", "loss/total"]
            filled.drop_step()
        else:
            filled.close_step(TOTALS, 0.25, 0.1, None)
    record = filled.metrics()
    assert record["loss/reconstruction"] == 4.0 and record["loss/total"] == 8.0
    assert record["reconstruction/snr_db"] == pytest.approx(10.0)
    assert record["text/token_accuracy"] == 0.25
    assert record["phoneme/left_out_fraction"] == 0.25
    assert record["text/left_out_fraction"] == 1.0
    assert record["throughput/padding_fraction"] == pytest.approx(1 - 70 / 90)
    assert record["throughput/frames_per_s"] == pytest.approx(28.0)
    assert record["time/step_s"] == 0.25 and record["time/data_wait_fraction"] == 0.4
    assert filled.steps == 0
