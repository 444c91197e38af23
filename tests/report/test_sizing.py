import math

import pytest

from b2t.monitor.health import PERPLEXITY
from b2t.report.run_data import RunData
from b2t.report.sizing import EFFICIENCY, fit_sizing, sizing_points


def curve(codes, a, s):
    return a * codes * s / (a * codes + s)


def test_the_curve_that_made_the_points_is_found():
    points = [(k, curve(k, 0.9, 700)) for k in (64, 256, 1024, 4096)]
    sizing = fit_sizing(points)
    assert sizing.efficiency == pytest.approx(0.9, rel=1e-3)
    assert sizing.saturation == pytest.approx(700, rel=1e-3)
    assert sizing.perplexity(512) == pytest.approx(curve(512, 0.9, 700), rel=1e-3)
    share = {k: sizing.perplexity(k) / k for k in (sizing.suggestion, 2 * sizing.suggestion)}
    low = PERPLEXITY.healthy[0]
    assert share[sizing.suggestion] >= low > share[2 * sizing.suggestion]


def test_noise_moves_the_answer_little():
    factors = (1.05, 0.96, 1.03, 0.97)
    points = [
        (k, f * curve(k, 0.8, 900)) for k, f in zip((64, 256, 1024, 4096), factors, strict=True)
    ]
    assert 600 < fit_sizing(points).saturation < 1300


def test_the_codebooks_of_the_collapse_study_do_not_bend():
    """Worst layers of docs/RESULTS.md at 8 × 256, 4 × 1024, 2 × 8192: nothing limits 8192 yet."""
    points = [(256, 0.825 * 256), (1024, 0.744 * 1024), (8192, 0.806 * 8192)]
    sizing = fit_sizing(points)
    assert sizing.saturation is None and sizing.suggestion == 16384
    assert sizing.efficiency == pytest.approx(EFFICIENCY, abs=0.05)


def test_one_size_well_used_asks_for_more():
    sizing = fit_sizing([(256, 239.0)])
    assert sizing.saturation is None and sizing.suggestion == 512
    assert sizing.perplexity(256) == pytest.approx(239)


def test_one_size_badly_used_gives_the_curve_through_it():
    sizing = fit_sizing([(1024, 200.0)])
    line = EFFICIENCY * 1024
    assert sizing.saturation == pytest.approx(200 * line / (line - 200), rel=1e-3)
    assert sizing.perplexity(1024) == pytest.approx(200, rel=1e-4)
    assert sizing.suggestion == 256


def test_points_that_mean_nothing_are_not_used():
    assert fit_sizing([]) is None
    assert fit_sizing([(64, math.nan), (64, 80.0), (1, 1.0), (8, 0.0)]) is None
    assert fit_sizing([(64, 64.0)]).suggestion == 128


def run(tmp_path, name, frames_per_code, perplexity, used, alerts=()):
    steps = [
        {
            "step": 10,
            "codebook/perplexity/0": perplexity,
            "codebook/perplexity/1": perplexity + 9,
            "codebook/frames_per_code": frames_per_code,
            "codebook/utilization_worst": used,
        }
    ]
    config = {"model": {"quantizer": {"codebook_size": 256}}}
    return RunData(tmp_path / name, steps=steps, alerts=list(alerts), config=config)


def test_collapsed_and_hardly_counted_codebooks_are_left_out_by_name(tmp_path):
    collapse = {"step": 9, "rule": "codebook-collapse", "severity": "critical"}
    runs = [
        run(tmp_path, "good", 40.0, 200.0, 0.99),
        run(tmp_path, "few", 3.0, 90.0, 0.99),
        run(tmp_path, "dead", 40.0, 5.0, 0.04),
        run(tmp_path, "stopped", 40.0, 30.0, 0.2, [collapse]),
        RunData(tmp_path / "empty"),
    ]
    found = sizing_points(runs)
    assert found.points == ((256, 200.0),)
    few, dead, stopped = found.left_out
    assert few.startswith("few, with 3.0 frames per code")
    assert "dead, whose codebook collapsed" in dead and "stopped, whose" in stopped


def test_the_count_of_more_frames_is_taken(tmp_path):
    one = run(tmp_path, "run", 30.0, 200.0, 0.99)
    one.evaluation = {"perplexity": [190.0, 195.0], "codebook_size": 256}
    one.usage = [[100] * 256, [100] * 256]
    assert sizing_points([one]).points == ((256, 190.0),)
    one.usage = [[5] * 256, [5] * 256]
    assert sizing_points([one]).points == ((256, 200.0),)
