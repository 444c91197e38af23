"""Who stays together in a split, and who is held out of training."""

from dataclasses import replace

import numpy as np
import pytest

from b2t.data import inspect_command
from b2t.data.dataset import load_trials
from b2t.data.prepare import PrepareOptions, assign_splits
from b2t.data.prepare.splits import GROUPS
from b2t.errors import UserError
from tests.data.test_prepare import Memory, run
from tests.data.test_sources_arrays import signal, table
from tests.evaluate.saved_runs import call


def source(count=120, splits=None):
    """Trials of 4 subjects, 8 sessions, 16 blocks, 30 sentences."""
    made = Memory(count, texts=[f"sentence {n}" for n in range(30)], splits=splits)
    made.trials = [
        replace(info, subject=f"s{n % 4}", session=f"s{n % 4}-d{n % 8}", block=n % 16 // 8)
        for n, info in enumerate(made.trials)
    ]
    return made


def groups_of(made, splits, kind):
    return {
        split: {
            GROUPS[kind](info)
            for info, found in zip(made.trials, splits, strict=True)
            if found == split
        }
        for split in ("train", "val", "test")
    }


@pytest.mark.parametrize("kind", ["session", "block", "subject", "sentence"])
@pytest.mark.parametrize("own", [None, ["train", "val", "test"]])
def test_no_group_is_divided_and_no_split_stays_empty(kind, own):
    for seed in range(5):
        made = source(splits=own)
        options = PrepareOptions(split_by=kind, seed=seed)
        splits = assign_splits(made, options)
        found = groups_of(made, splits, kind)
        assert all(found.values())
        assert sum(map(len, found.values())) == len(set().union(*found.values()))
        assert splits == assign_splits(made, options)
    assert splits.count("train") >= 60


def test_who_is_held_out_is_the_test_split_alone():
    made = source()
    splits = assign_splits(made, PrepareOptions(split_by="subject", hold_out=("s2",)))
    assert [info.subject == "s2" for info in made.trials] == [split == "test" for split in splits]
    assert splits.count("val") == 10 and splits.count("train") == 80
    two = PrepareOptions(split_by="block", hold_out=("s0-d0/1", "s1-d5/0"))
    splits = assign_splits(made, two)
    assert groups_of(made, splits, "block")["test"] == {"s0-d0/1", "s1-d5/0"}
    said = PrepareOptions(split_by="sentence", hold_out=("  Sentence  3",), disjoint_text=True)
    splits = assign_splits(made, said)
    found = groups_of(made, splits, "sentence")
    assert found["test"] == {"sentence 3"} and not found["train"] & found["val"]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"split_by": "subject", "hold_out": ("x",)},
            "--hold-out x: no subject is called so.*s0, s1",
        ),
        ({"hold_out": ("s1",)}, "--hold-out needs --split-by"),
        ({"split_by": "session", "disjoint_text": True}, "exclude each other"),
    ],
)
def test_what_cannot_be_met(options, message):
    with pytest.raises(UserError, match=message):
        assign_splits(source(), PrepareOptions(**options))


def test_groups_that_are_too_few_and_splits_of_the_release():
    with pytest.raises(UserError, match=r"2 of them \(day0, day1\) cannot fill train, val, test"):
        assign_splits(Memory(20), PrepareOptions(split_by="session"))
    assert set(
        assign_splits(Memory(20), PrepareOptions(split_by="session", fractions=(0.5, 0.5, 0)))
    ) == {
        "train",
        "val",
    }
    with pytest.raises(UserError, match="made, trial 2 is of the source's own test split"):
        assign_splits(
            source(splits=["train", "val", "test"]),
            PrepareOptions(split_by="subject", hold_out=("s0",)),
        )


def test_recordings_stay_whole_from_the_command_to_the_dataset(tmp_path, capsys):
    folder = tmp_path / "recordings"
    folder.mkdir()
    for number in range(4):
        values = signal() + number * np.arange(1000)[:, None]
        (folder / f"r{number}.csv").write_text(table(values, time=np.arange(1000) / 100))
    run(folder, tmp_path / "whole", "--split-by", "session")
    counts = {s: len(load_trials(tmp_path / "whole", s)) for s in ("train", "val", "test")}
    assert sum(counts.values()) == 20 and all(count % 5 == 0 for count in counts.values())
    run(folder, tmp_path / "one", "--window", "1", "--split-by", "session", "--hold-out", "r2")
    one = {s: load_trials(tmp_path / "one", s) for s in ("train", "val", "test")}
    assert set(one["test"]["session"]) == {"r2"} and len(one["test"]) == 9
    assert set(one["train"]["session"]) == set(one["val"]["session"]) == {"r0", "r1", "r3"}
    capsys.readouterr()
    call(inspect_command, tmp_path / "one", "--no-plot")
    printed = capsys.readouterr().out
    assert "val: 3 of 3 sessions, 3 of 3 blocks, 3 of 3 subjects occur in training" in printed
    assert "test: 0 of 1 sessions, 0 of 1 blocks, 0 of 1 subjects occur in training" in printed
