import math

import pytest

from b2t.monitor.health import TABLE, verdict

ROWS = {row.metric: row for row in TABLE}


@pytest.mark.parametrize(
    ("metric", "healthy", "concerning", "critical"),
    [
        ("codebook/utilization_worst", [0.6, 0.99, 1.0], [0.4, 0.59], [0.39, 0.0]),
        ("codebook/perplexity_worst_fraction", [100 / 256, 1.0], [50 / 256, 0.39], [0.195]),
        ("codebook/dead", [0.0, 0.2], [0.21, 0.4], [0.41, 1.0]),
        ("reconstruction/snr_db", [15, 40], [10, 14.9], [9.9, -3]),
        ("loss/vq_ratio", [0.1, 2], [2.1, 10], [10.1]),
        ("optim/grad_norm", [0.1, 5], [5.1, 10], [10.1, 1e-7, 0.0]),
    ],
)
def test_grades_are_those_of_the_monitoring_table(metric, healthy, concerning, critical):
    row = ROWS[metric]
    assert {row.grade(v) for v in healthy} == {"healthy"}
    assert {row.grade(v) for v in concerning} == {"concerning"}
    assert {row.grade(v) for v in [*critical, math.nan, math.inf]} == {"critical"}


def test_not_finite_is_critical_and_absent_is_nothing():
    for row in TABLE:
        assert row.grade(math.nan) == "critical" and row.grade(-math.inf) == "critical"
        assert row.grade(None) is None and row.show(None) == "–"
        assert row.remedy and row.span()


def test_the_verdict_is_the_worst_row():
    good = {"codebook/utilization_worst": 0.9, "optim/grad_norm": 1.0}
    assert verdict({}) is None
    assert verdict(good) == "healthy"
    assert verdict({**good, "codebook/dead": 0.3}) == "concerning"
    assert verdict({**good, "codebook/dead": 0.3, "loss/vq_ratio": 50.0}) == "critical"


def test_the_snr_is_shown_but_does_not_decide():
    assert ROWS["reconstruction/snr_db"].grade(0.7) == "critical"
    assert verdict({"optim/grad_norm": 1.0, "reconstruction/snr_db": 0.7}) == "healthy"
