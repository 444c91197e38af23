import numpy as np

from b2t.data.batches import TrialRows, collate
from b2t.data.dataset import load_trials
from b2t.data.masking import Masking

MASKING = Masking(patch_stride=3, fraction=0.4, span=2)


def test_whole_spans_of_recorded_bins_are_hidden():
    mask = np.zeros(100, bool)
    mask[7:90] = True
    spans = {bin // 6 for bin in np.flatnonzero(mask)}
    seen = set()
    for epoch in range(30):  # until the spans at both ends, recorded in part, have come too
        hidden = MASKING(mask, 0, 1, epoch, "s/1/1")
        assert not hidden[~mask].any()
        chosen = {bin // 6 for bin in np.flatnonzero(hidden)}
        assert len(chosen) == round(0.4 * len(spans))
        for span in chosen:
            inside = slice(6 * span, 6 * span + 6)
            assert np.array_equal(hidden[inside], mask[inside])
        seen |= chosen
    assert seen == spans


def test_what_is_hidden_depends_on_row_and_time_alone():
    mask = np.ones(200, bool)
    found = MASKING(mask, 0, 1, 2, "s/1/1")
    assert np.array_equal(found, MASKING(mask, 0, 1, 2, "s/1/1"))
    for place in ((1, 1, 2, "s/1/1"), (0, 2, 2, "s/1/1"), (0, 1, 3, "s/1/1"), (0, 1, 2, "s/1/2")):
        assert not np.array_equal(found, MASKING(mask, *place))


def test_something_stays():
    for bins in range(1, 20):
        hidden = Masking(patch_stride=3, fraction=0.99, span=1)(np.ones(bins, bool), 0, 0, 0, "r")
        assert not hidden.all()
        assert hidden.any() == (bins > 3)


def test_batches_hide_the_same_of_a_row_whoever_is_beside_it(tiny_trials):
    trials = load_trials(tiny_trials, "train")
    rows = TrialRows(trials, None, ["day0", "day1"], seed=3, phase=1, masking=MASKING)
    together = collate([rows.example(5, row) for row in range(4)])
    assert together.counts()["hidden"] == float(together.hidden.sum()) * 6 > 0
    alone = collate([rows.example(5, 2)])
    bins = alone.hidden.shape[1]
    assert np.array_equal(together.hidden[2, :bins], alone.hidden[0])
    assert not together.hidden[2, bins:].any()
    assert not np.array_equal(rows.example(6, 2).hidden, rows.example(5, 2).hidden)
    assert np.array_equal(rows.example(None, 2).hidden, rows.example(None, 2).hidden)
    assert collate([TrialRows(trials, None, []).example(0, 0)]).hidden is None
