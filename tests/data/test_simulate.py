import hashlib
import json
from dataclasses import replace

import h5py
import numpy as np
import pytest

from b2t.data import simulate as simulation
from b2t.data.articulation import time_sentence
from b2t.data.phonemes import sentence_to_ids, words_of
from b2t.data.population import PopulationConfig
from b2t.data.simulate import (
    Block,
    BlockRecording,
    SimulationConfig,
    Simulator,
    plan_blocks,
    simulate,
    zscore,
)
from b2t.errors import UserError

SMALL = SimulationConfig(sessions=2, trials=(14, 5, 3), electrodes=8, block_trials=5)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return simulate(SMALL, tmp_path_factory.mktemp("simulated"))


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def trials(folder, split):
    """(session, group name, datasets, attributes) of every trial, read with h5py alone."""
    found = []
    for path in sorted(folder.glob(f"t15.*/data_{split}.hdf5")):
        with h5py.File(path) as file:
            for name, group in file.items():
                data = {key: value[:] for key, value in group.items()}
                found.append((path.parent.name, name, data, dict(group.attrs)))
    return found


def test_files_and_numbering(written):
    assert written.name == "hdf5_data_final"
    sessions = sorted(path.name for path in written.iterdir())
    assert sessions == ["t15.2023.08.11", "t15.2023.08.13"]
    for session in sessions:
        assert sorted(path.name for path in (written / session).iterdir()) == [
            "data_test.hdf5",
            "data_train.hdf5",
            "data_val.hdf5",
        ]
    names = [name for session, name, *_ in trials(written, "train") if session == sessions[0]]
    assert names == [f"trial_{index:04d}" for index in range(7)]
    assert [len(trials(written, split)) for split in ("train", "val", "test")] == [14, 5, 3]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_layout_field_by_field(written, split):
    for session, _, data, attributes in trials(written, split):
        assert set(data) == {"input_features", "seq_class_ids", "transcription"}
        features = data["input_features"]
        assert features.dtype == np.float32 and features.shape[1] == 16
        assert np.isfinite(features).all()
        assert attributes["n_time_steps"] == len(features)
        assert attributes["session"] == session
        text = attributes["sentence_label"]
        assert isinstance(text, str)
        assert data["seq_class_ids"].shape == data["transcription"].shape == (500,)
        assert np.issubdtype(data["seq_class_ids"].dtype, np.integer)
        assert np.issubdtype(data["transcription"].dtype, np.integer)
        length = attributes["seq_len"]
        assert data["seq_class_ids"][:length].tolist() == sentence_to_ids(text)
        assert not data["seq_class_ids"][length:].any()
        codes = data["transcription"]
        assert "".join(chr(code) for code in codes[: list(codes).index(0)]) == text
        assert not codes[len(text) :].any()
        assert set(attributes) == {
            "n_time_steps",
            "seq_len",
            "sentence_label",
            "session",
            "block_num",
            "trial_num",
        }


def test_blocks_belong_to_one_split_and_number_their_trials(written):
    seen = {}
    for split in ("train", "val", "test"):
        for session, _, _, attributes in trials(written, split):
            key = (session, int(attributes["block_num"]))
            seen.setdefault(key, []).append((split, int(attributes["trial_num"])))
    for members in seen.values():
        assert len({split for split, _ in members}) == 1
        assert [number for _, number in members] == list(range(len(members)))
    assert max(len(members) for members in seen.values()) == 5


def test_features_of_a_block_are_zscored(written):
    blocks = {}
    for split in ("train", "val", "test"):
        for session, _, data, attributes in trials(written, split):
            key = (session, int(attributes["block_num"]))
            blocks.setdefault(key, []).append(data["input_features"])
    for parts in blocks.values():
        values = np.concatenate(parts).astype(float)
        np.testing.assert_allclose(values.mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(values.std(axis=0), 1, atol=1e-5)


def test_zscore_closed_form():
    values = np.array([[1.0, 5.0, 0.0], [3.0, 5.0, 4.0]])
    np.testing.assert_allclose(zscore(values), [[-1, 0, -1], [1, 0, 1]])


def test_features_are_logarithms_of_counts_and_power():
    rng = np.random.default_rng(0)
    block = Simulator(SMALL).record(plan_blocks(SMALL)[0])
    counts, power = rng.poisson(1.0, block.counts.shape), rng.gamma(2.0, size=block.power.shape)
    features = BlockRecording(block.utterances, block.rates, counts, power).features()
    assert [len(part) for part in features] == [item.length for item in block.utterances]
    found = np.concatenate(features)
    for channel in range(8):
        for raw, column in ((counts, channel), (power, 8 + channel)):
            logs = np.log(1.0 + raw[:, channel])
            expected = (logs - logs.mean()) / logs.std()
            np.testing.assert_allclose(found[:, column], expected, atol=1e-5)


def test_held_out_sentences_never_occur_in_training(written):
    texts = {
        split: [tuple(words_of(item[3]["sentence_label"])) for item in trials(written, split)]
        for split in ("train", "val", "test")
    }
    assert not set(texts["train"]) & (set(texts["val"]) | set(texts["test"]))
    assert not set(texts["val"]) & set(texts["test"])
    assert len(set(texts["train"])) == 14


def test_every_file_says_that_it_is_simulated(written):
    for path in written.rglob("*.hdf5"):
        with h5py.File(path) as file:
            assert file.attrs["simulated"]
            assert file.attrs["seed"] == 0
    record = json.loads((written.parent / "simulation.json").read_text())
    assert record["simulated"] is True
    assert record["config"]["electrodes"] == 8
    assert record["config"]["population"]["tuning"] == 1.0
    assert sum(block["trials"] for block in record["blocks"]) == 22


def test_unlabelled_test_split(tmp_path):
    config = replace(SMALL, labelled_test=False)
    folder = simulate(config, tmp_path)
    for _, _, data, attributes in trials(folder, "test"):
        assert set(data) == {"input_features"}
        assert set(attributes) == {"n_time_steps", "session", "block_num", "trial_num"}
    assert all("sentence_label" in item[3] for item in trials(folder, "val"))


def test_same_seed_same_bytes_whatever_the_jobs(written, tmp_path):
    again = simulate(SMALL, tmp_path / "again", jobs=2)
    assert digests(again.parent) == digests(written.parent)
    other = simulate(replace(SMALL, seed=1), tmp_path / "other")
    assert all(digest != digests(written)[name] for name, digest in digests(other).items())


def test_counts_follow_their_rates():
    config = SimulationConfig(trials=(60, 1, 1), sessions=1, electrodes=32, block_trials=60)
    block = Simulator(config).record(plan_blocks(config)[0])
    standardised = (block.counts - block.rates) / np.sqrt(block.rates)
    # Poisson: unit variance around the rate in every electrode.
    np.testing.assert_allclose(standardised.mean(axis=0), 0, atol=0.05)
    np.testing.assert_allclose(standardised.var(axis=0), 1, atol=0.08)


def test_sessions_drift():
    config = replace(SMALL, sessions=12, trials=(12, 1, 1), electrodes=64)
    directions = [population.direction for population in Simulator(config).populations]
    cosine = [(directions[0] * item).sum(axis=1).mean() for item in directions]
    assert cosine[0] == pytest.approx(1)
    assert 0.9 < cosine[1] < 1
    assert cosine[-1] < 0.8
    assert np.all(np.diff(cosine) < 0)


def test_selection_takes_better_tuned_electrodes():
    plain = Simulator(replace(SMALL, electrodes=32)).populations[0]
    selected = Simulator(replace(SMALL, electrodes=32, select_from=128)).populations[0]
    assert selected.electrodes == 32
    assert np.median(selected.information()) > 2 * np.median(plain.information())


def test_plan_spreads_trials_over_sessions():
    blocks = plan_blocks(replace(SMALL, sessions=3, trials=(20, 4, 2)))
    counts = {}
    for block in blocks:
        key = (block.session, block.split)
        counts[key] = counts.get(key, 0) + len(block.sentences)
    assert [counts[(index, "train")] for index in range(3)] == [7, 7, 6]
    assert [counts.get((index, "test"), 0) for index in range(3)] == [1, 1, 0]


def test_existing_output_is_kept_unless_forced(written, tmp_path):
    folder = simulate(SMALL, tmp_path)
    before = digests(tmp_path)
    with pytest.raises(UserError, match="--force"):
        simulate(replace(SMALL, seed=5), tmp_path)
    assert digests(tmp_path) == before
    simulate(replace(SMALL, seed=5), tmp_path, force=True)
    assert digests(tmp_path) != before
    assert not list(tmp_path.glob("*.partial"))
    assert folder.is_dir()


def test_real_recordings_are_never_replaced(tmp_path):
    real = tmp_path / "hdf5_data_final" / "t15.2023.08.11" / "data_train.hdf5"
    real.parent.mkdir(parents=True)
    real.write_bytes(b"precious")
    with pytest.raises(UserError, match="real recording"):
        simulate(SMALL, tmp_path, force=True)
    assert real.read_bytes() == b"precious"


def test_output_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        simulate(SMALL, tmp_path / "file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trials": (0, 5, 5)}, "at least 1"),
        ({"trials": (5, 5, 0)}, "at least 1"),
        ({"sessions": 0}, "0 sessions"),
        ({"sessions": 15}, "15 sessions"),
        ({"electrodes": 6}, "multiple of 4"),
        ({"electrodes": 0}, "multiple of 4"),
        ({"select_from": 4}, "cannot select"),
        ({"speaking_rate": 0.0}, "speaking rate"),
        ({"variability": -1.0}, "variability"),
        ({"block_trials": 0}, "block"),
        ({"seed": -1}, "seed"),
        ({"population": PopulationConfig(tuning=-1.0)}, "tuning"),
        ({"population": PopulationConfig(noise=-1.0)}, "noise"),
    ],
)
def test_impossible_configurations(change, message):
    with pytest.raises(UserError, match=message):
        replace(SMALL, **change)


def test_unknown_vocabulary_and_exhausted_grammar(tmp_path):
    with pytest.raises(UserError, match="unknown vocabulary 51"):
        simulate(replace(SMALL, vocabulary=51), tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="jobs"):
        simulate(SMALL, tmp_path, jobs=0)


def test_a_block_does_not_depend_on_other_blocks():
    blocks = plan_blocks(SMALL)
    alone = Simulator(SMALL).record(blocks[3])
    simulator = Simulator(SMALL)
    after = [simulator.record(block) for block in blocks[:4]][3]
    np.testing.assert_array_equal(alone.counts, after.counts)


def test_blocks_and_sessions_draw_their_own_noise(monkeypatch):
    def fixed(text, rate, rng):
        return time_sentence(text, rate, np.random.default_rng(0))

    monkeypatch.setattr(simulation, "time_sentence", fixed)
    config = replace(SMALL, variability=0.0)
    simulator = Simulator(config)
    sentences = plan_blocks(config)[0].sentences
    first, later, elsewhere = (
        simulator.record(Block(session, number, "train", sentences))
        for session, number in ((0, 1), (0, 2), (1, 1))
    )
    for other in (later, elsewhere):
        surprise = [(item.counts - item.rates) / np.sqrt(item.rates) for item in (first, other)]
        assert abs(np.corrcoef(surprise[0].ravel(), surprise[1].ravel())[0, 1]) < 0.05


def test_seeds_change_sentences_population_and_noise():
    other = replace(SMALL, seed=1)
    assert plan_blocks(SMALL) != plan_blocks(other)
    mine, theirs = Simulator(SMALL).populations[0], Simulator(other).populations[0]
    assert not np.isclose(mine.baseline, theirs.baseline).any()
    assert SMALL.rng(0).random() != other.rng(0).random() != other.rng(1).random()
