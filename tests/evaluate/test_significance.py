import itertools

import numpy as np
import pytest

from b2t.evaluate import significance
from b2t.evaluate.metrics import EditCounts, count_edits
from b2t.evaluate.significance import compare_rates, compare_texts, permutation_p_value


def test_permutations_are_those_of_all_pairings():
    """Against every one of the 120 pairings of five trials."""
    targets = ["a b", "c d e", "a c", "b", "e e d"]
    said = ["a b", "c d", "b c", "b a", "a a a"]
    table = [[int(count_edits([t], [s], "word").edits[0]) for s in said] for t in targets]
    own = sum(table[i][i] for i in range(5))
    orders = list(itertools.permutations(range(5)))
    share = np.mean([sum(table[i][j] for i, j in enumerate(o)) <= own for o in orders])
    found = permutation_p_value(targets, said, permutations=4000)
    assert found == pytest.approx(share, abs=0.02)
    assert found == permutation_p_value(targets, said, permutations=4000)


def test_a_decoder_that_hears_is_significant_and_one_that_guesses_is_not(monkeypatch):
    generator = np.random.default_rng(0)
    targets = [" ".join(generator.choice(list("abcdefgh"), 5)) for _ in range(60)]
    hears = [t if i % 2 else "a a a a a" for i, t in enumerate(targets)]
    assert permutation_p_value(targets, hears) == 1 / 2001
    assert permutation_p_value(targets, ["a b c d e"] * 60) == 1.0
    guesses = [
        permutation_p_value(targets, list(generator.permutation(targets)), 200, i)
        for i in range(40)
    ]
    assert 0.2 < np.mean(guesses) < 0.8 and np.mean(np.array(guesses) < 0.05) < 0.2
    assert permutation_p_value(["a"], ["a"]) is None
    monkeypatch.setattr(significance, "ROWS", 20)
    assert permutation_p_value(targets, hears) < 0.01


def test_a_difference_is_that_of_the_pairs():
    """The sign-flip test against all 256 flips of eight trials; the bootstrap's bounds enclose."""
    generator = np.random.default_rng(1)
    lengths = generator.integers(3, 9, 8)
    a = EditCounts(generator.integers(0, 4, 8), lengths)
    b = EditCounts(np.maximum(a.edits - generator.integers(0, 3, 8), 0), lengths)
    found = compare_rates(a, b)
    gap = b.edits - a.edits
    flips = [abs(np.dot(gap, signs)) for signs in itertools.product((-1, 1), repeat=8)]
    assert found.p == pytest.approx(np.mean(np.array(flips) >= abs(gap.sum())), abs=0.02)
    assert found.difference == pytest.approx(b.rate() - a.rate())
    assert found.interval[0] < found.difference < found.interval[1] <= 0


def test_the_interval_is_that_of_all_resamples_of_five_trials():
    """Against the 95 % of all 3,125 ways to draw five trials of unequal length."""
    lengths, gap = np.array([2, 3, 5, 9, 30]), np.array([2, -1, 3, -4, 6])
    a = EditCounts(np.full(5, 5), lengths)
    b = EditCounts(a.edits + gap, lengths)
    drawn = np.array(list(itertools.product(range(5), repeat=5)))
    differences = gap[drawn].sum(1) / lengths[drawn].sum(1)
    found = compare_rates(a, b)
    assert found.interval == pytest.approx(np.quantile(differences, [0.025, 0.975]), abs=0.01)


def test_equal_decoders_do_not_differ_and_unequal_targets_are_refused():
    texts = ["a b c", "d e"]
    same = compare_texts(texts, texts, texts)
    assert (same.difference, same.p, same.interval) == (0.0, 1.0, (0.0, 0.0))
    with pytest.raises(ValueError, match="same targets"):
        compare_rates(count_edits(["a"], ["a"], "word"), count_edits(["a b"], ["a"], "word"))
    with pytest.raises(ValueError, match="no target"):
        compare_texts([""], ["a"], ["b"])
