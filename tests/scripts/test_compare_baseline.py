import json

import numpy as np
import pytest

from b2t.evaluate.metrics import EditCounts
from tests.script_modules import script


@pytest.fixture(scope="module")
def compare(repository):
    with script(repository, "compare_baseline") as module:
        yield module


def counts(edits):
    return EditCounts(np.array(edits), np.full(len(edits), 10))


def test_the_paired_interval_sees_what_trials_share(compare):
    """Half the edits on every trial is half on every draw; unpaired, trials would spread it."""
    generator = np.random.default_rng(1)
    one = generator.integers(1, 9, 60) * 2
    assert compare.paired(counts(one), counts(one // 2)) == pytest.approx((0.5, 0.5, 0.5))
    ratio, low, high = compare.paired(counts(one), counts(generator.permutation(one) // 2))
    assert ratio == 0.5 and low < 0.45 and high > 0.55


def test_edits_are_those_of_phonemes_and_of_words_read_from_them(compare, tmp_path):
    rows = [
        {
            "target": "Hello, you.",
            "lm_prediction": "hello too",
            "target_phonemes": [1, 40, 2],
            "phonemes": [1, 2, 3],
        },
        {"target": "no", "lm_prediction": "", "target_phonemes": [5], "phonemes": [5]},
    ]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = compare.edits(tmp_path)
    assert found["wer_lm"].edits.tolist() == [1, 1] and found["wer_lm"].lengths.tolist() == [2, 1]
    assert found["per"].edits.tolist() == [2, 0] and found["per"].lengths.tolist() == [3, 1]
