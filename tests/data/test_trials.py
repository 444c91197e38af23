from collections import Counter

import numpy as np
import pytest
from datasets import Dataset

from b2t.data.trials import spread_over_sessions


def of_sessions(*sizes):
    """Trials of sessions `day0`, `day1` … of these sizes, one after the other."""
    names = [f"day{i}" for i, size in enumerate(sizes) for _ in range(size)]
    return Dataset.from_dict({"session": names})


def shares(dataset, limit):
    chosen = spread_over_sessions(dataset, limit)
    assert chosen == sorted(set(chosen)) and len(chosen) == min(limit, len(dataset))
    assert chosen == spread_over_sessions(dataset, limit)
    counted = Counter(dataset.select(chosen)["session"])
    return [counted[name] for name in dict.fromkeys(dataset["session"])]


def test_sessions_of_any_size_give_alike():
    assert shares(of_sessions(100, 3, 20), 12) == [4, 3, 5]
    assert shares(of_sessions(100, 30, 20), 12) == [4, 4, 4]
    assert shares(of_sessions(1, 1, 50), 10) == [1, 1, 8]


@pytest.mark.parametrize("seed", range(20))
def test_no_session_gives_more_than_one_above_another_that_has_some_left(seed):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 40, generator.integers(1, 12)).tolist()
    names = np.repeat([f"day{i}" for i in range(len(sizes))], sizes)
    dataset = Dataset.from_dict({"session": generator.permutation(names).tolist()})
    have = Counter(dataset["session"])
    for limit in (1, 2, len(names) // 2, len(names) - 1, len(names), 10**6):
        given = dict(zip(dict.fromkeys(dataset["session"]), shares(dataset, limit), strict=True))
        most = max(given.values())
        assert all(given[name] in (most, most - 1, have[name]) for name in have)


def test_fewer_than_sessions_come_from_the_whole_range_of_days():
    assert shares(of_sessions(*[5] * 9), 3) == [0, 1, 0, 0, 1, 0, 0, 1, 0]
    assert shares(of_sessions(*[5] * 4), 6) == [1, 2, 1, 2]


def test_a_session_gives_rows_of_its_whole_length():
    assert spread_over_sessions(of_sessions(100), 4) == [12, 37, 62, 87]


def test_all_rows_and_none():
    assert spread_over_sessions(of_sessions(2, 3), 5) == [0, 1, 2, 3, 4]
    assert spread_over_sessions(of_sessions(2, 3), 0) == []
    assert spread_over_sessions(of_sessions(), 3) == []


def test_rows_chosen_before_are_chosen_from():
    """A dataset that is itself a selection."""
    dataset = of_sessions(4, 4).select([7, 6, 5, 0])
    assert spread_over_sessions(dataset, 2) == [1, 3]
