"""Each defect is planted into a sound dataset, and it alone is found, where it is."""

import numpy as np
import pytest

from b2t.evaluate.audit import NOTE, AuditOptions, Subject, audit, is_clean, verdict
from b2t.evaluate.audit.channels import look_at
from b2t.evaluate.audit.labels import Patches, frames_needed, largest_patch
from b2t.evaluate.audit.overlap import common_bins
from b2t.evaluate.audit.swapped import swaps
from b2t.model.patches import num_patches
from tests.evaluate.audit_data import BINS, NAMES, RATE, look, of_session, row, sound_rows


def dead(rows):
    for each in of_session(rows, "day1"):
        each["signal"][:, 3] = 0.0


def stuck(rows):
    row(rows, "day2", trial=4)["signal"][100:220, 7] = 0.25


def clipping(rows):
    for each in of_session(rows, "day0"):
        np.clip(each["signal"][:, 5], -0.8, 0.8, out=each["signal"][:, 5])


def swapped(rows):
    for each in of_session(rows, "day1"):
        each["signal"][:, [2, 11]] = each["signal"][:, [11, 2]]


def not_finite(rows):
    row(rows, "day1", "val", 1)["signal"][17, 4] = np.nan
    row(rows, "day2", "test", 0)["signal"][3, 9] = -np.inf


def outlier(rows):
    row(rows, "day0", trial=2)["signal"][40, 6] = 300.0


def loud(rows):
    row(rows, "day0", trial=3)["signal"] *= 30.0


def hum(rows):
    for number, each in enumerate(of_session(rows, "day2")):
        phase = 2 * np.pi * (50 * np.arange(BINS) / RATE + number / 7)
        each["signal"][:, 1] += np.sin(phase).astype("f4")


def units(rows):
    for each in of_session(rows, "day1"):
        each["signal"] *= 1e6


def copied_between(rows):
    row(rows, "day0", "val", 1)["signal"] = row(rows, "day0", trial=5)["signal"] * 3 + 1


def copied_within(rows):
    row(rows, "day2", trial=1)["signal"] = row(rows, "day0", trial=5)["signal"].copy()


def shifted_between(rows):
    shared = row(rows, "day0", trial=5)["signal"][70:270]
    row(rows, "day2", "test", 0)["signal"][10:210] = shared


def long_label(rows):
    row(rows, "day0", trial=1)["phonemes"] = [7] * 161


def lost_letter(rows):
    row(rows, "day0", trial=1)["text"] = "caf\ufffd noir"


def special_token(rows):
    row(rows, "day1", "test", 1)["text"] = "say </s> now"


def named_twice(rows):
    row(rows, "day1", "train", 4)["trial"] = 3


def said_in_training(rows):
    row(rows, "day1", "test", 1)["text"] = row(rows, "day0", trial=1)["text"]


PLANTED = {
    dead: ("dead channels", "day1: E3"),
    stuck: ("constant", "day2, E7: stands still for 120 of 320 bins of day2/1/4"),
    clipping: ("clipping", "day0, E5"),
    swapped: ("swapped channels", "day1: E2 and E11"),
    not_finite: ("numbers", "day1/2/1 (val): 1 values, first channel E4, bin 17"),
    outlier: ("outliers", "in day0/1/2, bin 40"),
    loud: ("outliers", "day0, most channels: 30 times as loud in day0/1/3"),
    hum: ("line noise", "day2, 50 Hz: E1"),
    units: ("units", "day1, all: "),
    copied_between: ("shared signals", "day0/2/1 (val) and day0/1/5 (train): the same 320 bins"),
    copied_within: ("shared signals", "day2/1/1 (train) and day0/1/5 (train): the same 320 bins"),
    shifted_between: ("shared signals", "day2/3/0 (test) and day0/1/5 (train): 200 bins"),
    long_label: ("CTC frames", "day0/1/1 (train): 320 frames, 321 needed"),
    lost_letter: ("texts", "day0/1/1 (train), “caf\ufffd noir”: holds U+FFFD"),
    special_token: ("texts", "day1/3/1 (test), “say </s> now”: comes back from its tokens as"),
    said_in_training: ("sentences", "aaa bbb"),
    named_twice: ("trial names", "day1/1/3 (train): 2 trials"),
}


@pytest.mark.parametrize("unit", ["z-score", None])
def test_a_sound_dataset_has_no_findings(unit):
    for seed in range(3):
        found = look(sound_rows(seed), unit, patches=Patches(8, 4))
        assert is_clean(found.findings) and verdict(found.findings) == "no findings"
        assert found.trials == 30


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_defect_is_found_alone_and_where_it_is(plant):
    rows = sound_rows()
    plant(rows)
    bad = [finding for finding in look(rows).findings if finding.level != NOTE]
    check, example = PLANTED[plant]
    assert [finding.check for finding in bad] == [check], bad
    (finding,) = bad
    places = finding.numbers.get("places", [])
    assert len(places) == (2 if plant is not_finite else 1) or plant is said_in_training
    assert any(example in shown for shown in finding.examples), finding.examples
    assert finding.remedy


def test_units_are_those_that_brains_have():
    assert is_clean(look(sound_rows(unit=3e-5), "z-score").findings) is False
    for unit, scale, said in (
        ("V", 30.0, "30 V, as no brain signal does"),
        ("V", 3e-5, "the presets are made for z-scores"),
        (None, 400.0, "the presets are made for z-scores"),
    ):
        found = look(sound_rows(unit=scale), unit).findings
        (bad,) = [finding for finding in found if finding.level != NOTE]
        assert bad.check == "units" and said in bad.examples[0]
    rows = sound_rows()
    for each in of_session(rows, "day2"):
        each["signal"][:, 9] *= 1e6
    (bad,) = [f for f in look(rows, None).findings if f.level != NOTE]
    assert bad.check == "units" and bad.examples[0].startswith("day2, E9: moves 1,0")


def test_counts_of_quiet_electrodes_are_no_defect():
    generator = np.random.default_rng(0)
    rows = sound_rows()
    rates = generator.uniform(0.02, 2.0, len(NAMES))
    for each in rows:
        counts = generator.poisson(rates, (BINS, len(NAMES)))
        each["signal"] = ((counts - rates) / np.sqrt(rates)).astype("f4")
    bad = [finding.check for finding in look(rows).findings if finding.level != NOTE]
    assert bad == []


def test_overlap_that_was_asked_for_is_a_note_within_a_split_alone():
    from tests.evaluate.audit_data import as_splits

    rows = sound_rows()
    row(rows, "day0", trial=5)["signal"][: BINS // 2] = row(rows, "day0", trial=4)["signal"][
        BINS // 2 :
    ]
    subject = Subject(as_splits(rows), NAMES, RATE, "z-score", overlap=0.5)
    assert is_clean(audit(subject, AuditOptions()).findings)
    copied_between(rows)
    subject = Subject(as_splits(rows), NAMES, RATE, "z-score", overlap=0.5)
    bad = [f for f in audit(subject, AuditOptions()).findings if f.level != NOTE]
    assert [f.check for f in bad] == ["shared signals"] and bad[0].level == "critical"


def test_one_split_is_compared_with_nothing_and_still_with_itself():
    from tests.evaluate.audit_data import as_splits

    rows = sound_rows()
    copied_within(rows)
    subject = Subject({"train": as_splits(rows)["train"]}, NAMES, RATE, "z-score")
    said = [f.text for f in audit(subject, AuditOptions()).findings if f.check == "shared signals"]
    assert said == [
        "train is the only split: nothing to compare it with",
        "1 pairs of trials of one split share a signal",
    ]


def test_channels_that_are_known_to_rest_are_not_found_again():
    from tests.evaluate.audit_data import as_splits

    rows = sound_rows()
    dead(rows)
    for record, found in (
        ({"processing": {"bad_channels": ["E3"]}}, True),
        ({"missing_channels": {"day1": ["E3"]}}, False),
        ({"processing": None}, False),
    ):
        subject = Subject.of(as_splits(rows), len(NAMES), RATE, {"channels": NAMES, **record})
        assert is_clean(audit(subject, AuditOptions()).findings) is found
    for each in of_session(rows, "day1"):
        each["session"] = "one:day1"
    record = {"channels": NAMES, "missing_channels": {"one": ["E3"]}}
    subject = Subject.of(as_splits(rows), len(NAMES), RATE, record)
    assert is_clean(audit(subject, AuditOptions()).findings)


def test_common_bins_are_counted_and_likeness_is_not_enough():
    generator = np.random.default_rng(1)
    one, other = generator.standard_normal((2, 100, 40)).astype("f4")
    assert common_bins(one, other, 0, 16) == 0
    other[5:45] = 2 * one[50:90] - 1
    assert common_bins(one, other, 45, 16) == 40
    assert common_bins(other, one, -45, 16) == 40
    assert common_bins(one, other, 44, 16) == 0
    other[5:45] = np.sign(one[50:90]) * np.abs(one[50:90]) ** 3  # the same ups and downs
    assert common_bins(one, other, 45, 16) == 0


def test_frames_are_those_of_a_brute_force():
    assert frames_needed([1, 2, 2, 2, 3]) == 7 and frames_needed([4]) == 1
    for bins in range(1, 40):
        for needed in range(1, 12):
            fits = [p for p in range(1, bins + 1) if num_patches(bins, p, p) >= needed]
            assert largest_patch(bins, needed) == max(fits, default=0), (bins, needed)
    rows = sound_rows()
    row(rows, "day0", trial=1)["phonemes"] = [1, 2] * 20
    (bad,) = [f for f in look(rows, patches=Patches(10, 10)).findings if f.level != NOTE]
    assert "day0/1/1 (train): 32 frames, 40 needed" in bad.examples
    assert bad.numbers["places"][0]["fits"] == bad.numbers["patches"]["1.0"] == 8


def test_swaps_are_those_that_were_made():
    generator = np.random.default_rng(2)
    mixing = generator.standard_normal((6, 12))
    usual = np.corrcoef((generator.standard_normal((4000, 6)) @ mixing).T)
    order = np.arange(12)
    order[[1, 8]], order[[0, 5]] = [8, 1], [5, 0]
    again = np.corrcoef((generator.standard_normal((4000, 6)) @ mixing).T)[np.ix_(order, order)]
    assert sorted(swaps(again, usual)) == [(0, 5), (1, 8)]
    assert swaps(usual, usual) == []
    for seed in range(20):  # another head
        other = np.random.default_rng(seed).standard_normal((6, 12))
        other[:, seed % 12] *= 0.1
        noisy = generator.standard_normal((4000, 6)) @ other + generator.standard_normal((4000, 12))
        assert swaps(np.corrcoef(noisy.T), usual) == []


def test_numbers_of_a_trial_are_those_of_loops():
    generator = np.random.default_rng(3)
    signal = np.round(generator.standard_normal((50, 4)), 1).astype("f4")
    signal[10:20, 0] = 0.5
    signal[:, 1] = np.clip(signal[:, 1], -0.5, 0.5)
    signal[:, 2] = 1.0
    found = look_at(signal)
    for channel in range(4):
        values = signal[:, channel].tolist()
        low, high = min(values), max(values)
        runs, start = [], 0
        for end in range(1, 51):
            if end == 50 or values[end] != values[start]:
                runs.append((values[start], end - start))
                start = end
        inner = [n for value, n in runs if value not in (low, high) and n > 1]
        edge = [n for value, n in runs if value in (low, high) and n >= 3]
        assert found.still[channel] == (50 if low == high else max(inner, default=0))
        assert found.clipped[channel] == (0 if low == high else sum(edge))
        away = np.abs(signal[:, channel] - sorted(values)[round(0.5 * 49)])
        assert found.farthest[channel] == away.max() == away[found.place[channel]]
