"""The T15 reader against files written from the layout of the release."""

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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda trial: trial.pop("input_features"), r"trial_0002.*input_features.*found \['seq_"),
        (lambda trial: trial.attrs.modify("n_time_steps", 99), r"trial_0002.*99.*26 bins"),
        (lambda trial: trial["seq_class_ids"].write_direct(np.full(500, 41)), "1 to 40"),
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
