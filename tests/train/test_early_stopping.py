import json
import math
from dataclasses import asdict

import pytest

from b2t.train.early_stopping import EarlyStopping


def steps(stopping, values):
    return [(stopping.update(v, i), stopping.should_stop) for i, v in enumerate(values, 1)]


def test_patience_counts_evaluations_since_the_best():
    stopping = EarlyStopping(patience=2)
    assert [s for _, s in steps(stopping, [3, 2, 2.5, 1.9, 2, 2])] == [False] * 5 + [True]
    assert (stopping.best, stopping.best_step) == (1.9, 4)
    # What is no better than the best has not improved.
    assert not stopping.update(1.9, 7) and stopping.best_step == 4


def test_max_mode_and_min_delta():
    stopping = EarlyStopping(mode="max", min_delta=0.1, patience=3)
    assert [b for b, _ in steps(stopping, [0.5, 0.55, 0.61, 0.7, 0.705])] == [
        True,
        False,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_never_improve(bad):
    stopping = EarlyStopping(patience=2)
    assert steps(stopping, [bad, 5, bad, bad]) == [
        (False, False),
        (True, False),
        (False, False),
        (False, True),
    ]
    assert stopping.best == 5


@pytest.mark.parametrize("stop", range(7))
def test_resume_goes_on_exactly(stop):
    values = [3, 2, 2.5, 1.9, 2, 2, 1.8]
    straight = steps(EarlyStopping(patience=2), values)
    first = EarlyStopping(patience=2)
    before = steps(first, values[:stop])
    second = EarlyStopping(**json.loads(json.dumps(asdict(first))))
    assert before + steps(second, values[stop:]) == straight
