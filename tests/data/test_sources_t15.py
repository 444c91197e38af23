"""The T15 reader against files written from the layout of the release."""

import pickle

import h5py
import numpy as np
import pytest

from b2t.data.sources import SourceOptions, detect
from b2t.errors import UserError


def test_every_trial_with_its_labels(t15_release):
    folder, written = t15_release()
    source = detect(folder)
    assert (source.format, source.sampling_rate, source.standardized) == ("t15", 50.0, True)
    assert not source.simulated
    assert len(source.trials) == len(written) == 16
    assert [info.session for info in source.trials] == sorted(
        info.session for info in source.trials
    )
    for index, info in enumerate(source.trials):
        signal, labels = written[info.session, info.split, info.trial]
        np.testing.assert_array_equal(source.read(index), signal)
        assert info.text == labels.get("text")
        assert info.phonemes == (tuple(labels["phonemes"]) if labels else None)
        assert (info.subject, info.block) == ("t15", info.trial // 2)
        assert (info.text is None) == (info.split == "test")


def test_any_place_in_the_release_is_understood(t15_release):
    folder, _ = t15_release(8)
    session = folder / "hdf5_data_final" / "t15.2023.08.13"
    assert len(detect(folder / "hdf5_data_final").trials) == 16
    assert len(detect(session).trials) == 8
    one = detect(session / "data_val.hdf5")
    assert {info.split for info in one.trials} == {"val"}


def test_channels_are_named_by_feature_and_area(t15_release):
    folder, _ = t15_release()
    names = detect(folder).channels
    assert len(set(names)) == 512
    assert [names[index] for index in (0, 64, 128, 192, 256, 511)] == [
        "crossings-ventral6v-0",
        "crossings-area4-0",
        "crossings-55b-0",
        "crossings-dorsal6v-0",
        "power-ventral6v-0",
        "power-dorsal6v-63",
    ]
    narrow, _ = t15_release(8, name="narrow")
    assert detect(narrow).channels == [f"channel{index}" for index in range(8)]


def test_bins_after_n_time_steps_are_padding(t15_release):
    folder, written = t15_release(8)
    file = folder / "hdf5_data_final" / "t15.2023.08.11" / "data_train.hdf5"
    with h5py.File(file, "a") as release:
        release["trial_0001"].attrs["n_time_steps"] = 7
    source = detect(file)
    np.testing.assert_array_equal(source.read(1), written["t15.2023.08.11", "train", 1][0][:7])


@pytest.mark.parametrize("block", [0, 1024])
def test_signals_are_read_however_they_are_stored(tmp_path, t15_trial, block):
    """What lies in one piece is read without h5py, which is the truth here."""
    values = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)
    stored = [
        {"data": values}, {"data": values, "compression": "gzip"}, {"data": values + 1},
        {"data": values, "chunks": (7, 4)}, {"data": values.astype(np.float64)},
        {"data": values.astype(">f4")}, {"data": (10 * values).astype(np.int16)},
        {"data": values.astype(np.float16)}, {"shape": (40, 6), "dtype": "f4", "fillvalue": 2.5},
    ]  # fmt: skip
    path = tmp_path / "t15.2023.08.11" / "data_train.hdf5"
    path.parent.mkdir()
    with h5py.File(path, "w", userblock_size=block) as file:
        for number, storage in enumerate(stored):
            group = file.create_group(f"trial_{number:04d}")
            t15_trial(group, values, trial=number)
            del group["input_features"]
            group.create_dataset("input_features", **storage)
            group.attrs["n_time_steps"] = 31
    source = detect(path)
    for asked in (source, pickle.loads(pickle.dumps(source))):
        with h5py.File(path) as file:
            for number in (3, 0, *range(len(stored))):
                truth = file[f"trial_{number:04d}"]["input_features"][:31]
                found = asked.read(number)
                assert found.dtype == np.float32
                np.testing.assert_array_equal(found, truth.astype(np.float32))


def test_a_file_that_is_cut_after_it_was_opened_is_named(t15_release):
    folder, _ = t15_release(512)
    file = folder / "hdf5_data_final" / "t15.2023.08.11" / "data_train.hdf5"
    source = detect(file)
    with file.open("r+b") as content:
        content.truncate(file.stat().st_size - 30_000)
    with pytest.raises(UserError, match=r"data_train.hdf5, trial_0003: .*the file ends at byte"):
        for index in range(4):
            source.read(index)


def test_a_simulation_says_so(t15_release):
    folder, _ = t15_release(8)
    file = folder / "hdf5_data_final" / "t15.2023.08.11" / "data_train.hdf5"
    with h5py.File(file, "a") as release:
        release.attrs["simulated"] = True
    assert detect(folder).simulated


def test_resampling_halves_the_bins(t15_release):
    folder, _ = t15_release(8)
    source = detect(folder, SourceOptions(resample=25.0))
    assert source.sampling_rate == 25.0
    assert source.read(0).shape == (10, 8)


def replaced(name, content):
    def damage(trial):
        del trial[name]
        trial[name] = content

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda trial: trial.pop("input_features"), r"trial_0002.*input_features.*found \['seq_"),
        (lambda trial: trial.attrs.__setitem__("n_time_steps", 99), r"trial_0002.*99.*26 bins"),
        (lambda trial: trial["seq_class_ids"].write_direct(np.full(500, 41)), "1 to 40"),
        (lambda trial: trial.attrs.__setitem__("n_time_steps", -3), r"n_time_steps is -3.*26 bins"),
        (
            lambda trial: trial.attrs.__setitem__("n_time_steps", np.nan),
            r"n_time_steps is 'nan'.*whole",
        ),
        (
            lambda trial: trial.attrs.__setitem__("n_time_steps", "all"),
            r"n_time_steps is 'all'.*whole",
        ),
        (lambda trial: trial.attrs.__setitem__("seq_len", -1), r"seq_len is -1.*500 labels"),
        (lambda trial: trial.attrs.__setitem__("block_num", "two"), "block_num is 'two'"),
        (lambda trial: trial.attrs.__setitem__("session", [1, 2]), r"session is '\[1 2\]'.*text"),
        (replaced("input_features", np.full((4, 8), b"words")), r"input_features holds \|S5.*real"),
        (replaced("input_features", np.ones((4, 8)) * 1j), "input_features holds complex128"),
        (replaced("input_features", np.ones((4, 0))), r"input_features \[bins, channels\]"),
        (replaced("transcription", "a text"), r"transcription holds object of shape \(\)"),
        (replaced("transcription", np.full(9, -7)), "transcription holds -7"),
        (replaced("seq_class_ids", np.full(9, 1.5)), "seq_class_ids holds float64"),
        (replaced("input_features", h5py.SoftLink("/gone")), "expected a dataset input_features"),
    ],
)
def test_damage_is_named(t15_release, damage, message):
    folder, _ = t15_release(8)
    file = folder / "hdf5_data_final" / "t15.2023.08.11" / "data_train.hdf5"
    with h5py.File(file, "a") as release:
        damage(release["trial_0002"])
    with pytest.raises(UserError, match=message) as caught:
        detect(file).read(2)
    assert str(file) in str(caught.value)


def test_a_trial_that_is_no_group_is_named(t15_release):
    folder, _ = t15_release(8)
    file = folder / "hdf5_data_final" / "t15.2023.08.11" / "data_train.hdf5"
    with h5py.File(file, "a") as release:
        release["trial_0009"] = 5
    with pytest.raises(UserError, match=r"trial_0009: .* found no group"):
        detect(file)


def test_a_group_whose_bytes_are_gone_is_named(t15_release):
    folder, _ = t15_release(8)
    file = folder / "hdf5_data_final" / "t15.2023.08.11" / "data_train.hdf5"
    content = bytearray(file.read_bytes())
    for node in (b"TREE", b"SNOD", b"OHDR"):
        content = content.replace(node, b"\0\0\0\0")
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"{file}.*cannot be read"):
        detect(file)


def test_a_heap_that_libhdf5_would_walk_for_ever_is_refused(t15_release):
    folder, _ = t15_release(8)
    file = folder / "hdf5_data_final" / "t15.2023.08.11" / "data_train.hdf5"
    content = bytearray(file.read_bytes())
    heap = content.index(b"GCOL")
    content[heap + 16 : heap + 96] = bytes(80)
    file.write_bytes(content)
    with pytest.raises(
        UserError, match=rf"{file} cannot be read as HDF5 \(its heap at byte {heap}"
    ):
        detect(file)


def test_values_that_look_like_a_heap_are_values(tmp_path, t15_trial):
    folder = tmp_path / "hdf5_data_final" / "t15.2023.08.11"
    folder.mkdir(parents=True)
    bytes_ = np.random.default_rng(0).integers(0, 64, 4 * 64 * 200).astype(np.uint8)
    bytes_[4000:4008] = list(b"GCOL\x01\0\0\0")
    signal = bytes_.view("<f4").reshape(200, 64)
    file = folder / "data_train.hdf5"
    with h5py.File(file, "w") as release:
        t15_trial(release.create_group("trial_0000"), signal, text="It is fine.")
    np.testing.assert_array_equal(detect(file).read(0), signal)
    content = bytearray(file.read_bytes())
    heaps = [place for place in range(len(content)) if content.startswith(b"GCOL\x01\0\0\0", place)]
    assert len(heaps) == 2
    for heap in heaps:  # garbage in the values is the user's, in the heap it is damage
        damaged = bytearray(content)
        damaged[heap + 16 : heap + 96] = bytes(80)
        file.write_bytes(damaged)
        if content[heap - 4000 : heap + 9] == bytes_[:4009].tobytes():
            detect(file)
        else:
            with pytest.raises(UserError, match=rf"its heap at byte {heap} is damaged"):
                detect(file)


def test_a_header_that_claims_too_much_is_refused_before_memory_is_taken(t15_release, t15_trial):
    folder, _ = t15_release(8)
    file = folder / "hdf5_data_final" / "t15.2023.08.11" / "data_train.hdf5"
    with h5py.File(file, "a") as release:
        group = release["trial_0002"]
        del group["input_features"]
        group.create_dataset("input_features", (2**40, 8), "f4", chunks=(64, 8))
        group.attrs["n_time_steps"] = 2**40
    with pytest.raises(UserError, match="trial_0002: claims 1099511627776 bins × 8 channels"):
        detect(file).read(2)


def test_what_is_not_read_is_counted(t15_release, caplog):
    folder, _ = t15_release(8, (3, 2, 0))
    session = folder / "hdf5_data_final" / "t15.2023.08.11"
    for name in ("data_validation.hdf5", "Data_Train.h5"):
        (session / name).write_bytes((session / "data_val.hdf5").read_bytes())
    with h5py.File(session / "data_train.hdf5", "a") as release:
        release.move("trial_0001", "Trial_0001")
        release["trial_0002"].attrs["n_time_steps"] = 7
    with caplog.at_level("WARNING", logger="b2t"):
        source = detect(folder)
        said = [record.getMessage() for record in caplog.records]
        source.read(0)
        source.read(1)
        source.read(0)
        source.remarks.say()
    assert len(source.trials) == 9
    assert said[0].startswith(f"2 HDF5 files, the first {session / 'Data_Train.h5'}: not read")
    assert f"{session / 'data_train.hdf5'}, Trial_0001: not read; trials are named" in said[1]
    assert said[2].startswith("2 files, the first") and "data_test.hdf5: holds no trial" in said[2]
    padding = caplog.records[3].getMessage()
    assert len(said) == 3 and len(caplog.records) == 4
    assert "data_train.hdf5, trial_0002: bins after n_time_steps hold values" in padding


def test_a_link_to_nothing_is_refused(t15_release):
    folder, _ = t15_release(8)
    link = folder / "hdf5_data_final" / "t15.2023.08.11" / "data_test.hdf5"
    link.unlink()
    link.symlink_to("gone.hdf5")
    with pytest.raises(UserError, match=rf"{link} is a link to gone\.hdf5, which is not there"):
        detect(folder)


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), 0.001, 1e9, -50.0])
def test_a_rate_that_cannot_be_reached_is_refused(t15_release, rate):
    folder, _ = t15_release(8)
    with pytest.raises(UserError, match=r"--resample .*sampled at 50 Hz.*between 0\.5 and 500 Hz"):
        detect(folder, SourceOptions(resample=rate))


def test_unequal_channels_name_both_trials(t15_release, t15_trial):
    folder, _ = t15_release(8)
    file = folder / "hdf5_data_final" / "t15.2023.08.11" / "data_train.hdf5"
    with h5py.File(file, "a") as release:
        t15_trial(release.create_group("trial_0004"), np.zeros((5, 9), np.float32))
    with pytest.raises(UserError, match=r"trial_0000 has 8 channels.*trial_0004 has 9"):
        detect(folder)


def test_a_truncated_file_is_named(t15_release):
    folder, _ = t15_release(8)
    file = folder / "hdf5_data_final" / "t15.2023.08.11" / "data_train.hdf5"
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"data_train\.hdf5 cannot be read as HDF5"):
        detect(folder)


def test_other_places_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        detect(tmp_path / "absent")
    with pytest.raises(UserError, match="an empty folder"):
        detect(tmp_path)
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(UserError, match=r"notes\.txt"):
        detect(tmp_path)
    (tmp_path / "data_train.hdf5").write_text("not HDF5")
    with pytest.raises(UserError, match="cannot be read as HDF5"):
        detect(tmp_path)
