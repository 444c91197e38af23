"""Rows of another form by a description, copied or streamed."""

import glob
import io
import json
import tarfile

import numpy as np
import pytest
import yaml
from datasets import Dataset, DatasetDict

from b2t.data.augment import Augment
from b2t.data.batches import StreamedTrials, TrialRows
from b2t.data.dataset import dataset_info, load_trials
from b2t.data.trials import trial_features
from b2t.errors import UserError
from tests.data.test_batches import Bytes, assert_same

SHARDS, ROWS = 4, 9


def signal_of(number: int) -> np.ndarray:
    generator = np.random.default_rng(number)
    return generator.standard_normal((12 + number % 5, 3)).astype(np.float32)


def shards(folder):
    """Write WebDataset shards: signals as .npy, sentence and day in .json."""
    folder.mkdir()
    for split, first, count in (("train", 0, SHARDS), ("val", 900, 1)):
        for shard in range(count):
            with tarfile.open(folder / f"{split}-{shard:03d}.tar", "w") as tar:
                for row in range(ROWS):
                    number = first + shard * ROWS + row
                    npy = io.BytesIO()
                    np.save(npy, signal_of(number))
                    words = {"said": f"say {number}", "day": f"day{shard % 2}", "number": number}
                    for suffix, data in (
                        ("npy", npy.getvalue()),
                        ("json", json.dumps(words).encode()),
                    ):
                        entry = tarfile.TarInfo(f"{number:05d}.{suffix}")
                        entry.size = len(data)
                        tar.addfile(entry, io.BytesIO(data))
    return folder


def description(folder, name="data.yaml", **keys):
    columns = {"signal": "npy", "text": "json.said", "session": "json.day", "trial": "json.number"}
    content = {"path": "*.tar", "columns": columns, "sampling_rate": 50, "window": 8, **keys}
    file = folder / name
    file.write_text(yaml.safe_dump(content))
    return str(file)


def test_columns_of_shards_are_mapped(tmp_path):
    path = description(shards(tmp_path / "w"))
    info, trials = dataset_info(path), load_trials(path, "train").with_format("numpy")
    assert (info.channels, info.sampling_rate, info.sessions) == (3, 50.0, ["day0", "day1"])
    assert info.splits == {"train": SHARDS * ROWS, "val": ROWS} and info.has_text
    for row in trials:
        number = int(row["trial"])
        assert row["text"] == f"say {number}" and row["session"] == f"day{number // ROWS % 2}"
        np.testing.assert_array_equal(row["signal"], signal_of(number))


def test_columns_of_parquet_with_channels_first(tmp_path):
    rows = [{"eeg": signal_of(n).T.tolist(), "sentence": f"s {n}"} for n in range(6)]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "train.parquet"))
    path = description(
        tmp_path, path="*.parquet", columns={"signal": "eeg", "text": "sentence"},
        channels_first=True, session="monday",
    )  # fmt: skip
    trials = load_trials(path, "train").with_format("numpy")
    for number, row in enumerate(trials):
        np.testing.assert_array_equal(row["signal"], signal_of(number))
        assert (row["text"], row["session"], row["trial"]) == (f"s {number}", "monday", number)


@pytest.mark.parametrize("streaming", [False, True])
def test_names_of_folders_are_no_patterns(tmp_path, streaming):
    folder = tmp_path / "day [1] * ü"
    path = description(shards(folder), streaming=streaming)
    assert dataset_info(path).sessions == (["day0"] if streaming else ["day0", "day1"])
    rows = [{**row, "split": "train"} for row in load_trials(path, "train")]
    Dataset.from_list(rows, features=trial_features(3)).to_parquet(str(folder / "all [2].parquet"))
    assert len(load_trials(f"{glob.escape(str(folder))}/*.parquet", "train")) == len(rows)
    DatasetDict({"train": load_trials(path, "train")}).save_to_disk(str(folder / "kept [3]"))
    assert len(load_trials(folder / "kept [3]", "train")) == len(rows)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"columns": {"signal": "eeg"}}, r"row 0: no column eeg \(found: npy, json"),
        ({"sampling_rate": None}, "give it as sampling_rate"),
        ({"colums": {}}, "unknown key colums"),
        ({"columns": {"sinal": "npy"}}, "unknown key columns.sinal"),
        ({"path": "*.parquet"}, "no such file"),
        ({"columns": {"signal": "json.number"}}, "no table"),
        (
            {"columns": {"signal": "npy", "block": "json.day"}},
            "row 0: block is 'day0', where a num",
        ),
        ({"columns": {"signal": "npy", "trial": "json.said"}}, "row 0: trial is 'say 0', where"),
    ],
)
def test_mistakes_in_a_description_are_named(tmp_path, keys, message):
    path = description(shards(tmp_path / "w"), **keys)
    with pytest.raises(UserError, match=message):
        load_trials(path, "train")


def streamed(path, rank=0, world=1, position=None, **options):
    source = StreamedTrials(path, "train", rank, world)
    if position is not None:
        source.go_to(json.loads(json.dumps(position)))  # as a checkpoint keeps them
    rows = TrialRows(load_trials(path, "train"), None, ["day0", "day1"], Augment(), seed=3)
    options = {"micro_batch": 2, "accumulation": 2, **options}
    return source, source.batches(rows, Bytes(), **options)


@pytest.mark.parametrize("options", [{}, {"max_frames": 40}])
def test_a_stream_goes_on_where_it_was(tmp_path, options):
    path = description(shards(tmp_path / "w"), streaming=True)
    source, whole = streamed(path, **options)
    steps, places = [], [source.position]
    for _ in range(24):
        steps.append(next(whole))
        places.append(source.position)
    for at in (3, 8, 17):
        _, resumed = streamed(path, position=[places[at]], **options)
        for expected in steps[at : at + 5]:
            for one, other in zip(expected, next(resumed), strict=True):
                assert_same(one, other)


def test_ranks_share_a_stream_and_an_epoch_holds_every_row_once(tmp_path):
    path = description(shards(tmp_path / "w"), streaming=True)
    assert len(load_trials(path, "train")) == 8, "its first rows stand for it"
    seen = []
    for rank in range(2):
        _, batches = streamed(path, rank, 2)
        mine = [row for _ in range(4) for batch in next(batches) for row in batch.rows]
        assert len(mine) == 16
        seen += mine
    assert len(set(seen)) == 32
    _, batches = streamed(path)
    rows = [row for _ in range(18) for batch in next(batches) for row in batch.rows]
    assert max(map(rows[:32].count, rows[:32])) == 1 and set(rows[:72]) >= set(seen)


def test_another_number_of_ranks_goes_on_with_the_next_epoch(tmp_path, caplog):
    path = description(shards(tmp_path / "w"), streaming=True)
    two = [streamed(path, rank, 2) for rank in range(2)]
    for _ in range(2):
        for _, batches in two:
            next(batches)
    places = [source.position for source, _ in two]
    found = []
    for _ in range(2):
        source, batches = streamed(path, 0, 1, places)
        assert source.position["epoch"] == 1 and source.position["windows"] > 0
        found.append([next(batches) for _ in range(9)])
    assert "2 ranks shared this stream and 1 go on" in caplog.text
    for one, other in zip(*found, strict=True):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    rows = [row for step in found[0] for batch in step for row in batch.rows]
    assert len(set(rows[:32])) == 32, "a whole epoch"
