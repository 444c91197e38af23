import math

import numpy as np
import pytest
import torch
from scipy import stats

from b2t.evaluate import usage
from b2t.evaluate.signal import SignalSums, decibels


def ragged(seed=0, rows=5, bins=17, channels=3):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(rows, bins, channels, generator=generator)
    output = target + 0.3 * torch.randn(rows, bins, channels, generator=generator)
    lengths = torch.tensor([17, 1, 9, 0, 13])[:rows]
    mask = torch.arange(bins) < lengths[:, None]
    output[~mask] = math.nan
    target[~mask] = 1e30
    return output, target, mask


def test_pooled_measures_equal_numpy_over_the_valid_bins():
    output, target, mask = ragged()
    sums = SignalSums()
    sums.add(output, target, mask)
    y, x = output[mask].double().numpy(), target[mask].double().numpy()
    assert sums.mse == pytest.approx(np.mean((x - y) ** 2), rel=1e-12)
    assert sums.snr_db == pytest.approx(10 * np.log10((x**2).sum() / ((x - y) ** 2).sum()))
    cosine = (x * y).sum() / (np.linalg.norm(x) * np.linalg.norm(y))
    assert sums.cosine == pytest.approx(cosine, rel=1e-12)
    trials = []
    for row in range(5):
        x, y = target[row, mask[row]].double().numpy(), output[row, mask[row]].double().numpy()
        if len(x):
            trials.append(10 * np.log10((x**2).sum() / ((x - y) ** 2).sum()))
    assert sums.median_snr_db == pytest.approx(np.median(trials))


def test_sums_do_not_depend_on_how_rows_are_split():
    output, target, mask = ragged()
    whole, parts = SignalSums(), SignalSums()
    whole.add(output, target, mask)
    for rows in (slice(0, 2), slice(2, 3), slice(3, 5)):
        part = SignalSums()
        part.add(output[rows], target[rows], mask[rows])
        parts = parts + part
    assert parts.snr_db == pytest.approx(whole.snr_db, rel=1e-12)
    assert parts.median_snr_db == whole.median_snr_db
    assert parts.count == whole.count == float(mask.sum() * 3)


def test_nothing_measured_is_none():
    sums = SignalSums()
    assert sums.snr_db is None and sums.mse is None and sums.cosine is None
    assert sums.median_snr_db is None
    output, target, mask = ragged()
    sums.add(output, target, torch.zeros_like(mask))
    assert sums.snr_db is None and sums.mse is None


def test_decibels_at_the_edges():
    assert decibels(1.0, 0.0) == math.inf
    assert decibels(0.0, 1.0) == -math.inf
    assert math.isnan(decibels(math.nan, 1.0))
    assert decibels(100.0, 1.0) == pytest.approx(20.0)


def test_counts_equal_a_recount_and_leave_masked_frames_out():
    generator = np.random.default_rng(0)
    codes = generator.integers(-1, 7, (4, 11, 3))
    counts = usage.count_codes(torch.tensor(codes), 7)
    for layer in range(3):
        expected = np.bincount(codes[..., layer][codes[..., layer] >= 0], minlength=7)
        assert counts[layer].tolist() == expected.tolist()
    assert usage.count_codes(torch.full((2, 5, 3), -1), 7).tolist() == [[0] * 7] * 3


def test_perplexity_equals_scipy_entropy():
    counts = np.random.default_rng(1).integers(0, 50, (4, 33))
    expected = [math.exp(stats.entropy(row)) for row in counts]
    assert usage.perplexity(torch.tensor(counts)).tolist() == pytest.approx(expected, rel=1e-12)


def test_utilization_is_over_reachable_codes():
    counts = torch.tensor(
        [[1, 1, 1, 0, 0, 0, 0, 0], [9, 0, 0, 0, 0, 0, 0, 0], [4, 4, 4, 4, 0, 0, 0, 0]]
    )
    assert usage.utilization(counts).tolist() == [1.0, 1 / 8, 4 / 8]
    empty = torch.zeros(1, 8, dtype=torch.int64)
    assert math.isnan(usage.utilization(empty).item())
    assert math.isnan(usage.perplexity(empty).item())
