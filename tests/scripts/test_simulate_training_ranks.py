"""Four real ranks end with what one learns; each kind of difference is seen."""

import copy
import importlib

import numpy as np
import pytest
from safetensors.numpy import save_file


@pytest.fixture
def checks(repository, monkeypatch):
    monkeypatch.syspath_prepend(repository / "scripts")
    return importlib.import_module("many_ranks.checks")


@pytest.fixture
def simulate(checks):
    return importlib.import_module("simulate_training_ranks")


@pytest.fixture
def found():
    """Two ranks that share a weight of 6 elements and one of 3, with one element of padding."""
    shares = [
        [["a", 0, 0, 0, 5]],
        [["a", 0, 0, 5, 1], ["b", 0, 1, 0, 3]],
    ]
    return [
        {
            "rank": rank,
            "steps": [{"step": n, "codebooks": n, "state": f"s{n}"} for n in (1, 2)],
            "phases": {
                "joint": {"step": 2, "sizes": {"a": 6, "b": 3}, "parts": parts, "flats": [5]}
            },
        }
        for rank, parts in enumerate(shares)
    ]


@pytest.fixture
def left(found, tmp_path):
    """What the two ranks left: shards, and the checkpoint that they add up to."""
    a, b = np.arange(6, dtype=np.float32), np.arange(10, 13, dtype=np.float32)
    flats = [a[:5], np.concatenate([a[5:], b, [0]]).astype(np.float32)]
    kinds = {"master": "", "exp_avg": "/exp_avg", "exp_avg_sq": "/exp_avg_sq"}
    for rank, flat in enumerate(flats):
        shards = {f"{kind}/0": flat + n for n, kind in enumerate(kinds)}
        np.savez(tmp_path / f"shards-joint-{rank}.npz", **shards)
    whole = [
        {f"{name}{suffix}": value + np.float32(n) for name, value in (("a", a), ("b", b))}
        for n, suffix in enumerate(kinds.values())
    ]
    saved = tmp_path / "run" / "checkpoints" / "step-00000002"
    saved.mkdir(parents=True)
    save_file(whole[0], saved / "weights.safetensors")
    save_file(whole[1] | whole[2], saved / "moments.safetensors")
    return tmp_path


def test_a_rank_that_differs_is_seen(checks, found):
    assert checks.ranks_apart(found) == []
    found[1]["steps"][1]["codebooks"] += 1
    assert checks.ranks_apart(found) == ["step 2: codebooks of ranks [1] are not those of rank 0"]
    found[1]["steps"].pop()
    assert checks.ranks_apart(found) == ["ranks took [1, 2] steps"]


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (["a", 0, 0, 4, 1], "shards of a hold 6 elements, 5 of them in a row, of 6"),
        (["a", 0, 0, 5, 2], "shards of a hold 7 elements, 7 of them in a row, of 6"),
        (["c", 0, 0, 0, 1], "shards of c hold 1 elements, 1 of them in a row, of None"),
        (["a", 0, 2, 5, 1], "shards of rank 1 overlap in its tensor 0"),
    ],
)
def test_a_weight_that_is_not_held_exactly_once_is_seen(checks, found, part, says):
    assert checks.uncovered(found, "joint") == []
    found[1]["phases"]["joint"]["parts"][0] = part
    assert any(says in problem for problem in checks.uncovered(found, "joint"))


def test_a_checkpoint_that_is_not_the_shards_is_seen(checks, found, left):
    arguments = found, left, left / "run", "joint"
    assert checks.not_in_checkpoint(*arguments) == []
    moved = copy.deepcopy(found)
    moved[1]["phases"]["joint"]["parts"][1][2] = 2
    problems = checks.not_in_checkpoint(moved, *arguments[1:])
    assert [problem.split()[3] for problem in problems] == ["b", "b/exp_avg", "b/exp_avg_sq"]


def test_one_bit_more_is_seen(checks, left):
    run, other = left / "run", left / "other"
    saved = other / "checkpoints" / "step-00000002"
    saved.mkdir(parents=True)
    for name in ("weights", "moments"):
        source = run / "checkpoints" / "step-00000002" / f"{name}.safetensors"
        (saved / source.name).write_bytes(source.read_bytes())
    assert checks.not_bitwise(run, other, 2) == []
    values = checks.checkpoint(run, 2)
    values["a"][3] = np.nextafter(values["a"][3], np.float32(9))
    save_file({name: values[name] for name in ("a", "b")}, saved / "weights.safetensors")
    assert checks.not_bitwise(run, other, 2) == ["a"]
    assert 0 < checks.state_off(run, other, 2) < 1e-6


def test_growth_beyond_what_is_stated_is_seen(simulate):
    cost = {"start_cpu": 1.0, "step_cpu": 1.0, "private": 100.0}
    rows = [{"ranks": 4, **cost}, {"ranks": 64, **cost}, {"ranks": 1, **dict.fromkeys(cost, 0.0)}]
    assert simulate.grown(rows) == []
    rows[1] |= {"step_cpu": 7.1, "private": 159.0, "start_cpu": 3.9}
    assert simulate.grown(rows) == ["64 ranks: step_cpu 7.1, at most 7 allowed after 1 on 4"]
