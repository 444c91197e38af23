"""T12, its pickle, ZuCo, LaBraM, NWB, BIDS, BrainVision, written here from their descriptions."""

import os
import pickle
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from scipy.io import savemat

from b2t.data import sources
from b2t.data.phonemes import sentence_to_ids
from b2t.data.sources import SourceOptions, detect
from b2t.errors import UserError
from tests.data import matlab_73
from tests.data.release_files import (
    BANDS,
    SENTENCES,
    cells,
    days,
    struct_array,
    write_bids,
    write_brainvision,
    write_labram,
    write_nwb,
    write_t12,
    zuco_sentences,
)


@pytest.mark.parametrize("version", [5, 7.3])
def test_t12_reads_area_6v_of_both_features_and_its_splits(tmp_path, version):
    written = write_t12(tmp_path, version)
    source = detect(tmp_path)
    assert source.format == "t12" and source.sampling_rate == 50 and source.own_splits
    assert len(source.channels) == 256 and source.channels[0] == "crossings-6v-0"
    assert source.channels[128] == "power-6v-0"
    by_split = {"train": "train", "val": "test", "test": "competitionHoldOut"}
    for index, info in enumerate(source.trials):
        crossings, power = (feature[info.trial] for feature in written[by_split[info.split]])
        expected = np.concatenate([crossings[:, :128], power[:, :128]], 1)
        np.testing.assert_array_equal(source.read(index), expected.astype(np.float32))
        text = None if info.split == "test" else SENTENCES[info.trial]
        assert info.text == text and info.block == (1, 1, 2)[info.trial]
        assert info.phonemes == (None if text is None else tuple(sentence_to_ids(text)))
    assert {info.session for info in source.trials} == {"t12.2022.04.28"}


def test_t12_reads_other_areas_by_pattern(tmp_path):
    written = write_t12(tmp_path, splits=("train",))
    source = detect(tmp_path, SourceOptions(channels=("power-44-*",)))
    assert len(source.channels) == 128
    np.testing.assert_array_equal(
        source.read(0), written["train"][1][0][:, 128:].astype(np.float32)
    )
    assert len(detect(tmp_path, SourceOptions(channels=("*",))).channels) == 512


def test_t12_that_does_not_fit_together(tmp_path):
    (tmp_path / "train").mkdir()
    path = tmp_path / "train" / "t12.2022.04.28.mat"
    one = np.ones((9, 128))
    savemat(path, {"tx1": cells([one, one]), "spikePow": cells([one]), "blockIdx": [[1], [1]]})
    with pytest.raises(UserError, match=r"2 trials of tx1, 1 of spikePow"):
        detect(tmp_path)
    savemat(path, {"tx1": cells([one]), "spikePow": cells([one[:5]]), "blockIdx": [[1]]})
    with pytest.raises(UserError, match=r"tx1 has shape \[9, 128\] and spikePow \[5, 128\]"):
        detect(tmp_path).read(0)
    savemat(path, {"tx1": one, "spikePow": one, "blockIdx": [[1]]})
    with pytest.raises(UserError, match="tx1 is no cell array"):
        detect(tmp_path)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_the_pickle_of_any_protocol_is_read(tmp_path, protocol):
    content = {"train": days(), "test": days(1), "competition": []}
    path = tmp_path / "data.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    source = detect(path)
    assert source.standardized and len(source.trials) == 6
    assert [info.split for info in source.trials] == ["train"] * 4 + ["val"] * 2
    assert source.trials[0].phonemes == (7, 3, 40) and source.trials[0].text == SENTENCES[0]
    assert [info.session for info in source.trials] == ["day00"] * 2 + ["day01"] * 2 + [
        "day00",
        "day01",
    ]
    np.testing.assert_array_equal(
        source.read(3), content["train"][1]["sentenceDat"][1].astype(np.float32)
    )


class Attack:
    """What a stranger's pickle would run when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "attack",
    [
        Attack(os.system, "touch pwned"),
        Attack(eval, "open('pwned', 'w')"),
        Attack(getattr, "text", "format"),
        Attack(np.load, "pwned.npy"),
        Attack(np.dtype, "O"),
        np.array([Attack(os.system, "touch pwned")], dtype=object),
        np.array([{}], dtype=object),
        SimpleNamespace(a=1),
    ],
)
def test_a_pickle_runs_nothing(tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    data = days()
    data[0]["sentenceDat"][0] = attack
    (tmp_path / "data.pkl").write_bytes(pickle.dumps({"train": data}))
    with pytest.raises(UserError, match="cannot be read as a pickle of data"):
        detect(tmp_path / "data.pkl")
    assert not (tmp_path / "pwned").exists()


def test_a_pickle_of_something_else(tmp_path):
    path = tmp_path / "data.pkl"
    one = {"sentenceDat": [np.ones((3, 2))]}
    for content, message in (
        ({"a": 1}, "holds a: expected a dictionary with train"),
        ([1], "holds list: expected"),
        ({"train": [1]}, "train: expected a list of days"),
        ({"train": [{"sentenceDat": [np.ones(3)]}]}, r"float64 of shape \[3\]"),
        ({"train": [{**one, "phonemes": [[50]]}]}, "phonemes holds 50"),
        (
            {"train": [{**one, "phonemes": [[1], [2]]}]},
            "1 trials .* 2 in",
        ),
    ):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match=message):
            detect(path)


@pytest.mark.parametrize("version", [5, 7.3])
def test_zuco_by_words_and_by_sentences(tmp_path, version, caplog):
    sentences = zuco_sentences()
    path = tmp_path / "resultsZAB_SR.mat"
    if version == 5:
        savemat(path, {"sentenceData": struct_array(sentences)})
    else:
        matlab_73.save(path, {"sentenceData": sentences})
    with caplog.at_level("WARNING", logger="b2t"):
        source = detect(tmp_path)
    assert "left out: no word with a fixation was recorded" in caplog.text
    assert [info.text for info in source.trials] == SENTENCES[:2]
    assert (source.trials[0].subject, source.trials[0].session) == ("ZAB", "ZAB_SR")
    assert len(source.channels) == 40 and source.channels[5] == "GD_t2-E1"
    seen = [word for word in sentences[0]["word"] if word["GD_t1"].size]
    expected = np.stack(
        [np.concatenate([word[f"GD_{band}"].flatten() for band in BANDS]) for word in seen]
    )
    np.testing.assert_array_equal(source.read(0), expected.astype(np.float32))
    whole = detect(tmp_path, SourceOptions(level="sentences", resample=250.0))
    assert whole.sampling_rate == 250 and len(whole.channels) == 5
    whole = detect(tmp_path, SourceOptions(level="sentences"))
    np.testing.assert_array_equal(whole.read(1), sentences[1]["rawData"].T.astype(np.float32))


def test_zuco_options_that_mean_nothing(tmp_path):
    savemat(tmp_path / "resultsZAB_SR.mat", {"sentenceData": struct_array(zuco_sentences())})
    for options, message in (
        ({"signal": "XX"}, "--signal XX: ZuCo's words have GD, TRT, FFD"),
        ({"level": "words", "resample": 9.0}, "bins of --level words are words"),
        ({"level": "sentences", "signal": "GD"}, "leave it out"),
        ({"signal": "FFD"}, "no sentence with a signal"),
    ):
        with pytest.raises(UserError, match=message):
            detect(tmp_path, SourceOptions(**options))


def test_labram_groups_are_sessions(tmp_path):
    values = np.random.default_rng(0).standard_normal((3, 1000)).astype(np.float32)
    write_labram(tmp_path / "pretrain.hdf5", values, 200, ["FP1", "FP2", "F3"])
    source = detect(tmp_path, SourceOptions(channels=("F3", "FP1")))
    assert source.sampling_rate == 200 and source.channels == ["F3", "FP1"]
    assert {info.session for info in source.trials} == {"pretrain_sub1", "pretrain_sub2"}
    np.testing.assert_array_equal(source.read(1), values[[2, 0], 400:800].T)
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file.create_group("sub2").create_dataset("eeg", data=values)
    with pytest.raises(UserError, match="sub2: the attribute rsFreq is None"):
        detect(tmp_path / "other.hdf5")


def test_nwb_series_cut_by_trials(tmp_path):
    pytest.importorskip("pynwb")
    values = np.random.default_rng(0).standard_normal((1000, 3))
    trials = [(2.0, 3.0, "hello", "train"), (4.0, 4.5, "you", "val")]
    write_nwb(tmp_path / "a.nwb", values, trials=trials)
    source = detect(tmp_path, SourceOptions(text_column="sentence"))
    assert [(info.text, info.split) for info in source.trials] == [
        ("hello", "train"),
        ("you", "val"),
    ]
    assert source.own_splits and source.trials[0].subject == "monkey1"
    np.testing.assert_allclose(source.read(0), values[100:200] * 1e-6, rtol=1e-6)
    np.testing.assert_allclose(source.read(1), values[300:350] * 1e-6, rtol=1e-6)
    with pytest.raises(UserError, match=r"no column 'word' of trials.*sentence"):
        detect(tmp_path, SourceOptions(text_column="word"))


def test_nwb_spikes_are_counted_in_bins(tmp_path):
    pytest.importorskip("pynwb")
    generator = np.random.default_rng(0)
    spikes = [np.sort(generator.uniform(0, 10, count)) for count in (300, 500)]
    write_nwb(tmp_path / "a.nwb", None, spikes=spikes)
    source = detect(tmp_path, SourceOptions(window=2.0, bin_ms=20.0))
    assert source.sampling_rate == 50 and source.channels == ["unit0", "unit1"]
    for index, info in enumerate(source.trials):
        start = float(info.name.rsplit(", ", 1)[1].removesuffix(" s"))
        edges = start + np.arange(101) * 0.02
        expected = [np.histogram(times, edges)[0] for times in spikes]
        # A spike on an edge may be counted on either side of it.
        np.testing.assert_allclose(source.read(index), np.stack(expected, 1), atol=1e-9)


def test_nwb_asks_which_signal(tmp_path):
    pytest.importorskip("pynwb")
    write_nwb(tmp_path / "a.nwb", np.ones((500, 2)), spikes=[[0.1, 0.2]])
    assert detect(tmp_path).channels == ["channel0", "channel1"]
    with pytest.raises(UserError, match="no signal emg: --signal takes one of lfp, units"):
        detect(tmp_path, SourceOptions(signal="emg"))
    with pytest.raises(UserError, match="no trials table"):
        detect(tmp_path, SourceOptions(text_column="word"))


def test_bids_runs_are_sessions_with_events(tmp_path, write_edf):
    pytest.importorskip("mne_bids")
    microvolts = np.random.default_rng(0).standard_normal((2, 2000)) * 10
    files = {subject: tmp_path / f"{subject}.edf" for subject in ("01", "02")}
    for file in files.values():
        write_edf(file, microvolts, 100, ["Fz", "Cz"])
    write_bids(tmp_path / "study", files)
    source = detect(tmp_path / "study", SourceOptions(annotations=True))
    assert source.format == "bids"
    assert [info.text for info in source.trials] == ["yes", "no"] * 2
    assert {info.session for info in source.trials} == {"sub-01_task-speak", "sub-02_task-speak"}
    np.testing.assert_allclose(source.read(0), microvolts[:, 200:300].T * 1e-6, atol=1e-8)


def test_brainvision_as_written(tmp_path):
    pytest.importorskip("mne")
    values = np.random.default_rng(0).standard_normal((2000, 2)).astype("<f4") * 20
    write_brainvision(tmp_path, values, 10000)
    source = detect(tmp_path, SourceOptions(window=1.0))
    assert source.sampling_rate == 100 and source.channels == ["Fz", "Cz"]
    np.testing.assert_allclose(source.read(2), values[200:300] * 1e-6, rtol=1e-5)
    marked = detect(tmp_path, SourceOptions(window=1.0, annotations=True))
    texts = [info.text for info in marked.trials]
    assert "Stimulus/S  1" in texts
    np.testing.assert_allclose(
        marked.read(texts.index("Stimulus/S  1"))[:1], values[300:301] * 1e-6, rtol=1e-5
    )


def test_formats_of_other_packages_are_asked_first(tmp_path, monkeypatch):
    module = SimpleNamespace(
        NAME="mine",
        READS="mine",
        OPTIONS=frozenset(),
        find=lambda path: [path] if path.suffix == ".csv" else [],
        open_source=lambda path, files, options: ("opened", files),
    )
    point = SimpleNamespace(name="mine", value="mine:module", load=lambda: module)
    installed = {"b2t.sources": [point]}
    monkeypatch.setattr(sources, "entry_points", lambda group: installed[group])
    sources.formats.cache_clear()
    try:
        (tmp_path / "a.csv").write_text("time,a\n0,1\n1,2\n")
        assert detect(tmp_path / "a.csv") == ("opened", [tmp_path / "a.csv"])
        with pytest.raises(UserError, match="--source xdf: b2t reads mine, bids"):
            detect(tmp_path / "a.csv", source="xdf")
        module.find = None
        del module.READS
        sources.formats.cache_clear()
        with pytest.raises(UserError, match="the format mine of mine:module has no READS"):
            detect(tmp_path / "a.csv")
    finally:
        monkeypatch.undo()
        sources.formats.cache_clear()


def test_a_folder_of_two_formats_asks_for_one(tmp_path):
    (tmp_path / "a.csv").write_text("time,a\n" + "\n".join(f"{i / 10},{i}" for i in range(400)))
    savemat(tmp_path / "b.mat", {"y": np.ones((400, 2)), "fs": 10})
    with pytest.raises(UserError, match=r"mixes formats: .*b.mat .mat. and .*a.csv .csv.*--source"):
        detect(tmp_path)
    assert detect(tmp_path, source="csv").format == "csv"
    with pytest.raises(UserError, match="nothing that --source nwb reads"):
        detect(tmp_path, source="nwb")
