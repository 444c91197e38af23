"""Several datasets trained on as one."""

import json

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from b2t.data.mixture import mixed
from b2t.data.trials import trial_features
from b2t.errors import UserError


def saved(folder, session, count=6, channels=3, *, rate=50.0, dtype="float32", text="say"):
    rows = [
        {
            "signal": np.full((5 + index, channels), index + 0.5, dtype),
            "text": f"{text} {index}",
            "phonemes": [1, 40],
            "session": session,
            "subject": "s",
            "block": 0,
            "trial": index,
            "sampling_rate": rate,
            "split": "train",
        }
        for index in range(count)
    ]
    features = trial_features(channels, dtype)
    for row in rows:
        row["signal"] += np.arange(channels) + (np.arange(len(row["signal"])) % 3)[:, None]
    train = Dataset.from_list(rows, features=features)
    DatasetDict({"train": train, "val": train.select([0])}).save_to_disk(str(folder))
    return str(folder)


def test_one_dataset_is_itself(tmp_path):
    info, trials, weights = mixed(saved(tmp_path / "a", "day0"), "train", [])
    assert weights is None and len(trials) == 6 and info.sessions == ["day0"]


def test_several_are_one_with_their_weights(tmp_path):
    paths = [saved(tmp_path / name, f"day{name}", count) for name, count in (("a", 6), ("b", 4))]
    info, trials, weights = mixed(paths[0], "train", [(paths[1], 0.5)])
    assert info.sessions == ["daya", "dayb"] and trials["session"][:] == ["daya"] * 6 + ["dayb"] * 4
    assert weights.tolist() == [1.0] * 6 + [0.5] * 4
    again = mixed(paths[0], "train", [(paths[1], 0.5)])[0]
    other = mixed(paths[0], "train", [(paths[1], 2.0)])[0]
    assert again.fingerprint == info.fingerprint != other.fingerprint
    assert info.fingerprint != mixed(paths[0], "train", [])[0].fingerprint


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"channels": 4}, "channels 4 and .* has 3"),
        ({"rate": 100.0}, r"sampling_rate 100\.0"),
        ({"dtype": "float16"}, "stores signals as float16"),
    ],
)
def test_datasets_that_do_not_fit_are_refused(tmp_path, other, message):
    path = saved(tmp_path / "a", "day0")
    with pytest.raises(UserError, match=message):
        mixed(path, "train", [(saved(tmp_path / "b", "day1", **other), 1.0)])


def test_trials_of_one_name_are_refused(tmp_path):
    path = saved(tmp_path / "a", "day0")
    with pytest.raises(UserError, match="both have a trial day0/0/0"):
        mixed(path, "train", [(saved(tmp_path / "b", "day0", text="other"), 1.0)])


def test_units_that_are_known_must_agree(tmp_path):
    from b2t.data.prepare import PrepareOptions, prepare
    from tests.data.test_prepare import Memory

    for name, normalize in (("a", "block"), ("b", "none")):
        source = Memory()
        source.trials = [
            info.__class__(**{**vars(info), "session": name + info.session})
            for info in source.trials
        ]
        prepare(source, tmp_path / name, PrepareOptions(normalize=normalize))
        assert json.loads((tmp_path / name / "b2t.json").read_text())["normalization"] == normalize
    with pytest.raises(UserError, match=r"has unit mV and .* has z-score"):
        mixed(str(tmp_path / "a"), "train", [(str(tmp_path / "b"), 1.0)])
