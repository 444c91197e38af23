"""CSV, MATLAB and NumPy sources, on files written here and on real recordings."""

import gzip
import json
import zipfile

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from b2t.data.sources import SourceOptions, detect
from b2t.errors import UserError
from tests.data import matlab_73

RATE = 100


def signal(bins: int = 1000, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((bins, channels))


def table(values: np.ndarray, names=("Fz", "Cz", "Pz"), **more) -> str:
    """CSV text of a signal, with more columns by name."""
    lines = [",".join([*more, *names])]
    for row in range(len(values)):
        cells = [str(column[row]) for column in more.values()]
        lines.append(",".join([*cells, *(repr(float(value)) for value in values[row])]))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("kind", ["csv", "tsv", "csv.gz", "zip"])
def test_a_table_of_times_is_a_continuous_recording(tmp_path, kind):
    values, times = signal(), np.arange(1000) / RATE
    text = table(values, time=times)
    path = tmp_path / f"day1.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("inner.csv", text)
    elif kind == "csv.gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text.replace(",", "\t") if kind == "tsv" else text)
    source = detect(path, SourceOptions(window=1.0))
    assert source.channels == ["Fz", "Cz", "Pz"] and source.sampling_rate == RATE
    assert {info.session for info in source.trials} == {"day1"} and len(source.trials) == 10
    for index, info in enumerate(source.trials):
        start = round(float(info.name.rsplit(", ", 1)[1].removesuffix(" s")) * RATE)
        np.testing.assert_allclose(source.read(index), values[start : start + RATE], rtol=1e-6)


def test_epochs_and_labels_of_a_table_are_trials_and_texts(tmp_path):
    values = signal(30)
    words = ["go"] * 10 + ["stop"] * 10 + [""] * 10
    path = tmp_path / "a.csv"
    path.write_text(
        table(values, **{"Time:50Hz": range(30), "Epoch": np.repeat([4, 5, 6], 10), "Label": words})
    )
    source = detect(path, SourceOptions(text_column="Label", channels=("Pz", "Fz")))
    assert [info.text for info in source.trials] == ["go", "stop", None]
    assert source.sampling_rate == 50 and source.channels == ["Pz", "Fz"]
    np.testing.assert_allclose(source.read(1), values[10:20][:, [2, 0]], rtol=1e-6)


def test_labels_without_epochs_are_cut_where_they_change(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(
        table(signal(40), time=np.arange(40) / 20, word=["a"] * 15 + [""] * 5 + ["b"] * 20)
    )
    source = detect(path, SourceOptions(text_column="word"))
    assert [(info.text, len(source.read(i))) for i, info in enumerate(source.trials)] == [
        ("a", 15),
        ("b", 20),
    ]


@pytest.mark.parametrize(
    "name, per_second",
    [
        ("time", 1), ("time_ms", 1e3), ("Time (ms)", 1e3), ("timestamp [us]", 1e6),
        ("time_s", 1), ("t/milliseconds", 1e3), ("Time (µs)", 1e6), ("time_seconds", 1),
    ],
)  # fmt: skip
def test_times_have_the_unit_that_their_column_names(tmp_path, name, per_second):
    path = tmp_path / "a.csv"
    path.write_text(table(signal(), **{name: np.arange(1000) / RATE * per_second}))
    source = detect(path)
    assert source.sampling_rate == RATE and source.channels == ["Fz", "Cz", "Pz"]


def test_times_that_jump_are_told(tmp_path, caplog):
    times = np.arange(1000) / RATE
    for jump in (0.0, 3.0):
        path = tmp_path / f"a{jump:g}.csv"
        path.write_text(table(signal(), time=times + jump * (times >= 4)))
        with caplog.at_level("WARNING", logger="b2t"):
            detect(path).remarks.say()
        assert ("a3.csv: times jump 1 times, first after row 400" in caplog.text) == (jump > 0)
        assert "a0.csv: times jump" not in caplog.text


@pytest.mark.parametrize(
    "text, options, message",
    [
        ("a,b\n", {}, "column names and no row"),
        ("a,a\n1,2\n", {}, "names column 'a' twice"),
        ("x,y\n1,2\n3,4\n", {}, "does not say its sampling rate"),
        ("x,y\n1,2\n3,4\n", {"rate": "fs"}, "--rate fs: a number of Hz above 0"),
        ("x,y\n1,2\n3,4\n", {"rate": "-1"}, "--rate -1: a number of Hz above 0"),
        ("x,y\n1,2\n3,4\n", {"rate": "9", "text_column": "word"}, "no column 'word'"),
        ("x,y\n1,2\n3\n", {"rate": "9"}, "cannot be read as a table"),
        ("name,word\na,b\n", {"rate": "9"}, "no column of numbers"),
        ("x,y\n1,2\n3,4\n", {"rate": "9", "channels": ("z",)}, "no channel z"),
        ("x,y\n1,2\n3,4\n", {"rate": "9", "channels": ("x", "*")}, "names x more than once"),
        ("x,y\n1,2\n3,4\n", {"rate": "9", "signal": "x"}, "read as csv .*--signal means nothing"),
    ],
)
def test_tables_that_cannot_be_meant(tmp_path, text, options, message):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        detect(path, SourceOptions(**options))


def test_feis_as_pandas_reads_it(real_data):
    pandas = pytest.importorskip("pandas")
    path = real_data / "feis/01.articulators.zip"
    source = detect(path, SourceOptions(text_column="Label"))
    truth = pandas.read_csv(path)
    names = list(truth.columns[2:16])
    assert source.channels == names and source.sampling_rate == 256
    groups = [group for _, group in truth.groupby("Epoch", sort=False)]
    assert len(source.trials) == len(groups) == 160
    for index in (0, 77, 159):
        assert source.trials[index].text == groups[index]["Label"].iloc[0]
        np.testing.assert_allclose(source.read(index), groups[index][names].to_numpy(), rtol=1e-6)


def save_mat(path, variables, version):
    if version == 5:
        savemat(path, variables)
    else:
        matlab_73.save(path, variables)


@pytest.mark.parametrize("version", [5, 7.3])
def test_matlab_signal_and_rate_are_found_or_named(tmp_path, version):
    values = signal()
    save_mat(
        tmp_path / "S1.mat",
        {"y": values, "fs": np.array([[100.0]]), "mark": np.zeros((1000, 1))},
        version,
    )
    found = detect(tmp_path, SourceOptions(window=1.0))
    named = detect(tmp_path / "S1.mat", SourceOptions(window=1.0, signal="y", rate="fs"))
    assert found.sampling_rate == named.sampling_rate == RATE and len(found.trials) == 10
    np.testing.assert_array_equal(found.read(3), values[300:400].astype(np.float32))
    turned = tmp_path / "turned"
    turned.mkdir()
    save_mat(turned / "S1.mat", {"y": values.T}, version)
    options = SourceOptions(window=1.0, rate="100", layout="channels-first", channels=("channel2",))
    np.testing.assert_array_equal(
        detect(turned, options).read(3), values[300:400, 2:].astype(np.float32)
    )


def test_matlab_trials_of_three_dimensions(tmp_path):
    values = np.random.default_rng(1).standard_normal((5, 40, 3))
    savemat(tmp_path / "a.mat", {"epochs": values, "srate": 20})
    source = detect(tmp_path)
    assert len(source.trials) == 5 and source.trials[0].split is None
    np.testing.assert_array_equal(source.read(4), values[4].astype(np.float32))


@pytest.mark.parametrize(
    "variables, options, message",
    [
        ({"y": np.ones((90, 2))}, {}, "does not say its sampling rate"),
        ({"y": np.ones((90, 2)), "fs": np.ones(3)}, {}, "fs holds 3 numbers"),
        ({"y": np.ones((90, 2)), "z": np.ones((80, 2)), "fs": 9}, {}, "several tables .y, z"),
        ({"fs": 9}, {}, "no table of numbers"),
        ({"y": np.ones((90, 2)), "fs": 9}, {"signal": "x"}, "no variable x"),
        ({"y": 1j * np.ones((90, 2)), "fs": 9}, {}, "complex128, where real numbers"),
        ({"y": np.ones((90, 2)), "fs": 9}, {"text_column": "a"}, "--text-column means nothing"),
    ],
)
def test_matlab_files_that_cannot_be_meant(tmp_path, variables, options, message):
    savemat(tmp_path / "a.mat", variables)
    with pytest.raises(UserError, match=message):
        detect(tmp_path / "a.mat", SourceOptions(**options))


def test_p300_as_scipy_reads_it(real_data):
    path = real_data / "p300_mat/S1.mat"
    truth = loadmat(path)["y"]
    source = detect(path, SourceOptions(window=2.0))
    assert source.sampling_rate == 250 and len(source.channels) == 8
    for index in (0, 50):
        start = round(float(source.trials[index].name.rsplit(", ", 1)[1].removesuffix(" s")) * 250)
        np.testing.assert_allclose(source.read(index), truth[start : start + 500], rtol=1e-6)


def listed(folder, *lines):
    (folder / "trials.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder / "trials.jsonl"


def test_numpy_with_a_list_of_texts(tmp_path):
    one, two = signal(40), signal(60)
    np.save(tmp_path / "one.npy", one)
    np.savez(tmp_path / "more.npz", two=two, other=signal(9, 2))
    listed(
        tmp_path,
        {
            "file": "one.npy",
            "text": "Good day.",
            "session": "d1",
            "split": "train",
            "phonemes": [7, 40],
        },
        {
            "file": "more.npz",
            "key": "two",
            "session": "d2",
            "subject": "s",
            "block": 3,
            "trial": 8,
            "split": "val",
        },
    )
    source = detect(tmp_path, SourceOptions(rate="50"))
    first, second = source.trials
    assert (first.text, first.session, first.split, first.phonemes) == (
        "Good day.",
        "d1",
        "train",
        (7, 40),
    )
    assert (second.session, second.subject, second.block, second.trial) == ("d2", "s", 3, 8)
    assert source.own_splits
    np.testing.assert_array_equal(source.read(0), one.astype(np.float32))
    np.testing.assert_array_equal(source.read(1), two.astype(np.float32))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_line_of_json_ends_where_json_ends_it(tmp_path, encoding):
    np.save(tmp_path / "one.npy", signal(20, 3))
    said = ["one\u2028two", "three\x85four", "five"]
    lines = [json.dumps({"file": "one.npy", "text": t}, ensure_ascii=False) for t in said]
    (tmp_path / "trials.jsonl").write_text("\r\n".join([*lines, ""]), encoding)
    source = detect(tmp_path, SourceOptions(rate="50"))
    assert [info.text for info in source.trials] == said


def test_numpy_alone_is_continuous_and_looks_at_its_layout(tmp_path, caplog):
    np.save(tmp_path / "wide.npy", signal(300, 5).T)
    with caplog.at_level("WARNING", logger="b2t"), pytest.raises(UserError):
        detect(tmp_path, SourceOptions(rate="10"))
    assert "if channels come first, give --layout channels-first" in caplog.text
    source = detect(tmp_path, SourceOptions(rate="10", layout="channels-first"))
    np.testing.assert_array_equal(source.read(0), signal(300, 5)[:20].astype(np.float32))


@pytest.mark.parametrize(
    "line, message",
    [
        ({"file": "gone.npy"}, "gone.npy is not there"),
        ({"file": "flat.npy"}, r"shape \[7\], where a trial"),
        ({"file": "words.npy"}, "<U1, where real numbers"),
        ({"file": "objects.npy"}, "holds Python objects"),
        ({"file": "one.npy", "sesion": "a"}, "sesion: Extra inputs"),
        ({"file": "one.npy", "split": "dev"}, "split: Input should be 'train', 'val' or 'test'"),
        ({"file": "one.npy", "phonemes": [41]}, "phonemes holds 41"),
        ({"file": "pair.npz"}, "has no array None: it has a, b"),
        ({}, "file: Field required"),
        ([1], "no JSON object"),
    ],
)
def test_lists_that_cannot_be_meant(tmp_path, line, message):
    np.save(tmp_path / "one.npy", signal(9))
    np.save(tmp_path / "flat.npy", np.ones(7))
    np.save(tmp_path / "words.npy", np.array([["a"]]))
    np.save(tmp_path / "objects.npy", np.array([[{}]]), allow_pickle=True)
    np.savez(tmp_path / "pair.npz", a=signal(9), b=signal(9))
    path = listed(tmp_path, line)
    with pytest.raises(UserError, match=message) as refused:
        detect(path, SourceOptions(rate="50"))
    assert "trials.jsonl" in str(refused.value) or ".np" in str(refused.value)


def test_t12_trial_as_numpy_reads_it(real_data):
    path = real_data / "t12_trial/figure1_neural_data.npy"
    source = detect(path, SourceOptions(rate="50", layout="channels-first", window=2.0))
    assert len(source.channels) == 256
    np.testing.assert_array_equal(source.read(0), np.load(path)[:, :100].T)
