"""Rows read from Arrow memory are those that `datasets` gives."""

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, List, Value, concatenate_datasets

from b2t.data.batches import TrialRows
from b2t.data.trial_reader import TrialReader
from b2t.data.trials import trial_features
from b2t.errors import UserError

READ = ("text", "phonemes", "session", "block", "trial", "sampling_rate")


def rows(count, seed=0, channels=3, **columns):
    generator = np.random.default_rng(seed)
    return [
        {
            "signal": generator.standard_normal((1 + n % 7, channels)).astype(np.float32),
            "text": None if n % 3 == 0 else f"sentence {n}",
            "phonemes": list(range(n % 5)),
            "session": f"day{n % 2}", "subject": "me", "block": n // 4, "trial": n,
            "sampling_rate": 50.0, "split": "train", **columns,
        }
        for n in range(count)
    ]  # fmt: skip


def prepared(count, dtype="float32", **options):
    return Dataset.from_list(rows(count, **options), features=trial_features(3, dtype))


def lists(inner, count=9, **columns):
    """The same as plain nested lists, as parquet and JSON hold them."""
    features = Features({**trial_features(3), "signal": List(inner)})
    given = [{**row, "signal": row["signal"].tolist()} for row in rows(count, **columns)]
    return Dataset.from_list(given, features=features)


def without_phonemes(count):
    some = rows(count)
    for row in some[::2]:
        row["phonemes"] = None
    return Dataset.from_list(some, features=trial_features(3))


def in_pieces(sizes):
    return concatenate_datasets([prepared(size, seed=seed) for seed, size in enumerate(sizes)])


def with_texts_of(pieces, sizes):
    """Texts put into a dataset of other pieces."""
    texts = in_pieces(sizes).data.table.column("text")
    table = pieces.data.table
    return Dataset(table.set_column(table.column_names.index("text"), "text", texts))


DATASETS = {
    "no texts": lambda: in_pieces([5, 4]).remove_columns("text").add_column("text", [None] * 9),
    "other texts": lambda: with_texts_of(in_pieces([5, 4]), [2, 7]),
    "prepared": lambda: prepared(20),
    "in several pieces": lambda: concatenate_datasets([prepared(5), prepared(4, seed=1)]),
    "chosen": lambda: prepared(20).select([7, 3, 3, 19]),
    "in a slice": lambda: Dataset(prepared(20).data.table.slice(5, 9)),
    "float16": lambda: prepared(9, "float16"),
    "lists": lambda: lists(List(Value("float32"))),
    "lists of a fixed size": lambda: lists(List(Value("float32"), length=3)),
    "doubles": lambda: lists(List(Value("float64"))),
    "without phonemes": lambda: without_phonemes(9),
    "without sessions": lambda: prepared(9, session=None),
    "one": lambda: prepared(1),
}


@pytest.mark.parametrize("name", DATASETS)
def test_rows_are_those_of_datasets(name):
    dataset = DATASETS[name]()
    reader = TrialReader(dataset)
    assert len(reader) == len(dataset)
    for index in [*range(len(dataset)), 0]:
        expected, found = dataset.with_format(None)[index], reader.row(index)
        phonemes = found.pop("phonemes")
        assert found == {key: expected[key] for key in READ if key != "phonemes"}
        assert {type(value) for value in found.values()} <= {str, int, float, type(None)}
        assert (None if phonemes is None else list(phonemes)) == expected["phonemes"]
        signal = reader.signal(index)
        assert signal.dtype == np.float32
        np.testing.assert_array_equal(signal, np.asarray(expected["signal"], np.float32))
    for index in (-1, len(dataset)):
        with pytest.raises(IndexError):
            reader.row(index)


def test_one_odd_row_is_named_and_its_neighbours_are_read():
    good = rows(5)
    signals = [row["signal"].tolist() for row in good]
    signals[2] = [[1.0, 2.0, 3.0], [1.0, 2.0]]
    signals[3] = []
    table = pa.table(
        {
            "signal": pa.array(signals, pa.list_(pa.list_(pa.float32()))),
            **{key: [row[key] for row in good] for key in READ},
        }
    )
    trials = TrialRows(Dataset(table), None, ["day0", "day1"])
    assert trials[(None, 1, 0)].row == "day1/0/1"
    np.testing.assert_array_equal(trials[(None, 4, 0)].signal, good[4]["signal"])
    for index, message in ((2, "day0/0/2: time bins have between 2 and 3"), (3, "day1/0/3 has no")):
        error = trials[(None, index, 0)]
        assert isinstance(error, UserError) and message in str(error)


def test_a_trial_that_is_not_finite_is_refused_whenever_it_is_read():
    some = rows(4)
    some[2]["signal"][0, 1] = np.nan
    trials = TrialRows(Dataset.from_list(some, features=trial_features(3)), None, [])
    for _ in range(2):
        assert trials[(0, 1, 0)].checked
        error = trials[(0, 2, 0)]
        assert isinstance(error, UserError) and "holds nan at bin 0, channel 1" in str(error)
