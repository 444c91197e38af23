import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from b2t.evaluate import metrics

words = st.lists(st.sampled_from(["a", "b", "cat", "don't", "x-ray"]), max_size=7)


def brute_force_distance(left, right):
    table = np.zeros((len(left) + 1, len(right) + 1), int)
    table[:, 0] = np.arange(len(left) + 1)
    table[0, :] = np.arange(len(right) + 1)
    for i, a in enumerate(left, 1):
        for j, b in enumerate(right, 1):
            table[i, j] = min(
                table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a != b)
            )
    return int(table[-1, -1])


@given(st.lists(st.tuples(words, words), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_edit_counts_equal_a_full_dynamic_programme(pairs):
    targets = [" ".join(t) for t, _ in pairs]
    predictions = [" ".join(p) for _, p in pairs]
    by_word = metrics.count_edits(targets, predictions, "word")
    by_character = metrics.count_edits(targets, predictions, "character")
    assert by_word.edits.tolist() == [brute_force_distance(t, p) for t, p in pairs]
    assert by_word.lengths.tolist() == [len(t) for t, _ in pairs]
    assert by_character.edits.tolist() == [
        brute_force_distance(t, p) for t, p in zip(targets, predictions, strict=True)
    ]
    assert by_character.lengths.tolist() == [len(t) for t in targets]


def test_known_answers_of_a_published_decoder(real_data):
    folder = real_data / "eval_t12"
    targets = (folder / "target_test.txt").read_text().splitlines()
    predictions = (folder / "model1_test.txt").read_text().splitlines()
    # Published on the texts as they are: "they 'll" counts as two words, which '25 joins.
    for unit, rate in (("word", 0.1171), ("character", 0.0849)):
        found = metrics.count_edits(targets, predictions, unit).rate()
        assert found == pytest.approx(rate, abs=5e-5)
    assert metrics.word_error_rate(targets, predictions) == pytest.approx(0.1163, abs=5e-5)
    assert metrics.bleu(targets, predictions) == pytest.approx(80.0, abs=0.05)
    assert metrics.rouge(targets, predictions)["rouge1"] == pytest.approx(88.0, abs=0.05)


def test_known_phoneme_error_rate_of_a_published_decoder(real_data):
    folder = real_data / "eval_t12"
    targets = json.loads((folder / "t12_true_phonemes_gru.json").read_text())
    predictions = json.loads((folder / "t12_decoded_phonemes_gru.json").read_text())
    assert metrics.phoneme_error_rate(targets, predictions) == pytest.approx(0.2166, abs=5e-5)


def test_rates_are_pooled_over_rows_not_averaged():
    targets, predictions = ["a", "a b c d e f g h i"], ["b", "a b c d e f g h i"]
    assert metrics.word_error_rate(targets, predictions) == pytest.approx(1 / 10)


@pytest.mark.parametrize(
    ("raw", "scored"),
    [
        ("Don’t  STOP!", "don't stop"),
        ("At 6 a.m. I paid $1,000.", "at 6 am i paid 1000"),
        ("x-ray, e.g. this_one", "x-ray eg thisone"),
        ("a well- known one", "a well known one"),
        ("stop--now", "stopnow"),
        ("stop-- now", "stop- now"),
        ("rock 'n' roll", "rock'n' roll"),
        ("no\tway\nout", "no way out"),
        ("  \n ", ""),
        ("Ça va — bien?", "ça va bien"),
        ("\uff21\uff22", "ab"),
    ],
)
def test_normalisation(raw, scored):
    assert metrics.normalise_text(raw) == scored


@given(st.text(alphabet="abAB '-.,!?;:\"()&", max_size=30))
@settings(max_examples=300, deadline=None)
def test_normalisation_is_that_of_the_benchmark_on_ascii_letters(raw):
    """Its rules, one after the other, as its source states them."""
    kept = "".join(c for c in raw if c.isascii() and (c.isalpha() or c in "- '"))
    kept = " ".join(kept.lower().split("- ")) if "- " in kept else kept.lower()
    kept = "".join(kept.split("--"))
    kept = "'".join(kept.split(" '"))
    assert metrics.normalise_text(raw) == " ".join(filter(None, kept.split(" ")))


def test_empty_prediction_is_all_deletions_and_empty_target_all_insertions():
    counts = metrics.count_edits(["a b", ""], ["", "c d e"], "word")
    assert counts.edits.tolist() == [2, 3]
    assert counts.lengths.tolist() == [2, 0]
    assert counts.rate() == 2.5


def test_no_text_has_no_score():
    assert metrics.word_error_rate([], []) is None
    assert metrics.bleu([], []) is None
    assert metrics.rouge([], []) == {}
    assert metrics.distinct_ratio([], []) is None
    assert metrics.exact_match([], []) is None
    assert metrics.count_edits([""], [""], "word").rate() is None
    assert metrics.count_edits([""], [""], "word").interval() is None


def test_unequal_lists_are_refused():
    with pytest.raises(ValueError, match="2 targets but 1 predictions"):
        metrics.word_error_rate(["a", "b"], ["a"])


def test_distinct_ratio_sees_a_decoder_that_ignores_its_input():
    targets = [f"sentence {i}" for i in range(50)]
    assert metrics.distinct_ratio(targets, ["the same"] * 50) == pytest.approx(1 / 50)
    assert metrics.distinct_ratio(targets, targets) == 1.0
    assert metrics.distinct_ratio(["One two!", "one two"], ["one two", "One, two"]) == 1.0


def test_interval_covers_the_truth_at_about_its_confidence():
    generator = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        lengths = np.full(60, 10)
        edits = generator.binomial(10, 0.3, 60)
        low, high = metrics.EditCounts(edits, lengths).interval(300, 0.9, seed=trial)
        covered += low <= 0.3 <= high
    assert 0.82 <= covered / 200 <= 0.97


def test_interval_is_the_same_for_the_same_seed():
    counts = metrics.EditCounts(np.arange(20), np.full(20, 25))
    assert counts.interval(seed=1) == counts.interval(seed=1)
    assert counts.interval(seed=1) != counts.interval(seed=2)
