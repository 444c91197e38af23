"""Batches: order, sharing over ranks, collation, workers, errors."""

import os
import subprocess

import numpy as np
import psutil
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from b2t.data.augment import Augment
from b2t.data.batches import (
    Batch,
    BatchPlan,
    eval_batches,
    evaluation_batches,
    train_batches,
)
from b2t.data.batches.batch import Example, collate
from b2t.data.trials import signal_lengths, trial_features
from b2t.errors import UserError

SESSIONS = ["day0", "day1"]


class Bytes:
    """A tokenizer reduced to what is asked of it: ids of bytes, no eos of its own."""

    eos_token_id = 1

    def __call__(self, text_target):
        return {"input_ids": [[ord(letter) + 3 for letter in text] for text in text_target]}


def trials(count=24, channels=3, *, text=True, bad=None) -> Dataset:
    generator = np.random.default_rng(0)

    def rows():
        for index in range(count):
            signal = generator.standard_normal((5 + 7 * (index % 11), channels))
            if index == bad:
                signal[2, 1] = np.nan
            yield {
                "signal": signal.astype(np.float32),
                "text": "ab" * (index % 4) + "c" if text else None,
                "phonemes": list(range(1, 1 + index % 5)) or None,
                "session": f"day{index % 3}",
                "subject": "t",
                "block": 0,
                "trial": index,
                "sampling_rate": 50.0,
                "split": "train",
            }

    return Dataset.from_list(list(rows()), features=trial_features(channels))


def stream(dataset, plan, **options):
    defaults = {"seed": 3, "micro_batch": 4, "accumulation": 2}
    return train_batches(dataset, plan, Bytes(), SESSIONS, Augment(), **{**defaults, **options})


def take(iterator, count):
    taken = [next(iterator) for _ in range(count)]
    iterator.close()
    return taken


def assert_same(one: Batch, other: Batch):
    assert one.rows == other.rows and one.texts == other.texts
    for name, value in vars(one).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(other, name)), name


@settings(deadline=None, max_examples=50)
@given(
    rows=st.integers(1, 300), batch=st.integers(1, 40), group=st.integers(1, 5), seed=st.integers(0)
)
def test_an_epoch_holds_each_row_at_most_once_and_all_full_batches(rows, batch, group, seed):
    lengths = np.random.default_rng(0).integers(1, 500, rows)
    if rows < batch:
        with pytest.raises(UserError, match=f"{rows} rows.*{batch}"):
            BatchPlan(lengths, batch)
        return
    plan = BatchPlan(lengths, batch, group=group)
    taken = np.concatenate([plan.rows(seed, 0, 2, position) for position in range(len(plan))])
    assert len(taken) == rows // batch * batch
    assert len(set(taken.tolist())) == len(taken)


def test_batches_differ_by_seed_phase_and_epoch_and_repeat_otherwise():
    lengths = np.random.default_rng(0).integers(1, 500, 200)
    plan = BatchPlan(lengths, 8)
    reference = plan.rows(1, 2, 3, 4)
    np.testing.assert_array_equal(BatchPlan(lengths, 8).rows(1, 2, 3, 4), reference)
    for other in [(0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 5), (2, 1, 3, 4)]:
        assert sorted(plan.rows(*other)) != sorted(reference)


def test_rows_left_out_differ_from_epoch_to_epoch():
    plan = BatchPlan(np.arange(1, 11), 4)
    left = set()
    for epoch in range(20):
        taken = np.concatenate([plan.rows(0, 0, epoch, position) for position in range(len(plan))])
        left |= set(range(10)) - set(taken.tolist())
    assert left == set(range(10))


def test_rows_of_similar_length_share_a_batch_and_long_ones_come_at_any_time():
    lengths = np.random.default_rng(0).integers(50, 1000, 1280)
    plan = BatchPlan(lengths, 64)
    batches = [lengths[plan.rows(0, 0, 0, position)] for position in range(len(plan))]
    padding = 1 - sum(map(np.sum, batches)) / sum(len(batch) * batch.max() for batch in batches)
    assert padding < 0.06
    longest = [batch.max() for batch in batches]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


@pytest.mark.parametrize(("world", "micro"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_any_number_of_ranks_shares_the_same_global_batch(world, micro):
    plan = BatchPlan(np.arange(100), 24)
    place = (0, 0, 0, 1)
    cut = {"micro_batch": micro, "accumulation": 3, "world": world}
    shares = [plan.micro_batches(*place, rank=rank, **cut) for rank in range(world)]
    one_rank = plan.micro_batches(*place, micro_batch=8, accumulation=3)
    for index in range(3):
        together = np.concatenate([share[index] for share in shares])
        assert sorted(together) == sorted(one_rank[index])


def test_a_wrong_share_is_refused():
    plan = BatchPlan(np.arange(100), 24)
    with pytest.raises(ValueError, match="24"):
        plan.micro_batches(0, 0, 0, 0, micro_batch=5, accumulation=2)


@settings(deadline=None, max_examples=50)
@given(rows=st.integers(0, 60), batch=st.integers(1, 9), world=st.integers(1, 5))
def test_evaluation_reads_every_row_once(rows, batch, world):
    lengths = np.random.default_rng(0).integers(1, 50, rows)
    shares = [evaluation_batches(lengths, batch, rank, world) for rank in range(world)]
    read = [index for share in shares for part in share for index in part]
    assert sorted(read) == list(range(rows))
    assert all(0 < len(part) <= batch for share in shares for part in share)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_collation_pads_and_masks():
    dataset = trials()
    batch = next(eval_batches(dataset, Bytes(), SESSIONS, batch_size=24))
    assert batch.signal.shape == (24, 75, 3) and batch.signal.dtype == torch.float32
    source = dataset.with_format("numpy")
    for index, name in enumerate(batch.rows):
        row = source[int(name.split("/")[2])]
        bins = len(row["signal"])
        assert name == f"{row['session']}/0/{row['trial']}"
        assert batch.signal_mask[index].tolist() == [True] * bins + [False] * (75 - bins)
        np.testing.assert_array_equal(batch.signal[index, :bins], row["signal"])
        np.testing.assert_array_equal(batch.target[index], batch.signal[index])
        assert not batch.signal[index, bins:].any()
        expected = [*(ord(letter) + 3 for letter in str(row["text"])), 1]
        assert batch.tokens[index].tolist() == expected + [-100] * (8 - len(expected))
        count = int(row["trial"]) % 5
        assert batch.phonemes[index].tolist() == list(range(1, count + 1)) + [0] * (4 - count)
        assert batch.phoneme_lengths[index] == count
        assert batch.session[index] == {"day0": 0, "day1": 1, "day2": -1}[row["session"]]


def test_counts_are_those_of_the_rows_and_survive_a_move():
    dataset = trials()
    batch = next(eval_batches(dataset, Bytes(), SESSIONS, batch_size=24))
    assert batch.counts() == {
        "bins": 3.0 * sum(5 + 7 * (index % 11) for index in range(24)),
        "tokens": float(sum(2 * (index % 4) + 2 for index in range(24))),
        "phonemes": float(sum(index % 5 for index in range(24))),
        "rows": 24.0,
        "hidden": 0.0,
    }
    moved = batch.to("meta", torch.float16)
    assert moved.counts() == batch.counts()
    assert moved.signal.dtype == moved.target.dtype == torch.float16
    assert moved.signal_mask.dtype == torch.bool and moved.tokens.dtype == torch.int64


def test_row_ids_are_the_rows_own_and_move_with_the_batch():
    few, many = (next(eval_batches(trials(), Bytes(), SESSIONS, batch_size=n)) for n in (5, 24))
    ids = dict(zip(many.rows, many.row_ids.tolist(), strict=True))
    assert many.row_ids.dtype == torch.int64 and len(set(ids.values())) == 24
    assert few.row_ids.tolist() == [ids[row] for row in few.rows]
    assert many.to("meta").row_ids.is_meta


def test_rows_without_text_are_ignored_by_the_loss():
    batch = next(eval_batches(trials(text=False), Bytes(), SESSIONS, batch_size=4))
    assert batch.tokens.shape == (4, 1) and (batch.tokens == -100).all()
    assert batch.texts == [None] * 4 and batch.counts()["tokens"] == 0


def test_an_eos_of_the_tokenizer_is_not_doubled():
    class Framed(Bytes):
        def __call__(self, text_target):
            ids = super().__call__(text_target)["input_ids"]
            return {"input_ids": [[*text, self.eos_token_id] for text in ids]}

    framed = next(eval_batches(trials(), Framed(), SESSIONS, batch_size=24))
    plain = next(eval_batches(trials(), Bytes(), SESSIONS, batch_size=24))
    assert torch.equal(framed.tokens, plain.tokens)


def test_batches_do_not_depend_on_the_number_of_workers(monkeypatch, recwarn):
    dataset = trials()
    plan = BatchPlan(signal_lengths(dataset), 8)
    alone = take(stream(dataset, plan), 5)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    shared = take(stream(dataset, plan, workers=2), 5)
    assert not recwarn.list, "torch warns of more workers than cores, each rank in each phase"
    for (*place, one), (*other_place, other) in zip(alone, shared, strict=True):
        assert place == other_place
        for first, second in zip(one, other, strict=True):
            assert_same(first, second)


def test_resume_continues_with_the_same_batches():
    dataset = trials()
    plan = BatchPlan(signal_lengths(dataset), 8)
    whole = take(stream(dataset, plan), 8)
    assert [tuple(step[:2]) for step in whole[:4]] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    epoch, position = plan.following(3, 0, *whole[3][:2])
    resumed = take(stream(dataset, plan, epoch=epoch, position=position), 4)
    for (*place, one), (*other_place, other) in zip(whole[4:], resumed, strict=True):
        assert place == other_place
        for first, second in zip(one, other, strict=True):
            assert_same(first, second)


def test_two_ranks_read_what_one_rank_reads():
    dataset = trials()
    plan = BatchPlan(signal_lengths(dataset), 8)
    alone = take(stream(dataset, plan, micro_batch=4), 3)
    ranks = [take(stream(dataset, plan, micro_batch=2, rank=rank, world=2), 3) for rank in range(2)]
    for step, (_, _, one) in enumerate(alone):
        for micro in range(2):
            rows = {}
            for rank in ranks:
                batch = rank[step][2][micro].to("cpu")
                for index, name in enumerate(batch.rows):
                    rows[name] = batch.signal[index][batch.signal_mask[index]]
            whole = one[micro].to("cpu")
            assert sorted(rows) == sorted(whole.rows)
            for index, name in enumerate(whole.rows):
                assert torch.equal(whole.signal[index][whole.signal_mask[index]], rows[name])


def test_augmentation_differs_between_epochs():
    dataset = trials(8)
    plan = BatchPlan(signal_lengths(dataset), 8)
    steps = take(stream(dataset, plan, micro_batch=8, accumulation=1), 2)
    batches = [batch.to("cpu") for *_, [batch] in steps]
    first, second = (dict(zip(batch.rows, batch.signal, strict=True)) for batch in batches)
    assert all(not torch.equal(first[name], second[name]) for name in first)


def test_loading_leaves_the_random_state_of_the_model_alone():
    dataset = trials()
    plan = BatchPlan(signal_lengths(dataset), 8)
    state = torch.get_rng_state()
    take(stream(dataset, plan), 2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_nan_names_the_trial_bin_and_channel(workers):
    dataset = trials(bad=7)
    batches = eval_batches(dataset, Bytes(), SESSIONS, batch_size=4, workers=workers)
    with pytest.raises(UserError) as caught:
        list(batches)
    message = str(caught.value)
    assert "day1/0/7" in message and "bin 2, channel 1" in message and "\n" not in message


def test_collating_names_the_row_that_is_not_finite():
    def example(row, value, **known):
        signal, none = np.full((4, 2), value, np.float32), np.zeros(0, np.int64)
        return Example(signal, signal, np.ones(4, bool), 0, none, none, row, None, **known)

    with pytest.raises(UserError, match="trial s/0/1 "):
        collate([example("s/0/0", 1.0), example("s/0/1", np.inf)])
    assert len(collate([example("s/0/1", np.inf, checked=True)])) == 1


def test_an_empty_trial_is_named():
    dataset = trials(4)
    rows = [dict(dataset[index]) for index in range(4)]
    rows[2]["signal"] = []
    broken = Dataset.from_list(rows, features=trial_features(3))
    with pytest.raises(UserError, match="day2/0/2 has no time bins"):
        list(eval_batches(broken, Bytes(), SESSIONS, batch_size=4))


def test_long_text_is_refused_by_name():
    dataset = trials()
    with pytest.raises(UserError, match=r"day0/0/3.*8 tokens.*limit of 7 \(6 such rows\)"):
        next(eval_batches(dataset, Bytes(), SESSIONS, batch_size=4, max_tokens=7))
    next(eval_batches(dataset, Bytes(), SESSIONS, batch_size=4, max_tokens=8))


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = Bytes()
    tokenizer.eos_token_id = None
    with pytest.raises(UserError, match="eos"):
        next(eval_batches(trials(), tokenizer, SESSIONS, batch_size=4))


def test_a_real_tokenizer(tmp_path):
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    batch = next(eval_batches(trials(), tokenizer, SESSIONS, batch_size=24))
    for labels, text in zip(batch.tokens, batch.texts, strict=True):
        ids = labels[labels != -100]
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_workers_heed_their_parent_alone():
    """A launcher's SIGTERM reaches a rank and its workers; the rank still has to save."""
    dataset = trials()
    plan = BatchPlan(signal_lengths(dataset), 8)
    expected = take(stream(dataset, plan), 5)
    before = {child.pid for child in psutil.Process().children()}
    batches = stream(dataset, plan, workers=2)
    found = [next(batches)]
    workers = [c for c in psutil.Process().children() if c.pid not in before]
    assert len(workers) == 2
    for worker in workers:
        for name in ("TERM", "TERM", "INT", "USR1"):
            subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    found += [next(batches) for _ in range(4)]
    for (*_, one), (*_, other) in zip(found, expected, strict=True):
        for first, second in zip(one, other, strict=True):
            assert_same(first, second)
    assert all(worker.is_running() for worker in workers)
    workers[0].terminate()
    assert workers[0].wait(10) is not None, "its parent is heeded"
    batches.close()
    workers[1].wait(10)


def test_a_split_is_tokenized_once():
    """Validation after validation reads the same texts."""

    class Counting(Bytes):
        calls = 0

        def __call__(self, *args, **kwargs):
            Counting.calls += 1
            return super().__call__(*args, **kwargs)

    dataset, tokenizer = trials(), Counting()
    passes = [list(eval_batches(dataset, tokenizer, SESSIONS, batch_size=3)) for _ in range(3)]
    assert Counting.calls == 1
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(*passes[:2], strict=True))
    list(eval_batches(dataset, Counting(), SESSIONS, batch_size=3))
    assert Counting.calls == 2, "another tokenizer has other labels"
