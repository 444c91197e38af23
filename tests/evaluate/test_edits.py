import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from b2t.evaluate.edits import details, edit_kinds, length_group, rates_by
from b2t.evaluate.metrics import EditCounts, count_edits

words = st.lists(st.sampled_from("abcd"), max_size=6).map(" ".join)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_kinds_add_up_to_the_edits_and_turn_targets_into_predictions(pairs):
    targets, said = [t for t, _ in pairs], [s for _, s in pairs]
    kinds = edit_kinds(targets, said)
    edits = count_edits(targets, said, "word")
    assert kinds.substitutions + kinds.deletions + kinds.insertions == edits.edits.sum()
    assert kinds.hits + kinds.substitutions + kinds.deletions == edits.lengths.sum()
    spoken = sum(len(s.split()) for s in said)
    assert kinds.hits + kinds.substitutions + kinds.insertions == spoken


def test_what_was_confused_left_out_and_added_is_named():
    targets = ["i see a cat", "a cat sat", "we see it now"]
    said = ["i see the cat", "the cat", "we see it now then"]
    kinds = edit_kinds(targets, said)
    assert kinds.confused == [("a", "the", 2)]
    assert kinds.deleted == [("sat", 1)] and kinds.inserted == [("then", 1)]
    assert kinds.shares() == {"substitutions": 2 / 11, "deletions": 1 / 11, "insertions": 1 / 11}


def test_groups_are_pooled_each_on_its_own():
    edits = EditCounts(np.array([1, 0, 3]), np.array([2, 4, 4]))
    found = rates_by(["b", "a", "b"], edits)
    assert found == {
        "a": {"rows": 1, "units": 4, "rate": 0.0},
        "b": {"rows": 2, "units": 6, "rate": 4 / 6},
    }
    assert list(found) == ["a", "b"]
    assert [length_group(" ".join("x" * n)) for n in (0, 1, 3, 4, 9, 10, 40)] == [
        *("00", "01-03", "01-03", "04-06", "07-09", "10+", "10+")
    ]
    by = details(["a b", "a b c d"], ["a b", "a b c"], ["s1", "s2"])
    assert by["by_session"]["s2"]["rate"] == 0.25 and by["by_length"]["01-03"]["rate"] == 0.0
