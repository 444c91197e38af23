import numpy as np
import pytest
import torch
from scipy import stats

from b2t.monitor.codebook import CodebookMonitor
from b2t.monitor.context import StepContext
from tests.monitor.checkpointed import checkpointed

Q, K = 3, 16


def step(counts, number=1):
    return StepContext(phase="p", counts=torch.as_tensor(counts))


def history(updates, seed=0):
    generator = np.random.default_rng(seed)
    popularity = generator.dirichlet(np.full(K, 0.2), size=Q)
    return [
        np.stack([generator.multinomial(generator.integers(0, 40), p) for p in popularity])
        for _ in range(updates)
    ]


def feed(monitor, counts):
    for number, c in enumerate(counts, 1):
        monitor.update(step(c, number))
    return monitor


@pytest.mark.parametrize("updates", [1, 4, 7, 8, 23])
def test_window_equals_a_recount_with_scipy(updates):
    counts = history(updates)
    found = feed(CodebookMonitor(window=7), counts).metrics()
    total = np.sum(counts[-7:], axis=0)
    for q in range(Q):
        used = (total[q] > 0).sum()
        assert found[f"codebook/utilization/{q}"] == used / min(K, total[q].sum())
        entropy = stats.entropy(total[q])
        assert found[f"codebook/entropy_nats/{q}"] == pytest.approx(entropy, abs=1e-12)
        assert found[f"codebook/perplexity/{q}"] == pytest.approx(np.exp(entropy))
    perplexity = [np.exp(stats.entropy(t)) for t in total]
    assert found["codebook/perplexity"] == pytest.approx(np.mean(perplexity))
    assert found["codebook/perplexity_fraction"] == pytest.approx(np.mean(perplexity) / K)
    assert found["codebook/perplexity_worst_fraction"] == pytest.approx(min(perplexity) / K)
    use = [(t > 0).sum() / min(K, t.sum()) for t in total]
    assert found["codebook/utilization"] == pytest.approx(np.mean(use))
    assert found["codebook/utilization_worst"] == min(use)
    assert found["codebook/worst_layer"] == int(np.argmin(use))
    expected = np.abs(np.corrcoef(total)[~np.eye(Q, dtype=bool)]).mean()
    assert found["codebook/layer_correlation"] == pytest.approx(expected)
    assert found["codebook/frames_per_code"] == total.sum(1).min() / K


def test_dead_codes_are_those_below_a_tenth_of_uniform_use():
    counts = np.zeros((1, 10), int)
    counts[0] = [200, 200, 200, 200, 150, 20, 11, 10, 9, 0]
    found = feed(CodebookMonitor(), [counts]).metrics()
    assert counts.sum() == 1000
    assert found["codebook/dead/0"] == pytest.approx(0.4 - 0.2)


def test_dead_codes_are_not_judged_from_fewer_frames_than_codes():
    few, enough = np.ones((1, K), int), np.ones((1, K), int)
    few[0, 0] = 0
    assert "codebook/dead" not in feed(CodebookMonitor(), [few]).metrics()
    assert feed(CodebookMonitor(), [enough]).metrics()["codebook/dead"] == 0.0


def test_trend_is_the_least_squares_slope_of_the_windowed_values():
    counts = history(30)
    monitor = feed(CodebookMonitor(window=10), counts)
    course = []
    for end in range(21, 31):
        total = np.sum(counts[max(0, end - 10) : end], axis=0)
        course.append(np.mean([np.exp(stats.entropy(t)) for t in total]) / K)
    slope = np.polyfit(np.arange(10), course, 1)[0] * 1000
    assert monitor.metrics()["codebook/perplexity_trend"] == pytest.approx(slope, rel=1e-6)


def test_a_collapsing_codebook_trends_down():
    generator = np.random.default_rng(0)
    counts = []
    for used in range(K, 0, -1):
        row = np.zeros((Q, K), int)
        row[:, :used] = generator.integers(1, 5, (Q, used))
        counts.append(row)
    found = feed(CodebookMonitor(window=4), counts).metrics()
    assert found["codebook/utilization_trend"] < 0 and found["codebook/perplexity_trend"] < 0


@pytest.mark.parametrize("stop", [0, 1, 5, 7, 12])
def test_resume_goes_on_exactly(stop):
    counts = history(20)
    straight = feed(CodebookMonitor(window=7), counts)
    before = feed(CodebookMonitor(window=7), counts[:stop])
    state = checkpointed(before.state_dict())
    resumed = CodebookMonitor(window=7)
    resumed.load_state_dict(state)
    assert resumed.metrics() == before.metrics()
    assert feed(resumed, counts[stop:]).metrics() == straight.metrics()


def test_a_shorter_window_keeps_the_most_recent_updates():
    counts = history(12)
    resumed = CodebookMonitor(window=4)
    resumed.load_state_dict(feed(CodebookMonitor(window=9), counts).state_dict())
    assert torch.equal(resumed.usage(), torch.tensor(np.sum(counts[-4:], axis=0)))
    feed(resumed, counts[:1])
    assert torch.equal(resumed.usage(), torch.tensor(np.sum([*counts[-3:], counts[0]], axis=0)))


def test_a_longer_window_fills_up():
    counts = history(12)
    resumed = CodebookMonitor(window=9)
    resumed.load_state_dict(feed(CodebookMonitor(window=4), counts).state_dict())
    feed(resumed, counts)
    assert torch.equal(resumed.usage(), torch.tensor(np.sum(counts[-9:], axis=0)))


def test_nothing_before_the_first_update_and_steps_without_counts_are_none():
    monitor = CodebookMonitor()
    monitor.update(StepContext(phase="p"))
    assert monitor.metrics() == {} and monitor.usage() is None
    assert monitor.state_dict()["counts"] is None


def test_an_update_without_a_frame_gives_no_number_instead_of_nan():
    found = feed(CodebookMonitor(), [np.zeros((Q, K), int)]).metrics()
    assert all(value == value for value in found.values())
    assert "codebook/perplexity/0" not in found


def test_counts_beyond_float16_and_int32_sums_are_exact():
    big = np.full((1, 4), 1_500_000_000)
    monitor = feed(CodebookMonitor(window=5), [big] * 5)
    assert monitor.usage().tolist() == [[7_500_000_000] * 4]
