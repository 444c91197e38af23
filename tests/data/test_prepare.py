"""Preparing: what is written, splits, normalisation, memory, refusals."""

import argparse
import hashlib
import json
import shutil
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from datasets import load_from_disk

from b2t.data import prepare_command
from b2t.data.prepare import PrepareOptions, assign_splits, prepare
from b2t.data.remarks import Remarks
from b2t.data.sources import detect
from b2t.data.sources.base import TrialInfo
from b2t.errors import UserError


class Memory:
    """A source of made trials: each signal a function of its index."""

    format = "made"
    simulated = False
    standardized = False
    unit = "mV"
    sampling_rate = 100.0
    own_splits = False

    def __init__(self, count=20, *, channels=3, texts=None, bad=(), bins=50, blocks=2, splits=None):
        self.channels = [f"c{index}" for index in range(channels)]
        self.bad = dict(bad)
        self.remarks = Remarks()
        self.bins = bins
        self.trials = [
            TrialInfo(
                name=f"made, trial {index}",
                session=f"day{index % blocks}",
                subject="m",
                block=0,
                trial=index,
                text=None if texts is None else texts[index % len(texts)],
                split=None if splits is None else splits[index % len(splits)],
            )
            for index in range(count)
        ]

    def read(self, index):
        generator = np.random.default_rng(index)
        signal = generator.standard_normal((self.bins + index % 7, len(self.channels)))
        signal = signal * [1, 100, 1e-6][: len(self.channels)] + 1000 * (index % 2)
        return self.bad[index](signal) if index in self.bad else signal


def with_nan(signal):
    signal[4, 1] = np.nan
    return signal


def run(*words):
    parser = argparse.ArgumentParser()
    prepare_command.add_arguments(parser)
    return prepare_command.run(parser.parse_args([str(word) for word in words]))


def test_a_t15_release_arrives_unchanged(t15_release, tmp_path, capsys):
    folder, written = t15_release(16)
    assert run(folder, tmp_path / "out") == 0
    assert "train 8, val 4, test 4 trials (t15)" in capsys.readouterr().out
    splits = load_from_disk(str(tmp_path / "out"))
    assert list(splits) == ["train", "val", "test"]
    seen = 0
    for split, trials in splits.with_format("numpy").items():
        for row in trials:
            signal, labels = written[row["session"], split, row["trial"]]
            assert row["signal"].dtype == np.float32
            np.testing.assert_array_equal(row["signal"], signal)
            assert row["text"] == labels.get("text")
            phonemes = None if row["phonemes"] is None else row["phonemes"].tolist()
            assert phonemes == labels.get("phonemes")
            assert (row["subject"], row["sampling_rate"], row["split"]) == ("t15", 50.0, split)
            seen += 1
    assert seen == len(written)
    record = json.loads((tmp_path / "out" / "b2t.json").read_text())
    assert record["normalization"] == "none" and record["z_scored"] and not record["simulated"]
    assert record["phonemes"][0] == "BLANK" and record["phonemes"][40] == "SIL"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_fingerprint_is_that_of_earlier_versions(t15_release, tmp_path, dtype):
    """Version 2 of it, spelt out: BLAKE2b over names, labels and XXH3 of what was stored."""
    folder, written = t15_release(16)
    run(folder, tmp_path / "out", "--dtype", dtype)
    parts = []
    for split in ("test", "train", "val"):
        total = hashlib.blake2b(digest_size=16)
        for (session, of, trial), (signal, labels) in sorted(written.items()):
            if of == split:
                name = f"{session}/{trial // 2}/{trial}"
                head = [name, labels.get("text"), labels.get("phonemes"), 50.0]
                stored = signal.astype(dtype).astype("<f4")
                total.update(json.dumps(head).encode())
                total.update(xxhash.xxh3_128_digest(stored.tobytes() + str(stored.shape).encode()))
        parts.append(total.hexdigest()[:12])
    record = json.loads((tmp_path / "out" / "b2t.json").read_text())
    assert record["fingerprint"] == "-".join(parts)


def test_a_release_without_a_test_split_has_none(t15_release, tmp_path):
    folder, _ = t15_release(8, (3, 1, 0))
    run(folder, tmp_path / "out")
    assert list(load_from_disk(str(tmp_path / "out"))) == ["train", "val"]


@pytest.mark.parametrize("skip", [False, True])
def test_blocks_are_z_scored_in_float64_and_bad_trials_do_not_count(tmp_path, skip):
    source = Memory(bad={3: with_nan} if skip else {})
    prepare(source, tmp_path / "out", PrepareOptions(skip_bad_trials=skip, statistics="all"))
    splits = load_from_disk(str(tmp_path / "out")).with_format("numpy")
    for block in range(2):
        kept = [index for index in range(block, 20, 2) if not (skip and index == 3)]
        signals = {index: source.read(index) for index in kept}
        whole = np.concatenate(list(signals.values()))
        found = {
            int(row["trial"]): row["signal"]
            for trials in splits.values()
            for row in trials
            if row["session"] == f"day{block}"
        }
        assert sorted(found) == kept
        for index, signal in signals.items():
            expected = (signal - whole.mean(axis=0)) / whole.std(axis=0)
            np.testing.assert_allclose(found[index][:, :2], expected[:, :2], atol=1e-4)


def test_a_channel_that_never_moves_becomes_zero(tmp_path, caplog):
    def still(signal):
        signal[:, 0] = 7.25
        return signal

    source = Memory(bad=dict.fromkeys(range(20), still))
    with caplog.at_level("WARNING", logger="b2t"):
        prepare(source, tmp_path / "out", PrepareOptions())
    assert "1 channel without any movement (c0)" in caplog.text
    splits = load_from_disk(str(tmp_path / "out")).with_format("numpy")
    assert all(not row["signal"][:, 0].any() for trials in splits.values() for row in trials)


def test_normalize_none_keeps_the_unit(tmp_path):
    source = Memory()
    prepare(source, tmp_path / "out", PrepareOptions(normalize="none"))
    row = load_from_disk(str(tmp_path / "out"))["train"].with_format("numpy")[2]
    np.testing.assert_array_equal(row["signal"], source.read(int(row["trial"])).astype(np.float32))


def test_shares_of_a_random_split():
    source = Memory(200)
    splits = assign_splits(source, PrepareOptions())
    assert [splits.count(split) for split in ("train", "val", "test")] == [160, 20, 20]
    assert splits == assign_splits(source, PrepareOptions())
    assert splits != assign_splits(source, PrepareOptions(seed=1))
    assert set(splits[:100]) == set(splits[100:]) == {"train", "val", "test"}


def test_splits_of_the_source_are_kept():
    splits = assign_splits(Memory(9, splits=["val", "train", "train"]), PrepareOptions())
    assert splits == ["val", "train", "train"] * 3


def test_disjoint_texts_are_never_shared_between_splits():
    texts = [f"Sentence {index % 30}" + ("." if index % 2 else "") for index in range(61)]
    texts[5] = "  sentence   5."
    source = Memory(122, texts=texts)
    splits = assign_splits(source, PrepareOptions(disjoint_text=True))
    found = {"train": set(), "val": set(), "test": set()}
    for info, split in zip(source.trials, splits, strict=True):
        found[split].add(" ".join(info.text.lower().split()))
    assert not found["train"] & found["val"] and not found["train"] & found["test"]
    assert not found["val"] & found["test"] and all(found.values())
    mixed = assign_splits(source, PrepareOptions())
    assert {
        info.text for info, split in zip(source.trials, mixed, strict=True) if split == "val"
    } & {info.text for info, split in zip(source.trials, mixed, strict=True) if split == "train"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (with_nan, "made, trial 3 holds nan at bin 4, channel 1"),
        (lambda signal: signal[:0], "made, trial 3 has no time bins"),
        (lambda signal: signal / 0, "made, trial 3 holds -?inf at bin 0"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_bad_trials_are_refused_by_name_or_left_out(tmp_path, damage, message):
    source = Memory(bad={3: damage})
    for normalize in ("block", "none"):
        with pytest.raises(UserError, match=message):
            prepare(source, tmp_path / "out", PrepareOptions(normalize=normalize))
    assert list(tmp_path.iterdir()) == []
    content = prepare(source, tmp_path / "out", PrepareOptions(skip_bad_trials=True))
    assert content["skipped"] == 1 and sum(content["rows"].values()) == 19


def test_a_session_copied_twice_is_refused_or_left_out(t15_release, tmp_path, caplog):
    folder, written = t15_release(8)
    day = folder / "hdf5_data_final" / "t15.2023.08.11"
    shutil.copytree(day, day.with_name("t15.2023.08.11 (copy)"))
    with pytest.raises(UserError, match=r"copy\).*and .*are both trial t15\.2023\.08\.11/0/0"):
        prepare(detect(folder), tmp_path / "out", PrepareOptions())
    content = prepare(detect(folder), tmp_path / "out", PrepareOptions(skip_bad_trials=True))
    assert sum(content["rows"].values()) == len(written) and content["skipped"] == 8


def test_a_test_split_equal_to_train_is_refused(t15_release, tmp_path):
    folder, _ = t15_release(8, (4, 2, 4))
    for test in folder.rglob("data_test.hdf5"):
        shutil.copy(test.with_name("data_train.hdf5"), test)
    with pytest.raises(UserError, match=r"data_test.* \(test\) has the signal of .* \(train\)"):
        prepare(detect(folder), tmp_path / "out", PrepareOptions())


def test_one_recording_under_two_names_is_counted(tmp_path, caplog):
    source = Memory(splits=["train", "val", "test", "train"])
    source.bad = {index: lambda signal: source.read(0) for index in (4, 8)}
    with caplog.at_level("WARNING", logger="b2t"):
        prepare(source, tmp_path / "out", PrepareOptions())
    assert "2 trials, the first made, trial 4: has the same signal as another" in caplog.text


def test_z_scores_that_cannot_be_are_counted(tmp_path, caplog):
    source = Memory(bad={3: lambda signal: signal + 2e4 * np.eye(*signal.shape)})
    source.standardized = True
    with caplog.at_level("WARNING", logger="b2t"):
        prepare(source, tmp_path / "out", PrepareOptions())
    assert "made, trial 3: lies more than 10000 standard deviations from the mean" in caplog.text


def test_memory_does_not_grow_with_the_data(tmp_path):
    class Watched(Memory):
        def __init__(self, count):
            super().__init__(count, bins=5_000)
            self.highest = 0

        def read(self, index):
            used = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - self.start
            self.highest = max(self.highest, used)
            return super().read(index)

    peaks = []
    for count in (160, 640):
        source = Watched(count)
        tracemalloc.start()
        source.start = pa.total_allocated_bytes()
        prepare(source, tmp_path / str(count), PrepareOptions())
        tracemalloc.stop()
        peaks.append(source.highest)
    written = 640 * 5_000 * 3 * 4
    # One batch more may be on its way to the disk, as it happens; the data are four times as much.
    assert peaks[1] < 2 * peaks[0]
    assert peaks[1] < written / 5


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    def fingerprint(name, source, **options):
        return prepare(source, tmp_path / name, PrepareOptions(**options))["fingerprint"]

    reference = fingerprint("a", Memory())
    assert fingerprint("b", Memory()) == reference
    changed = [
        fingerprint("c", Memory(), seed=1),
        fingerprint("d", Memory(), normalize="none"),
        fingerprint("e", Memory(bad={0: lambda signal: signal + np.eye(*signal.shape)})),
        fingerprint("f", Memory(texts=["a"])),
    ]
    assert len({reference, *changed}) == 5


def test_an_existing_folder_is_not_lost(tmp_path):
    out = tmp_path / "out"
    prepare(Memory(), out, PrepareOptions())
    with pytest.raises(UserError, match="--overwrite"):
        prepare(Memory(), out, PrepareOptions())
    prepare(Memory(30), out, PrepareOptions(overwrite=True))
    assert sum(map(len, load_from_disk(str(out)).values())) == 30
    with pytest.raises(UserError, match="nan"):
        prepare(Memory(bad={0: with_nan}), out, PrepareOptions(overwrite=True))
    assert sum(map(len, load_from_disk(str(out)).values())) == 30
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="no prepared dataset"):
        prepare(Memory(), mine, PrepareOptions(overwrite=True))
    assert (mine / "thesis.tex").exists()


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"val split would be empty.*3 trials; the first is"):
        prepare(Memory(3), tmp_path / "out", PrepareOptions())
    prepare(Memory(3), tmp_path / "out", PrepareOptions(fractions=(1.0, 0.0, 0.0)))


@pytest.mark.parametrize(
    "split",
    ["0.8", "a/b/c", "0.8/0.1/0.2", "0/0.5/0.5", "1.2/-0.1/-0.1", "nan/0/0", "1/nan/0", "inf/0/0"],
)
def test_shares_that_make_no_sense(split):
    with pytest.raises(UserError, match=f"--split {split}: expected three shares"):
        prepare_command.parse_split(split)


def test_a_prepared_folder_is_no_source(tmp_path):
    prepare(Memory(), tmp_path / "out", PrepareOptions())
    with pytest.raises(UserError, match="prepared dataset already"):
        detect(tmp_path / "out")


def test_real_words(real_data, tmp_path, capfd):
    pytest.importorskip("mne")
    out = tmp_path / "words"
    run(
        real_data / "wordpair",
        out,
        "--text-column",
        "association",
        "--disjoint-text",
        "--statistics",
        "all",
    )
    printed = capfd.readouterr()
    assert "train 160, val 20, test 20" in printed.out and "\n" not in printed.err.strip()
    splits = load_from_disk(str(out)).with_format("numpy")
    texts = {split: set(trials["text"]) for split, trials in splits.items()}
    assert not texts["train"] & (texts["val"] | texts["test"])
    signals = np.concatenate([row["signal"] for trials in splits.values() for row in trials])
    np.testing.assert_allclose(signals.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(signals.std(axis=0), 1, atol=1e-4)


def test_real_continuous_eeg(real_data, tmp_path, capfd):
    pytest.importorskip("mne")
    words = ["--window", 1, "--overlap", 0.5, "--resample", 128]
    run(real_data / "p300_fif", tmp_path / "eeg", *words)
    assert "14 channels at 128 Hz, z-scored per block" in capfd.readouterr().out
    splits = load_from_disk(str(tmp_path / "eeg")).with_format("numpy")
    for trials in splits.values():
        assert {len(row["signal"]) for row in trials} == {128}
        assert len(set(trials["session"])) == 3 and set(trials["text"]) == {None}
