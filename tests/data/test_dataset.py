"""Loading: three kinds of paths, and one clear message for each kind of mistake."""

import json
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, load_from_disk

from b2t.data.dataset import DatasetInfo, dataset_info, durations, load_trials
from b2t.data.prepare import PrepareOptions, prepare
from b2t.data.sources import detect
from b2t.data.trials import read_signal, row_ids, signal_lengths, trial_features
from b2t.errors import UserError


@pytest.fixture
def prepared(t15_release, tmp_path):
    folder, _ = t15_release(8)
    prepare(detect(folder), tmp_path / "data", PrepareOptions())
    return tmp_path / "data"


def row(index, signal=None, **changes):
    content = {
        "signal": np.full((4 + index, 3), index + 1.0) if signal is None else signal,
        "text": f"text {index}",
        "phonemes": [1, 40],
        "session": f"day{index % 2}",
        "subject": "s",
        "block": 0,
        "trial": index,
        "sampling_rate": 100.0,
        "split": ("train", "train", "val")[index % 3],
    }
    return {**content, **changes}


def parquet(folder, rows, name="part-0.parquet", *, features=None):
    folder.mkdir(exist_ok=True)
    Dataset.from_list(rows, features=features).to_parquet(str(folder / name))
    return str(folder / "*.parquet")


def saved(folder, rows):
    trials = Dataset.from_list(rows, features=trial_features(3))
    DatasetDict({"train": trials}).save_to_disk(str(folder))
    return folder


def message(path, split="train") -> str:
    with pytest.raises(UserError) as caught:
        load_trials(path, split)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_prepared_release(prepared):
    info = dataset_info(prepared)
    assert (info.channels, info.sampling_rate, info.simulated) == (8, 50.0, False)
    assert info.sessions == ["t15.2023.08.11", "t15.2023.08.13"]
    assert info.splits == {"train": 8, "val": 4, "test": 4}
    assert info.has_text and info.has_phonemes and info.z_scored
    assert info.fingerprint == json.loads((prepared / "b2t.json").read_text())["fingerprint"]
    trials = load_trials(prepared, "val")
    assert row_ids(trials)[:2] == ["t15.2023.08.11/0/0", "t15.2023.08.11/0/1"]
    assert signal_lengths(trials).tolist() == [20, 23] * 2
    np.testing.assert_allclose(durations(trials), np.array([20, 23] * 2) / 50)


def test_sessions_are_those_with_training_trials(tmp_path):
    rows = [row(index) for index in range(9)] + [row(11, session="unseen")]
    pattern = parquet(tmp_path / "p", rows)
    assert dataset_info(pattern).sessions == ["day0", "day1"]
    assert "unseen" in load_trials(pattern, "val").unique("session")


@pytest.mark.parametrize("typed", [True, False])
def test_parquet_by_split_column(tmp_path, typed):
    rows = [row(index) for index in range(9)]
    features = trial_features(3) if typed else None
    if not typed:
        rows = [{**content, "signal": content["signal"].tolist()} for content in rows]
    pattern = parquet(tmp_path / "p", rows, features=features)
    info = dataset_info(pattern)
    assert info.splits == {"train": 6, "val": 3} and info.channels == 3
    trials = load_trials(pattern, "val")
    assert signal_lengths(trials).tolist() == [6, 9, 12]
    signal = read_signal(trials.with_format("arrow")[1])
    assert signal.dtype == np.float32
    np.testing.assert_array_equal(signal, np.full((9, 3), 6.0))


def test_parquet_by_file_name_and_the_same_fingerprint(tmp_path):
    for split in ("train", "val"):
        rows = [row(index) for index in range(9) if row(index)["split"] == split]
        name = {"train": "train-00000.parquet", "val": "validation-00000.parquet"}[split]
        pattern = parquet(tmp_path / "named", rows, name)
    by_column = parquet(tmp_path / "p", [row(index) for index in range(9)])
    assert dataset_info(pattern).splits == {"train": 6, "val": 3}
    assert dataset_info(pattern).fingerprint == dataset_info(by_column).fingerprint
    changed = [row(index) for index in range(9)]
    changed[0]["signal"][0, 0] += 1
    assert (
        dataset_info(parquet(tmp_path / "q", changed)).fingerprint
        != dataset_info(by_column).fingerprint
    )


def test_the_fingerprint_survives_the_way_through_parquet(prepared, tmp_path):
    folder = tmp_path / "p"
    folder.mkdir()
    for split in ("train", "val", "test"):
        load_trials(prepared, split).to_parquet(str(folder / f"{split}-0.parquet"))
    assert dataset_info(f"{folder}/*.parquet").fingerprint == dataset_info(prepared).fingerprint


def test_a_missing_path(tmp_path):
    assert "no such folder" in message(tmp_path / "absent")
    assert "no such parquet file" in message(str(tmp_path / "*.parquet"))
    assert "no such folder" in message("absent")


def test_wrong_layouts_say_what_to_do(prepared, tmp_path, t15_release):
    assert f"did you mean {prepared}?" in message(prepared / "train")
    release, _ = t15_release(8, name="other")
    assert f"b2t prepare {release} OUT" in message(release)
    (tmp_path / "empty").mkdir()
    assert "expected a folder written by `b2t prepare`" in message(tmp_path / "empty")
    parquet(tmp_path / "p", [row(0)])
    assert "*.parquet'" in message(tmp_path / "p")
    (tmp_path / "notes.txt").write_text("text")
    assert "not a dataset" in message(tmp_path / "notes.txt")


def test_a_missing_split_names_those_there(tmp_path):
    pattern = parquet(tmp_path / "p", [row(index) for index in range(9)])
    assert "no test split: it has train, val" in message(pattern, "test")


def test_an_empty_split(tmp_path):
    features = trial_features(3)
    DatasetDict(
        {
            "train": Dataset.from_list([row(0)], features=features),
            "val": Dataset.from_dict({name: [] for name in features}, features=features),
        }
    ).save_to_disk(str(tmp_path / "data"))
    assert "the val split is empty" in message(tmp_path / "data")
    none = {name: [] for name in row(0)}
    Dataset.from_dict(none).to_parquet(str(tmp_path / "train-0.parquet"))
    assert "no data" in message(str(tmp_path / "*.parquet"))


def test_a_missing_column(tmp_path):
    rows = [{name: value for name, value in row(0).items() if name != "session"}]
    found = message(parquet(tmp_path / "p", rows))
    assert "no column session" in found and "expected signal, text" in found


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_names_the_row(tmp_path, value):
    rows = [row(index) for index in range(4)]
    rows[3]["signal"][5, 2] = value
    found = message(saved(tmp_path / "data", rows))
    assert (
        f"day1/0/3 ({tmp_path / 'data'}, train, row 3) holds {value} at bin 5, channel 2" in found
    )


def test_an_empty_trial_names_the_row(tmp_path):
    rows = [row(0), row(1, signal=np.zeros((0, 3)))]
    assert re.search(r"day1/0/1 .*no time bins", message(saved(tmp_path / "data", rows)))


def test_unequal_channels_name_both_rows(tmp_path):
    rows = [row(0), row(1), row(3, signal=np.zeros((5, 4)))]
    rows = [{**content, "signal": content["signal"].tolist()} for content in rows]
    found = message(parquet(tmp_path / "p", rows))
    assert re.search(r"day0/0/0 .* has 3 channels and trial day1/0/3 .* has 4", found)


def test_a_ragged_trial(tmp_path):
    rows = [{**row(0), "signal": [[1.0, 2.0], [3.0]]}]
    assert "between 1 and 2 channels" in message(parquet(tmp_path / "p", rows))


def test_a_flat_signal_column(tmp_path):
    rows = [{**row(0), "signal": [1.0, 2.0]}]
    assert "signal is no list [bins] of lists" in message(parquet(tmp_path / "p", rows))


def test_phonemes_outside_the_inventory(tmp_path):
    rows = [row(0), row(1, phonemes=[3, 41])]
    assert "3 to 41, expected classes 1 to 40" in message(saved(tmp_path / "data", rows))


def test_dev_and_validation_together_are_refused(tmp_path):
    trials = Dataset.from_list([row(0), row(1)], features=trial_features(3))
    DatasetDict({"train": trials, "dev": trials, "validation": trials}).save_to_disk(
        str(tmp_path / "data")
    )
    assert "splits dev and validation are both read as val" in message(tmp_path / "data")


def test_rows_of_no_split_are_refused(tmp_path):
    rows = [row(0), row(1, split="holdout"), row(2, split=None)]
    found = message(parquet(tmp_path / "p", rows))
    assert "column split holds None, holdout (2 rows), expected train, val or test" in found


def test_files_of_no_split_beside_others_are_refused(tmp_path):
    parquet(tmp_path / "p", [row(0)], "train-0.parquet")
    found = message(parquet(tmp_path / "p", [row(2)], "extra-0.parquet"))
    assert "some file names begin with a split and others do not (extra-0.parquet)" in found


def test_a_row_that_comes_twice_names_both(tmp_path):
    rows = [row(0), row(1), row(0, signal=np.ones((5, 3)))]
    found = message(saved(tmp_path / "data", rows))
    assert re.search(r"train, row 2\) and .*train, row 0\) are both trial day0/0/0 of train", found)


def moving(index, **changes):
    return row(index, signal=np.random.default_rng(index).standard_normal((9, 3)), **changes)


def test_signals_in_two_splits_are_counted(tmp_path, caplog):
    rows = [moving(0), moving(1), {**moving(2), "signal": moving(1)["signal"]}]
    with caplog.at_level("WARNING", logger="b2t"):
        load_trials(parquet(tmp_path / "p", rows), "train")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "val, row 0): has the signal of a trial of another split" in said[0]


def test_odd_trials_are_counted_in_one_warning_each(tmp_path, caplog):
    rows = [moving(index, split="train") for index in range(7)]
    rows[1]["signal"] = rows[0]["signal"]
    rows[2]["signal"] = np.zeros((6, 3))
    rows[3]["signal"] = np.full((8, 3), 2.5)
    rows[4]["signal"] = np.arange(3.0)[None]
    with caplog.at_level("WARNING", logger="b2t"):
        load_trials(saved(tmp_path / "data", rows), "train")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert "day1/0/1" in said[0] and "same signal as another trial of its split" in said[0]
    assert said[1].startswith("3 trials, the first day0/0/2") and "never moves" in said[1]
    assert "day0/0/4" in said[2] and "lasts one time bin" in said[2]


def test_values_without_a_square_are_refused(tmp_path):
    rows = [moving(0), moving(1)]
    rows[1]["signal"][4, 2] = -1e30
    found = message(saved(tmp_path / "data", rows))
    assert "day1/0/1" in found and "holds -1e+30 at bin 4, channel 2, whose square" in found


def test_names_that_come_twice_in_data_prepared_before_are_said(prepared, caplog):
    def renumber(example):
        return {**example, "trial": 0}

    record = json.loads((prepared / "b2t.json").read_text())
    splits = load_from_disk(str(prepared)).map(renumber)
    splits.save_to_disk(str(prepared.parent / "old"))
    del record["checksums"]
    record["arrow"] = {name: split._fingerprint for name, split in splits.items()}
    (prepared.parent / "old" / "b2t.json").write_text(json.dumps(record))
    with caplog.at_level("WARNING", logger="b2t"):
        load_trials(prepared.parent / "old", "train")
    assert "8 trials, the first" in caplog.text and "names more than one row" in caplog.text


def test_mixed_sampling_rates(tmp_path):
    rows = [row(0), row(1, sampling_rate=50.0)]
    assert "mixes sampling rates (50 Hz, 100 Hz)" in message(saved(tmp_path / "data", rows))


def test_a_null_session(tmp_path):
    rows = [row(0), row(1, session=None)]
    assert "row 1: session is null" in message(saved(tmp_path / "data", rows))


def test_what_was_changed_after_preparing_is_checked_again(prepared, tmp_path):
    def poison(example, index):
        if index == 2:
            example["signal"] = [[float("nan")] * 8, *example["signal"][1:]]
        return example

    splits = load_from_disk(str(prepared))
    splits["train"] = splits["train"].map(poison, with_indices=True)
    splits.save_to_disk(str(tmp_path / "changed"))
    shutil.copy(prepared / "b2t.json", tmp_path / "changed")
    assert "train, row 2) holds nan at bin 0" in message(tmp_path / "changed")


def test_a_folder_prepared_again_is_read_again(t15_release, tmp_path):
    out = tmp_path / "data"
    release, _ = t15_release(8)
    prepare(detect(release), out, PrepareOptions())
    before = dataset_info(out)
    other, _ = t15_release(8, (5, 2, 2), name="other")
    prepare(detect(other), out, PrepareOptions(overwrite=True))
    assert before.splits["train"] == 8 and dataset_info(out).splits["train"] == 10
    assert isinstance(before, DatasetInfo) and before.fingerprint != dataset_info(out).fingerprint


def test_a_damaged_arrow_file(prepared):
    file = next((prepared / "train").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:100])
    assert f"{prepared} cannot be read" in message(prepared)


def test_offsets_beyond_an_arrow_file_are_refused(prepared):
    file = next((prepared / "val").glob("*.arrow"))
    content = file.read_bytes()
    # Offsets of the rows' bins: sentences of 20, 23, 20 and 23 bins one after another.
    offsets = np.int32([0, 20, 43, 63, 86]).tobytes()
    assert content.count(offsets) == 1
    file.unlink()
    file.write_bytes(content.replace(offsets, np.int32([0, 20, 43, 10**6, 86]).tobytes()))
    assert f"{prepared}, val: its Arrow data are damaged" in message(prepared, "val")


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("text", 5, "text"),
        ("session", 1.5, "text"),
        ("block", "one", "whole numbers"),
        ("phonemes", ["AA"], "lists of whole numbers"),
        ("sampling_rate", "fast", "numbers"),
    ],
)
def test_columns_of_another_type_are_refused(tmp_path, column, value, expected):
    found = message(parquet(tmp_path / "p", [row(0, **{column: value})]))
    assert f"train: column {column} holds" in found and f"expected {expected}" in found


@pytest.mark.parametrize("rate", [0.0, -1.0, np.nan, np.inf, None])
def test_sampling_rates_that_cannot_be(tmp_path, rate):
    rows = [moving(index, sampling_rate=rate, split="train") for index in range(2)]
    assert "sampling_rate is" in message(saved(tmp_path / "data", rows))


def test_parquet_written_again_is_read_again(tmp_path):
    rows = [moving(index, split="train") for index in range(5)]
    pattern = parquet(tmp_path / "p", rows[:2], "train-0.parquet")
    assert dataset_info(pattern).splits == {"train": 2}
    parquet(tmp_path / "p", rows, "train-0.parquet")
    assert dataset_info(pattern).splits == {"train": 5}


OFFLINE = """
import socket, sys
def refused(*args, **kwargs):
    raise OSError("Network is unreachable")
socket.socket.connect = refused
socket.create_connection = refused
socket.getaddrinfo = refused
from b2t.data.dataset import load_trials
from b2t.errors import UserError
try:
    load_trials("someone/some-eeg", "train")
except UserError as error:
    print("message:", error)
"""


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_hub_id_without_a_network_is_one_message_and_quick(tmp_path, repository, offline):
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": offline,
        "PYTHONPATH": str(repository),
        "OMP_NUM_THREADS": "1",
    }
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("message: someone/some-eeg is neither a folder here nor")
    assert done.stdout.count("\n") == 1
    assert ("HF_HUB_OFFLINE is set" in done.stdout) == (offline == "1")
    assert time.monotonic() - began < 45
