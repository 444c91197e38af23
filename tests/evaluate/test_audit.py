import itertools
import json

import pytest

from b2t.evaluate import audit_command
from b2t.evaluate.audit import CRITICAL, NOTE, WARNING, shared_sentences
from b2t.evaluate.audit.sentences import nearest_sentences
from tests.evaluate.saved_runs import call, save_dataset
from tests.evaluate.test_text_metrics import brute_force_distance

TRAIN = ["I am cold now.", "Call me a doctor, please!", "No."]


def test_shared_sentences_are_counted_over_trials():
    asked = ["i am cold now", "I am cold now!", "call me the doctor please", "We are here", "Yes."]
    (found,) = shared_sentences({"train": TRAIN, "test": asked}, 0.8)
    assert (found.numbers["exact"], found.numbers["near"], found.numbers["trials"]) == (2, 1, 5)
    assert found.level == CRITICAL and "2 of 5 trials of test (40.0 %)" in found.text
    assert "call me the doctor please ~ call me a doctor please" in found.examples
    (clean,) = shared_sentences({"train": TRAIN, "test": ["We are here"]})
    assert clean.level == NOTE and clean.examples == []
    (few,) = shared_sentences({"train": TRAIN, "test": ["No", "We are here", "Yes"]})
    assert few.level == WARNING


def test_the_nearest_sentence_is_that_of_all_distances():
    words = ["a", "b", "c"]
    known = [" ".join(w) for w in itertools.product(words, repeat=3)][::2]
    asked = [" ".join(w) for n in (1, 2, 4) for w in itertools.product(words, repeat=n)]
    found = nearest_sentences(known, asked, 0.5)
    for text in asked:
        near = max(
            1 - brute_force_distance(text.split(), k.split()) / max(len(text.split()), 3)
            for k in known
        )
        assert found[text][1] == (pytest.approx(near) if near >= 0.5 else 0.0), text


def test_every_pair_of_splits_is_compared_and_written(tmp_path, capsys):
    """Training says yes, no, water; val and test say these and "i am cold"."""
    data = save_dataset(tmp_path / "data")
    assert call(audit_command, data, "--out", tmp_path / "a.json") == 0
    printed = capsys.readouterr().out
    assert "3 of 4 trials of val (75.0 %) say a sentence of train" in printed
    record = json.loads((tmp_path / "a.json").read_text())
    pairs = [tuple(finding["numbers"]["splits"]) for finding in record["findings"]]
    assert pairs == [("train", "val"), ("train", "test"), ("val", "test")]
    assert call(audit_command, data, "--strict") == 1
    bare = save_dataset(tmp_path / "bare", text=False)
    assert call(audit_command, bare, "--strict") == 0
    assert "has no text to compare" in capsys.readouterr().out
