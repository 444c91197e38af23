import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from b2t.config import PhaseConfig
from b2t.train.schedule import lr_factor


def phase(**changes) -> PhaseConfig:
    return PhaseConfig(**{"name": "p", "steps": 100, "warmup_steps": 10, **changes})


def test_warm_up_is_linear_and_its_first_update_is_not_lost():
    factors = [lr_factor(step, phase()) for step in range(10)]
    assert factors == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[-1] == 1.0


@pytest.mark.parametrize(
    ("schedule", "course"),
    [
        ("cosine", lambda x: 0.1 + 0.9 * (1 + math.cos(math.pi * x)) / 2),
        ("linear", lambda x: 1 - 0.9 * x),
        ("constant", lambda x: 1.0),
    ],
)
def test_course_after_warm_up(schedule, course):
    for step in (10, 11, 30, 55, 99, 100):
        expected = course((step - 10) / 90)
        assert lr_factor(step, phase(schedule=schedule)) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_stays_at_the_end_beyond_the_last_step(schedule):
    assert lr_factor(10_000, phase(schedule=schedule, min_lr_fraction=0.25)) == pytest.approx(0.25)


def test_without_warm_up_it_starts_at_the_peak():
    assert lr_factor(0, phase(warmup_steps=0)) == 1.0


def test_a_phase_of_warm_up_alone():
    factors = [lr_factor(step, phase(steps=5, warmup_steps=5)) for step in range(6)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


@pytest.mark.parametrize(("steps", "expected"), [(100, 10), (7, 1), (2000, 2000), (1999, 199)])
def test_a_warm_up_longer_than_the_phase_is_a_tenth_of_it(steps, expected):
    of = phase(steps=steps, warmup_steps=2000, component_warmup_steps={"encoder": 3000})
    factors = [lr_factor(step, of) for step in range(steps)]
    assert factors[expected - 1] == 1.0 and max(factors[: expected - 1], default=0) < 1
    slow = lr_factor(steps // 10 or 1, of, "encoder")
    assert steps == 2000 or slow == lr_factor(steps // 10 or 1, of)


@given(
    st.integers(1, 500),
    st.integers(0, 600),
    st.sampled_from(["cosine", "linear", "constant"]),
    st.floats(0, 1),
)
def test_between_zero_and_one_and_never_rising_after_warm_up(steps, warmup, schedule, low):
    of = phase(steps=steps, warmup_steps=warmup, schedule=schedule, min_lr_fraction=low)
    factors = [lr_factor(step, of) for step in range(steps + 2)]
    assert all(0 < factor <= 1 for factor in factors[:steps] if warmup or low)
    after = factors[warmup if warmup <= steps else max(1, steps // 10) :]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(after))
