import itertools
import json

import numpy as np
import pytest

from b2t.errors import UserError
from b2t.evaluate import audit_command
from b2t.evaluate.audit import CRITICAL, NOTE, WARNING, shared_sentences
from b2t.evaluate.audit.sentences import nearest_sentences
from tests.evaluate.audit_data import row, save, sound_rows
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
    sentences = [each for each in record["findings"] if each["check"] == "sentences"]
    pairs = [tuple(finding["numbers"]["splits"]) for finding in sentences]
    assert pairs == [("train", "val"), ("train", "test"), ("val", "test")]
    assert call(audit_command, data, "--strict") == 1
    bare = save_dataset(tmp_path / "bare", text=False)
    assert call(audit_command, bare, "--strict") == 0
    assert "has no text to compare" in capsys.readouterr().out


def test_a_bad_dataset_is_read_to_the_end_and_strict_says_so(tmp_path, capsys):
    rows = sound_rows()
    data = save(tmp_path / "sound", rows)
    assert call(audit_command, data, "--strict", "--plot", tmp_path / "a.png") == 0
    assert "verdict: no findings" in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    row(rows, "day1", "val", 1)["signal"][17, 4] = np.nan
    bad = save(tmp_path / "bad", rows)
    assert call(audit_command, bad, "--strict") == 1
    printed = capsys.readouterr().out
    assert "day1/2/1 (val): 1 values, first channel 4, bin 17" in printed
    assert "→ repair them" in printed and "verdict: critical: numbers" in printed
    assert call(audit_command, bad) == 0


def test_the_model_that_is_meant_decides_frames_and_tokens(tmp_path, capsys):
    rows = sound_rows()
    row(rows, "day0", trial=1)["phonemes"] = [1, 2] * 20
    data = save(tmp_path / "data", rows)
    model = [
        "--config",
        "demo",
        "model.text_decoder.tokenizer=byte",
        "model.encoder.patch_size=10",
        "model.encoder.patch_stride=10",
    ]
    assert call(audit_command, data, "--strict") == 0
    assert call(audit_command, data, "--strict", *model, "data.max_text_tokens=5") == 1
    printed = capsys.readouterr().out
    assert "verdict: warning: texts, CTC frames" in printed
    assert "takes 8 tokens, and data.max_text_tokens is 5" in printed
    assert "shorten model.encoder.patch_stride: 100 % of trials fit up to 8" in printed
    with pytest.raises(UserError, match=r"expected a name ending in \.png"):
        call(audit_command, data, "--plot", tmp_path / "a.txt")
