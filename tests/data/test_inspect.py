"""`b2t inspect`: the numbers it prints, the picture it draws."""

import argparse

import h5py
import numpy as np
import pytest
from PIL import Image

from b2t.data import inspect_command
from b2t.data.dataset import load_trials
from b2t.data.prepare import PrepareOptions, prepare
from b2t.data.sources import detect
from b2t.data.trial_plot import plot_trial
from b2t.errors import UserError


def run(*words):
    parser = argparse.ArgumentParser()
    inspect_command.add_arguments(parser)
    return inspect_command.run(parser.parse_args([str(word) for word in words]))


def line(printed: str, heading: str) -> list[str]:
    return next(text for text in printed.splitlines() if text.startswith(heading)).split()[-3:]


@pytest.fixture
def prepared(t15_release, tmp_path):
    folder, _ = t15_release(512)
    prepare(detect(folder), tmp_path / "data", PrepareOptions())
    return tmp_path / "data"


def test_the_numbers_are_those_of_the_trials(prepared, capsys):
    assert run(prepared, "--no-plot") == 0
    printed = capsys.readouterr().out
    assert "512 channels at 50 Hz" in printed and "SIMULATION" not in printed
    assert line(printed, "trials") == ["8", "4", "4"]
    # Per session: trials of 20, 23, 26, 29 bins in train, the first two sentences again in val.
    assert line(printed, "seconds per trial, median") == ["0.49", "0.43", "0.43"]
    assert line(printed, "seconds per trial, range") == ["0.40–0.58", "0.40–0.46", "0.40–0.46"]
    assert line(printed, "sessions") == ["2", "2", "2"]
    assert line(printed, "texts") == ["8", "4", "0"]
    assert line(printed, "different texts") == ["3", "2", "0"]
    # bring it closer | it's all right isn't it | i don't know what to do: 3 + 5 + 6 words
    assert line(printed, "words") == ["34", "16", "0"]
    assert line(printed, "vocabulary") == ["13", "7", "0"]
    assert line(printed, "phonemes") == ["32", "16", "0"]
    assert "val: 2 of 2 different texts occur in training; 0 of 7 words do not" in printed
    assert "test: no texts" in printed
    assert "t15.2023.08.11 (4), t15.2023.08.13 (4)" in printed


def test_a_simulation_is_labelled(t15_release, tmp_path, capsys):
    folder, _ = t15_release(8)
    with h5py.File(next(folder.rglob("data_train.hdf5")), "a") as file:
        file.attrs["simulated"] = True
    prepare(detect(folder), tmp_path / "data", PrepareOptions())
    run(tmp_path / "data", "--no-plot")
    assert "SIMULATION" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize("extension", ["png", "svg"])
def test_a_trial_is_drawn(prepared, tmp_path, capsys, extension):
    file = tmp_path / f"trial.{extension}"
    run(prepared, "--split", "val", "--row", "t15.2023.08.13/0/1", "--plot", file)
    assert f"plot of val trial 3: {file}" in capsys.readouterr().out
    assert file.stat().st_size > 10_000


def test_a_glob_with_brackets_is_printed_as_it_is(prepared, tmp_path, capsys):
    load_trials(prepared, "train").to_parquet(str(tmp_path / "train-0.parquet"))
    run(tmp_path / "train-[0-9].parquet", "--no-plot")
    assert "train-[0-9].parquet" in capsys.readouterr().out


def test_the_plot_has_a_name_of_its_own(prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(prepared, "--row", "5")
    assert (tmp_path / "data-train-5.png").is_file()


def test_the_picture_shows_where_the_signal_is(tmp_path):
    signal = np.zeros((100, 20), np.float32)
    signal[60:80, :10] = 5
    plot_trial(tmp_path / "a.png", signal, 50.0, title="a burst")
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    red = pixels[..., 0] - pixels[..., 2] > 50
    rows, columns = np.nonzero(red[:, : int(0.9 * red.shape[1])])
    width = pixels.shape[1]
    assert 0.5 < columns.min() / width < columns.max() / width < 0.8
    assert rows.max() < 0.45 * pixels.shape[0]


@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (2000, 2)])
@pytest.mark.filterwarnings("error")
def test_any_shape_is_drawn(tmp_path, shape):
    plot_trial(tmp_path / "a.png", np.zeros(shape, np.float32), 100.0, title="flat")
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--row", "99"], "it has 8, from 0 or t15.2023.08.11/0/0 to 7"),
        (["--row", "-1"], "no such trial"),
        (["--row", "t15.1999.01.01/0/0"], "no such trial"),
        (["--split", "dev"], "no dev split: it has train, val, test"),
        (["--plot", "trial.gif"], r"\.png, \.pdf or \.svg"),
        (["--plot", "absent/trial.png"], "no folder"),
    ],
)
def test_mistakes_are_told_before_the_table(prepared, words, message, capsys):
    with pytest.raises(UserError, match=message):
        run(prepared, *words)
    assert capsys.readouterr().out == ""


def test_verify_compares_every_trial(prepared, capsys):
    assert run(prepared, "--verify") == 0
    assert capsys.readouterr().out == f"{prepared}: all 16 trials are as they were prepared\n"
    file = next((prepared / "val").glob("*.arrow"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.unlink()
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"trial t15.*val, row \d\) has another checksum"):
        run(prepared, "--verify")


def test_real_words(real_data, tmp_path, capsys):
    pytest.importorskip("mne")
    from b2t.data.sources import SourceOptions

    source = detect(real_data / "wordpair", SourceOptions(text_column="association"))
    prepare(source, tmp_path / "words", PrepareOptions())
    run(tmp_path / "words", "--plot", tmp_path / "words.png")
    printed = capsys.readouterr().out
    assert line(printed, "trials") == ["160", "20", "20"]
    assert "1 of" not in line(printed, "seconds per trial, median")
    assert (tmp_path / "words.png").stat().st_size > 10_000


def test_words():
    assert inspect_command.words("It's “fine”, isn't  it?  …") == ["it's", "fine", "isn't", "it"]
