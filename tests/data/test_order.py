"""Budgets of frames, stratified sessions and weights in the order of rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from b2t.data.augment import Augment
from b2t.data.batches import BatchPlan, Budget, evaluation_batches, train_batches
from b2t.data.trials import signal_lengths
from b2t.errors import UserError
from tests.data.test_batches import SESSIONS, Bytes, assert_same, take, trials


def t15_lengths(count: int = 8000) -> np.ndarray:
    """Bins of 20 ms like those of spoken sentences: most last 8 to 30 s."""
    drawn = np.random.default_rng(0).lognormal(np.log(750), 0.4, count)
    return np.clip(drawn, 150, 2500).astype(int)


def micro_batches(plan, epoch=0, rank=0, world=1, accumulation=4, phase=0, seed=0):
    for position in range(plan.steps(seed, phase, epoch)):
        yield plan.micro_batches(
            seed, phase, epoch, position,
            micro_batch=1, accumulation=accumulation, rank=rank, world=world,
        )  # fmt: skip


def padding(lengths, batches):
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    return 1 - sum(lengths[batch].sum() for batch in batches) / padded


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 200),
    frames=st.integers(40, 400),
    trials=st.integers(1, 12),
    world=st.sampled_from([1, 2, 4]),
    seed=st.integers(0),
    sessions=st.sampled_from([None, 1, 3]),
)
def test_micro_batches_keep_to_the_budget_and_ranks_take_equally_many(
    rows, frames, trials, world, seed, sessions
):
    lengths = np.random.default_rng(1).integers(1, 41, rows)
    budget = Budget(frames, trials, 4)
    strata = None if sessions is None else np.arange(rows) % sessions
    try:
        plan = BatchPlan(lengths, 4 * trials, group=3, budget=budget, sessions=strata)
    except UserError as error:
        assert "fewer than one global batch" in str(error)
        return
    taken = []
    for epoch in range(2):
        shares = [
            list(micro_batches(plan, epoch, rank, world, 4 // world, seed=seed))
            for rank in range(world)
        ]
        assert {len(step) for share in shares for step in share} == {4 // world}
        assert len({len(share) for share in shares}) == 1
        flat = [micro for share in shares for step in share for micro in step]
        for micro in flat:
            assert 1 <= len(micro) <= trials and len(micro) * lengths[micro].max() <= frames
        seen = np.concatenate(flat)
        assert len(set(seen.tolist())) == len(seen)
        left_out = rows - len(seen)
        assert left_out <= 3 * trials  # less than a global batch of micro-batches
        taken.append(sorted(map(tuple, flat)))
    again = BatchPlan(lengths, 4 * trials, group=3, budget=budget, sessions=strata)
    one = [m for step in micro_batches(again, 1, seed=seed) for m in step]
    assert sorted(map(tuple, one)) == taken[1]


@pytest.mark.parametrize("sessions", [None, 45])
@pytest.mark.parametrize("budget", [None, Budget(8000, 32, 8)])
def test_padding_stays_below_a_tenth_on_lengths_like_t15(sessions, budget):
    lengths = t15_lengths()
    strata = None if sessions is None else np.arange(len(lengths)) % sessions
    plan = BatchPlan(lengths, 64, budget=budget, sessions=strata)
    if budget is None:
        cut = {"micro_batch": 8, "accumulation": 4, "world": 2}
        batches = [
            micro
            for position in range(len(plan))
            for rank in range(2)
            for micro in plan.micro_batches(0, 0, 0, position, rank=rank, **cut)
        ]
    else:
        batches = [micro for step in micro_batches(plan, accumulation=8) for micro in step]
        sizes = [len(micro) * lengths[micro].max() for micro in batches]
        assert np.mean(sizes) > 0.85 * budget.frames, "the budget is used"
    assert padding(lengths, batches) < 0.10
    assert sum(map(len, batches)) > 0.99 * len(lengths)


def test_a_trial_beyond_the_budget_is_named():
    with pytest.raises(UserError, match=r"data.max_frames=100.*has 120 bins"):
        BatchPlan(np.array([50, 120, 60]), 2, budget=Budget(100, 2, 1))


def test_stratified_batches_hold_every_session_in_its_share():
    lengths = t15_lengths(3200)
    sessions = np.random.default_rng(2).choice(4, len(lengths), p=[0.4, 0.3, 0.2, 0.1])
    spread = {}
    for name, strata in {"mixed": None, "stratified": sessions}.items():
        plan = BatchPlan(lengths, 40, sessions=strata)
        shares = [
            np.bincount(sessions[plan.rows(0, 0, 0, position)], minlength=4) / 40
            for position in range(len(plan))
        ]
        spread[name] = np.std(shares, axis=0).mean()
    assert spread["stratified"] < 0.7 * spread["mixed"]


@pytest.mark.parametrize("budget", [None, Budget(300, 8, 2)])
def test_weights_say_how_often_a_row_comes(budget):
    lengths = np.random.default_rng(0).integers(10, 40, 300)
    weights = np.repeat([1.0, 2.5, 0.2], 100)
    plan = BatchPlan(lengths, 8, weights=weights, budget=budget)
    counts = np.zeros(300)
    for epoch in range(10):
        rows = np.concatenate([plan.rows(0, 0, epoch, p) for p in range(plan.steps(0, 0, epoch))])
        assert len(set(rows.tolist())) == len(rows), "a row that comes twice has two numbers"
        counts += np.bincount(rows % 300, minlength=300)
    for first, weight in ((0, 1.0), (100, 2.5), (200, 0.2)):
        assert counts[first : first + 100].mean() / 10 == pytest.approx(weight, rel=0.05)
    assert (counts[200:] > 0).sum() > 70, "another part in each epoch"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_with_a_budget_goes_on_in_the_middle_of_an_epoch(workers):
    dataset = trials(60)
    lengths = signal_lengths(dataset)
    weights = np.full(60, 1.5)
    options = {"budget": Budget(200, 6, 2), "sessions": np.asarray(dataset["session"])}

    def stream(consumed, **more):
        plan = BatchPlan(lengths, 12, weights=weights, **options)
        epoch, position = plan.place(3, 1, consumed)
        return train_batches(
            dataset, plan, Bytes(), SESSIONS, Augment(), seed=3, phase=1,
            epoch=epoch, position=position, micro_batch=6, accumulation=2, **more,
        )  # fmt: skip

    whole = take(stream(0), 30)
    places = [(epoch, position) for epoch, position, _ in whole]
    assert places[-1][0] >= 2 and len(set(places)) == 30
    for consumed in (7, 19):
        resumed = take(stream(consumed, workers=workers), 5)
        for (*place, one), (*other, two) in zip(whole[consumed:], resumed, strict=False):
            assert place == other
            for first, second in zip(one, two, strict=True):
                assert_same(first, second)


def test_a_row_that_comes_twice_is_augmented_otherwise():
    dataset = trials(8)
    plan = BatchPlan(signal_lengths(dataset), 16, weights=np.full(8, 2.0))
    (step,) = take(
        train_batches(dataset, plan, Bytes(), SESSIONS, Augment(), seed=0, micro_batch=16), 1
    )
    batch = step[2][0].to("cpu")
    for name in set(batch.rows):
        first, second = (place for place, row in enumerate(batch.rows) if row == name)
        assert not np.array_equal(batch.signal[first], batch.signal[second])


def test_ranks_pad_to_neighbouring_lengths():
    """Of each stretch the longest trials go to different ranks."""
    lengths = np.random.default_rng(0).permutation(64) + 1
    plan = BatchPlan(lengths, 16, group=4)
    for position in range(4):
        cut = {"micro_batch": 4, "accumulation": 2, "world": 2}
        shares = [plan.micro_batches(0, 0, 0, position, rank=rank, **cut) for rank in range(2)]
        for pair in zip(*shares, strict=True):
            own = [max(lengths[rows]) for rows in pair]
            assert sorted(own) == sorted(lengths[np.concatenate(pair)])[-2:]


@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_takes_every_row_once_and_the_longest_first(world):
    lengths = np.random.default_rng(0).permutation(50) + 1
    shares = [evaluation_batches(lengths, 8, rank, world) for rank in range(world)]
    rows = np.concatenate([batch for share in shares for batch in share])
    assert sorted(rows) == list(range(50))
    for share in shares:
        assert max(map(len, share)) <= 8
        found = lengths[np.concatenate(share)]
        assert (np.diff(found) < 0).all()
