"""What `b2t prepare` does to signals: statistics of training trials, filters, the same again."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import load_from_disk
from scipy import signal as filters

from b2t.data.dataset import dataset_info
from b2t.data.prepare import PrepareOptions, prepare
from b2t.data.prepare.blocks import ALL, read_statistics
from b2t.errors import UserError
from b2t.evaluate.raw_bins import RawBins
from tests.data.test_prepare import Memory, run

RATE = 100.0


def rows(folder) -> dict[int, tuple[str, np.ndarray]]:
    splits = load_from_disk(str(folder)).with_format("numpy")
    return {
        int(row["trial"]): (split, row["signal"])
        for split, trials in splits.items()
        for row in trials
    }


def loud(signal):
    return signal * 50 + 1e4


@pytest.mark.parametrize("by", ["block", "session"])
def test_statistics_are_those_of_training_trials_alone(tmp_path, by):
    splits = ["train", "val", "train", "test"]
    held_out = {index: loud for index in range(20) if splits[index % 4] != "train"}
    source = Memory(20, blocks=1, splits=splits, bad=held_out)
    prepare(source, tmp_path / "out", PrepareOptions(normalize=by))
    train = np.concatenate([source.read(i) for i in range(20) if splits[i % 4] == "train"])
    for index, (split, found) in rows(tmp_path / "out").items():
        assert split == splits[index % 4]
        expected = (source.read(index) - train.mean(0)) / train.std(0)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_a_block_without_training_trials_borrows_and_says_so(tmp_path, caplog):
    source = Memory(20, blocks=2, splits=["train", "val"])  # day1 is all held out
    source.own_splits = True
    with caplog.at_level("WARNING", logger="b2t"):
        prepare(source, tmp_path / "out", PrepareOptions())
    assert "1 of 2 blocks hold no training trial" in caplog.text
    train = np.concatenate([source.read(index) for index in range(0, 20, 2)])
    for index, (_, found) in rows(tmp_path / "out").items():
        expected = (source.read(index) - train.mean(0)) / train.std(0)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def recordings(folder, seconds=40.0, seed=0, count=2):
    folder.mkdir()
    generator = np.random.default_rng(seed)
    signals = {}
    for number in range(count):
        signal = generator.standard_normal((int(seconds * RATE), 3)).cumsum(0) + 100
        np.save(folder / f"day{number}.npy", signal.astype(np.float32))
        signals[f"day{number}"] = signal.astype(np.float32).astype(np.float64)
    return signals


def test_windows_are_filtered_with_what_lies_around_them(tmp_path):
    signals = recordings(tmp_path / "raw")
    run(
        tmp_path / "raw", tmp_path / "out", "--rate", 100, "--window", 1, "--normalize", "none",
        "--band-pass", "2,30", "--notch", "40", "--split", "1/0/0",
    )  # fmt: skip
    sections = np.concatenate(
        [
            filters.butter(4, [2, 30], "bandpass", fs=RATE, output="sos"),
            filters.tf2sos(*filters.iirnotch(40, 30, fs=RATE)),
        ]
    )
    trials = load_from_disk(str(tmp_path / "out"))["train"].with_format("numpy")
    assert len(trials) == 80
    for row in trials:
        whole = filters.sosfiltfilt(sections, signals[row["session"]], axis=0)
        first = int(row["trial"]) * 100
        np.testing.assert_allclose(row["signal"], whole[first : first + 100], atol=0.02)
    record = json.loads((tmp_path / "out" / "b2t.json").read_text())
    assert record["processing"]["band_pass"] == [2.0, 30.0]
    assert dataset_info(tmp_path / "out").processing == record["processing"]


def test_filters_do_not_look_into_another_split(tmp_path):
    signals = recordings(tmp_path / "raw", count=1)
    changed = signals["day0"].copy()
    changed[3200:] += 1e3  # all but the training share
    np.save(tmp_path / "raw" / "day0.npy", changed.astype(np.float32))
    options = ["--rate", 100, "--window", 1, "--band-pass", "2,30", "--normalize", "none"]
    run(tmp_path / "raw", tmp_path / "changed", *options)
    np.save(tmp_path / "raw" / "day0.npy", signals["day0"].astype(np.float32))
    run(tmp_path / "raw", tmp_path / "out", *options)
    before, after = rows(tmp_path / "out"), rows(tmp_path / "changed")
    for index, (split, signal) in before.items():
        assert np.array_equal(signal, after[index][1]) == (split == "train")


def test_another_recording_is_prepared_like_the_first(tmp_path, capsys):
    recordings(tmp_path / "raw")
    new = recordings(tmp_path / "new", seed=1, count=3)
    run(
        tmp_path / "raw", tmp_path / "out", "--rate", 100, "--window", 1, "--normalize", "session",
        "--reference", "average", "--bad-channels", "channel2",
    )  # fmt: skip
    assert "1 bad channels, average reference" in capsys.readouterr().out
    run(
        tmp_path / "new",
        tmp_path / "again",
        "--rate",
        100,
        "--window",
        1,
        "--like",
        tmp_path / "out",
    )
    scales = read_statistics(tmp_path / "out")
    assert {ALL, "day0", "day1"} <= set(scales)
    trials = load_from_disk(str(tmp_path / "again"))["train"].with_format("numpy")
    for row in trials:
        if row["session"] == "day2":
            continue
        mean, deviation = scales[row["session"]]
        first = int(row["trial"]) * 100
        raw = new[row["session"]][first : first + 100]
        raw = np.where([True, True, False], raw - raw[:, :2].mean(1, keepdims=True), 0)
        np.testing.assert_allclose(row["signal"], (raw - mean) / deviation, atol=1e-3)
    with pytest.raises(UserError, match="leave out --notch"):
        run(tmp_path / "new", tmp_path / "x", "--like", tmp_path / "out", "--notch", "40")


def model_of(folder, **signal):
    info = dataset_info(folder)
    known = {
        "channel_names": info.channel_names,
        "unit": info.unit,
        "processing": info.processing,
        "normalization": info.normalization,
    }
    return SimpleNamespace(channels=3, sampling_rate=RATE, signal={**known, **signal})


def test_raw_bins_become_what_the_model_was_trained_on(tmp_path):
    signals = recordings(tmp_path / "raw")
    run(
        tmp_path / "raw", tmp_path / "out", "--rate", 100, "--window", 40, "--split", "1/0/0",
        "--causal", "--band-pass", "2,30", "--normalize", "session",
    )  # fmt: skip
    trained = load_from_disk(str(tmp_path / "out"))["train"].with_format("numpy")[0]
    raw = signals[trained["session"]].astype(np.float32)
    bins = RawBins(model_of(tmp_path / "out"), 1e6, tmp_path / "out", trained["session"])
    pause = np.full((1, 3), np.nan, np.float32)
    found = np.concatenate(list(bins(iter([*np.split(raw, 40), pause]))))
    np.testing.assert_allclose(found[:-1], trained["signal"], atol=2e-3)
    assert np.isnan(found[-1]).all()
    from_nothing = RawBins(model_of(tmp_path / "out"), 1e6)
    found = np.concatenate(list(from_nothing(iter(np.split(raw, 40)))))
    np.testing.assert_allclose(found[-100:], trained["signal"][-100:], atol=0.1)


def test_raw_bins_are_refused_where_nothing_is_known_of_the_training(tmp_path):
    recordings(tmp_path / "raw")
    run(tmp_path / "raw", tmp_path / "out", "--rate", 100, "--window", 1)
    with pytest.raises(UserError, match="does not say what was done"):
        RawBins(model_of(tmp_path / "out", normalization=None), 60.0)
    with pytest.raises(UserError, match="z-scored by their source"):
        RawBins(model_of(tmp_path / "out", normalization="none"), 60.0)
