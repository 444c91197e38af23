"""The MNE reader on files written here and on real recordings."""

import contextlib
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat
from scipy.sparse import csc_array

from b2t.data.remarks import Remarks
from b2t.data.sources import SourceOptions, detect
from b2t.data.sources.base import resampled
from b2t.data.sources.cutting import windows
from b2t.data.sources.mat_check import require_sound
from b2t.data.sources.recording import Recording
from b2t.errors import UserError

mne = pytest.importorskip("mne")

RATE = 100
LABELS = ["Fz", "Cz", "Pz"]


def microvolts(seconds: int = 20, channels: int = 3) -> np.ndarray:
    return 50 * np.random.default_rng(0).standard_normal((channels, seconds * RATE))


def write_fif(path, labels=LABELS, *, rate=RATE, seconds=20, annotations=(), stim=False):
    data = microvolts(seconds, len(labels)) * 1e-6
    kinds = ["eeg"] * len(labels)
    if stim:
        labels = [*labels, "STI"]
        kinds.append("stim")
        data = np.vstack([data, np.arange(data.shape[1])[None]])
    raw = mne.io.RawArray(data, mne.create_info(labels, rate, kinds), verbose="ERROR")
    for onset, duration, description in annotations:
        raw.annotations.append(onset, duration, description)
    raw.save(path, verbose="ERROR")
    return data[:3]


@pytest.mark.parametrize("extension", ["edf", "bdf", "set"])
def test_every_format_gives_the_signal_in_volts(tmp_path, write_edf, write_set, extension, capfd):
    data = microvolts()
    file = tmp_path / f"day1.{extension}"
    if extension == "set":
        write_set(file, data, RATE, LABELS)
    else:
        write_edf(file, data, RATE, LABELS)
    source = detect(file)
    assert (source.channels, source.sampling_rate) == (LABELS, RATE)
    assert {info.session for info in source.trials} == {"day1"}
    first = next(index for index, info in enumerate(source.trials) if info.split == "val")
    np.testing.assert_allclose(source.read(0), data[:, :200].T * 1e-6, atol=1e-8)
    np.testing.assert_allclose(source.read(first), data[:, 1600:1800].T * 1e-6, atol=1e-8)
    assert capfd.readouterr() == ("", "")


def test_fif_without_its_trigger_channel(tmp_path):
    data = write_fif(tmp_path / "day1_raw.fif", stim=True)
    source = detect(tmp_path)
    assert source.channels == LABELS and source.trials[0].session == "day1"
    np.testing.assert_allclose(source.read(0), data[:, :200].T, rtol=1e-5)


def test_windows_of_different_splits_share_no_sample(tmp_path):
    write_fif(tmp_path / "a_raw.fif")
    options = SourceOptions(window=1.5, overlap=0.5, fractions=(0.6, 0.2, 0.2))
    source = detect(tmp_path, options)
    starts = {"train": [], "val": [], "test": []}
    for info in source.trials:
        starts[info.split].append(float(info.name.split(", ")[1].removesuffix(" s")))
    for split, low, high in (("train", 0, 12), ("val", 12, 16), ("test", 16, 20)):
        assert starts[split][0] == low and max(starts[split]) + 1.5 <= high
        np.testing.assert_allclose(np.diff(starts[split]), 0.75)
        assert high - (max(starts[split]) + 1.5) < 0.75


def test_bad_stretches_are_left_out(tmp_path):
    write_fif(tmp_path / "a_raw.fif", annotations=[(5.0, 0.5, "BAD_jump"), (8.5, 1.0, "word")])
    starts = [float(info.name.split(", ")[1][:-2]) for info in detect(tmp_path).trials]
    assert 4.0 not in starts and {2.0, 6.0, 8.0} <= set(starts)


def test_annotations_are_trials_with_text(tmp_path):
    marks = [(1.0, 2.0, "hello"), (5.0, 0.0, "world"), (9.0, 1.0, "BAD"), (19.5, 0.0, "cut off")]
    data = write_fif(tmp_path / "a_raw.fif", annotations=marks)
    source = detect(tmp_path, SourceOptions(annotations=True, window=1.5))
    assert [info.text for info in source.trials] == ["hello", "world"]
    assert all(info.split is None for info in source.trials)
    np.testing.assert_allclose(source.read(0), data[:, 100:300].T, rtol=1e-5)
    np.testing.assert_allclose(source.read(1), data[:, 500:650].T, rtol=1e-5)


def test_annotations_of_a_cropped_recording_stay_in_place(tmp_path):
    data = microvolts() * 1e-6
    raw = mne.io.RawArray(data, mne.create_info(LABELS, RATE, "eeg"), verbose="ERROR")
    raw.set_meas_date(1_000_000)
    raw.set_annotations(mne.Annotations(6.0, 1.0, "here", orig_time=raw.info["meas_date"]))
    raw.crop(4.0).save(tmp_path / "a_raw.fif", verbose="ERROR")
    source = detect(tmp_path, SourceOptions(annotations=True))
    np.testing.assert_allclose(source.read(0), data[:, 600:700].T, rtol=1e-5)


def test_eeglab_epochs_are_trials(tmp_path, write_set):
    data = microvolts(12).reshape(3, 100, 12)
    write_set(tmp_path / "words.set", data, RATE, LABELS)
    source = detect(tmp_path, SourceOptions(text_column="event"))
    assert len(source.trials) == 12 and source.trials[3].text == "word"
    np.testing.assert_allclose(source.read(5), data[:, :, 5].T * 1e-6, atol=1e-9)


def test_channels_can_be_chosen_and_ordered(tmp_path):
    data = write_fif(tmp_path / "a_raw.fif")
    source = detect(tmp_path, SourceOptions(channels=("Pz", "Fz")))
    assert source.channels == ["Pz", "Fz"]
    np.testing.assert_allclose(source.read(0), data[[2, 0], :200].T, rtol=1e-5)
    with pytest.raises(UserError, match=r"no channel Oz.*Fz, Cz, Pz"):
        detect(tmp_path, SourceOptions(channels=("Oz",)))


def test_unequal_channels_and_rates_name_both_files(tmp_path):
    write_fif(tmp_path / "a_raw.fif")
    write_fif(tmp_path / "b_raw.fif", ["Fz", "Cz", "Oz"])
    with pytest.raises(UserError, match=r"a_raw\.fif has 3.*Pz.*b_raw\.fif has 3.*Oz.*--channels"):
        detect(tmp_path)
    assert detect(tmp_path, SourceOptions(channels=("Cz",))).channels == ["Cz"]
    write_fif(tmp_path / "c_raw.fif", rate=50, seconds=20)
    (tmp_path / "b_raw.fif").unlink()
    with pytest.raises(UserError, match=r"a_raw\.fif is sampled at 100 Hz.*c_raw\.fif at 50 Hz"):
        detect(tmp_path)
    assert detect(tmp_path, SourceOptions(resample=50)).sampling_rate == 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0.0}, "--window 0"),
        ({"overlap": 1.0}, "--overlap 1"),
        ({"window": 30.0}, "lasts 20.0 s"),
        ({"annotations": True}, "no annotations"),
        ({"window": float("nan")}, "--window nan"),
        ({"window": float("inf")}, "--window inf"),
        ({"window": 1e-9}, r"--window 1e-09.*100 Hz.*less than 2 bins"),
        ({"window": 0.02, "resample": 20.0}, r"--window 0\.02.*20 Hz.*less than 2 bins"),
        ({"overlap": float("nan")}, "--overlap nan"),
        ({"resample": float("nan")}, r"--resample nan.*100 Hz.*between 1 and 1000 Hz"),
        ({"resample": float("inf")}, "--resample inf"),
        ({"resample": 0.001}, r"--resample 0\.001"),
        ({"resample": 1e9}, r"--resample 1e\+09"),
        ({"channels": ("Fz", "Pz", "Fz")}, "--channels names Fz more than once"),
    ],
)
def test_options_that_make_no_sense(tmp_path, options, message):
    write_fif(tmp_path / "a_raw.fif")
    with pytest.raises(UserError, match=message):
        detect(tmp_path, SourceOptions(**options))


def test_more_windows_than_can_be_meant_are_refused_at_once():
    recording = Recording(Path("a.fif"), "a", "a", ["Fz"], 1000.0, 10**12, read=lambda *_: None)
    with pytest.raises(UserError, match=r"a\.fif: .*cuts 500000000 windows, more than 1048576"):
        windows(recording, SourceOptions(window=2.0), Remarks())


def said(caplog, path, **options):
    with caplog.at_level("INFO", logger="b2t"):
        source = detect(path, SourceOptions(**options))
        for index in range(len(source.trials)):
            source.read(index)
        source.remarks.say()
    return [record.getMessage() for record in caplog.records if record.name.startswith("b2t")]


def test_an_overlap_that_repeats_everything_is_remarked_on(tmp_path, caplog):
    write_fif(tmp_path / "a_raw.fif")
    assert "in about 100 windows" in "".join(said(caplog, tmp_path, window=1.0, overlap=0.9999))
    caplog.clear()
    assert "lower --overlap" not in "".join(said(caplog, tmp_path, overlap=0.5))


def test_a_recording_cut_short_is_said_or_refused(tmp_path, write_edf, write_set, caplog):
    write_edf(tmp_path / "a.edf", microvolts(), RATE, LABELS)
    content = (tmp_path / "a.edf").read_bytes()
    (tmp_path / "a.edf").write_bytes(content[: int(0.9 * len(content))])
    lines = said(caplog, tmp_path / "a.edf")
    assert "Number of records from the header does not match" in "".join(lines)
    write_set(tmp_path / "a.set", microvolts(), RATE, LABELS)
    write_fif(tmp_path / "a_raw.fif")
    for name in ("a.set", "a_raw.fif"):
        content = (tmp_path / name).read_bytes()
        for share in (0.1, 0.5, 0.7, 0.9, 0.99):
            (tmp_path / name).write_bytes(content[: int(share * len(content))])
            with pytest.raises(UserError, match=rf"{name} cannot be read as"):
                said(caplog, tmp_path / name)


def test_what_is_left_out_is_said(tmp_path, caplog):
    write_fif(tmp_path / "a_raw.fif", seconds=15)
    lines = said(caplog, tmp_path)
    # Splits of 12, 1.5 and 1.5 s: six windows of 2 s, and none in the others.
    assert "its val share is shorter than a window" in lines[0]
    assert "its test share is shorter than a window" in lines[1]
    assert lines[2].startswith(f"{tmp_path}/a_raw.fif (3.0 s of 15.0 s): the ends of its splits")
    marks = [(1.0, 2.0, "hello"), (14.0, 0.0, "cut off")]
    write_fif(tmp_path / "b_raw.fif", seconds=15, annotations=marks)
    caplog.clear()
    lines = said(caplog, tmp_path / "b_raw.fif", annotations=True, window=1.5)
    assert lines == [f"{tmp_path}/b_raw.fif, cut off: left out, as it ends after the recording"]


def test_microvolts_taken_for_volts_are_remarked_on(tmp_path, write_edf, caplog):
    write_edf(tmp_path / "a.edf", microvolts() * 1e6, RATE, LABELS)
    write_edf(tmp_path / "b.edf", microvolts() * 2e6, RATE, LABELS)
    lines = said(caplog, tmp_path)
    assert len(lines) == 1
    assert lines[0].startswith(f"2 files, the first {tmp_path}/a.edf (3e+00 V): eeg varies by")
    assert "microvolts taken for volts" in lines[0]


def test_a_channel_named_twice_is_said(tmp_path, write_edf, caplog):
    write_edf(tmp_path / "a.edf", microvolts(), RATE, ["Fz", "Cz", "Fz"])
    assert "Channel names are not unique" in said(caplog, tmp_path)[0]


def test_a_recording_in_several_files_is_read_once(tmp_path):
    write_fif(tmp_path / "whole_raw.fif", seconds=400, labels=[f"E{n}" for n in range(20)])
    raw = mne.io.read_raw(tmp_path / "whole_raw.fif", verbose="ERROR")
    (tmp_path / "split").mkdir()
    raw.save(tmp_path / "split" / "a_raw.fif", split_size="2MB", verbose="ERROR")
    assert len(list((tmp_path / "split").iterdir())) > 1
    source, whole = detect(tmp_path / "split"), detect(tmp_path / "whole_raw.fif")
    assert {info.session for info in source.trials} == {"a"}
    assert len(source.trials) == len(whole.trials) == 200
    np.testing.assert_array_equal(source.read(150), whole.read(150))


def test_two_files_of_one_session_are_refused(tmp_path):
    write_fif(tmp_path / "a_raw.fif")
    write_fif(tmp_path / "a_eeg.fif")
    with pytest.raises(UserError, match=r"a_eeg\.fif and .*a_raw\.fif would both be session 'a'"):
        detect(tmp_path)


@pytest.mark.parametrize("name", ["broken.edf", "broken.bdf", "broken.set", "broken_raw.fif"])
@pytest.mark.parametrize("content", [b"", b"0       " + b"x" * 300], ids=["empty", "noise"])
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} cannot be read as {name[-3:].upper()}"):
        detect(tmp_path)


def test_tags_of_a_fif_that_lead_in_a_circle_are_refused(tmp_path):
    write_fif(tmp_path / "a_raw.fif")
    content = bytearray((tmp_path / "a_raw.fif").read_bytes())
    content[36 + 12 : 36 + 16] = (0).to_bytes(4, "big")
    size = int.from_bytes(content[36 + 8 : 36 + 12], "big")
    third = 36 + 16 + size
    content[third + 12 : third + 16] = (36).to_bytes(4, "big")
    content[52:56] = b"\0\0\0\0"  # no directory: readers follow the tags
    (tmp_path / "a_raw.fif").write_bytes(content)
    with pytest.raises(UserError, match=r"a_raw\.fif cannot be read as FIF: its tags lead in a"):
        detect(tmp_path)


def test_a_type_that_ends_scipy_is_refused_before_it_is_read(tmp_path, write_set):
    write_set(tmp_path / "a.set", microvolts(), RATE, LABELS)
    content = bytearray((tmp_path / "a.set").read_bytes())
    place = content.index(np.float64(RATE).tobytes()) - 8
    content[place : place + 4] = (0xFFF0).to_bytes(4, "little")
    (tmp_path / "a.set").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.set cannot be read as SET \(an element is of the unk"):
        detect(tmp_path)


def test_every_file_that_scipy_reads_is_sound(tmp_path):
    odd = np.array([(np.arange(3.0), "ü", [])], dtype=[("a", object), ("b", object), ("c", object)])
    for index, compress in enumerate((False, True)):
        content = {
            "cells": np.array([[1, "text"], [np.zeros((2, 0)), odd]], dtype=object),
            "sparse": csc_array(np.eye(9)),
            "complex": np.ones((3, 2)) * 1j,
            "small": np.uint8([[7]]),
            "yes": np.array([True, False]),
            "struct": {"x": {"y": np.int16([1, 2])}},
            "empty": np.zeros((0, 3)),
        }
        savemat(tmp_path / f"{index}.mat", content, do_compression=compress)
        require_sound(tmp_path / f"{index}.mat")
        whole = (tmp_path / f"{index}.mat").read_bytes()
        for cut in range(129, len(whole), 97):
            (tmp_path / "cut.mat").write_bytes(whole[:cut])
            with contextlib.suppress(UserError):
                require_sound(tmp_path / "cut.mat")
                loadmat(tmp_path / "cut.mat")  # what is let through is read without an error


def test_a_shape_that_a_file_cannot_hold_is_refused(tmp_path):
    savemat(tmp_path / "a.mat", {"x": np.zeros((5, 7))})
    content = (tmp_path / "a.mat").read_bytes()
    claimed = content.replace(np.int32([5, 7]).tobytes(), np.int32([2**30, 7]).tobytes())
    (tmp_path / "a.mat").write_bytes(claimed)
    with pytest.raises(UserError, match=r"claims the shape \(1073741824, 7\)"):
        require_sound(tmp_path / "a.mat")


@pytest.mark.parametrize("content", [{"other": 1.0}, {"EEG": np.zeros((0, 0))}, {"EEG": "text"}])
def test_a_set_without_a_recording_is_named(tmp_path, content):
    savemat(tmp_path / "a.set", content, appendmat=False)
    with pytest.raises(UserError, match=r"a\.set cannot be read as SET"):
        detect(tmp_path)


@pytest.mark.parametrize("rate", [0.0, float("nan"), -100.0, 1e300])
def test_a_sampling_rate_that_cannot_be_is_named(tmp_path, write_set, rate):
    write_set(tmp_path / "a.set", microvolts(), RATE, LABELS)
    content = loadmat(tmp_path / "a.set")
    content["EEG"]["srate"][0, 0] = rate
    savemat(tmp_path / "a.set", {"EEG": content["EEG"]}, appendmat=False)
    with pytest.raises(UserError, match=r"a\.set"):
        detect(tmp_path)


def test_without_mne_the_message_tells_what_to_install(tmp_path, monkeypatch):
    write_fif(tmp_path / "a_raw.fif")
    monkeypatch.setitem(sys.modules, "mne", None)
    with pytest.raises(UserError, match=r'pip install "b2t\[eeg\]"'):
        detect(tmp_path)


@pytest.mark.parametrize(("recorded", "wanted"), [(256.0, 100.0), (250.0, 500.0), (512.0, 128.0)])
def test_resampled_windows_are_cut_from_the_resampled_whole(recorded, wanted):
    time = np.arange(int(20 * recorded)) / recorded
    whole = np.stack([np.sin(2 * np.pi * 7 * time), np.cos(2 * np.pi * 11 * time)], axis=1)
    for start in (0, 37, 700, 1233):
        stop = start + int(2 * recorded)
        window = resampled(
            lambda low, high: whole[low:high], start, stop, (0, len(whole)), (recorded, wanted)
        )
        at = start / recorded + np.arange(len(window)) / wanted
        truth = np.stack([np.sin(2 * np.pi * 7 * at), np.cos(2 * np.pi * 11 * at)], axis=1)
        assert len(window) == 2 * wanted
        inner = slice(20, None) if start < 64 else slice(None)
        np.testing.assert_allclose(window[inner], truth[inner], atol=0.01)


def test_resampling_never_reads_outside_its_split():
    asked = []

    def read(low, high):
        asked.append((low, high))
        return np.zeros((high - low, 1))

    resampled(read, 1000, 1512, (1000, 1600), (256.0, 100.0))
    resampled(read, 1088, 1600, (1000, 1600), (256.0, 100.0))
    assert min(low for low, _ in asked) >= 1000 and max(high for _, high in asked) <= 1600


def test_real_epochs_with_words(real_data):
    source = detect(real_data / "wordpair", SourceOptions(text_column="association"))
    assert len(source.trials) == 200 and len(source.channels) == 32
    file = next((real_data / "wordpair").glob("*.fif"))
    epochs = mne.read_epochs(file, verbose="ERROR")
    assert [info.text for info in source.trials] == list(epochs.metadata["association"])
    assert source.trials[0].subject == "subject04"
    np.testing.assert_allclose(source.read(17), epochs.get_data(verbose="ERROR")[17].T, rtol=1e-6)


def test_real_epochs_ask_for_a_column_they_have(real_data):
    with pytest.raises(UserError, match="takes cue, association"):
        detect(real_data / "wordpair", SourceOptions(text_column="words"))


def test_real_continuous_recordings(real_data):
    source = detect(real_data / "p300_fif")
    assert len(source.channels) == 14 and source.sampling_rate == 256
    assert len({info.session for info in source.trials}) == 3
    file = sorted((real_data / "p300_fif").glob("*.fif"))[0]
    raw = mne.io.read_raw(file, verbose="ERROR").pick("eeg")
    np.testing.assert_array_equal(source.read(1), raw.get_data(start=512, stop=1024).T)
