"""CTF, KIT, CNT and EGI: files written from the descriptions of the formats."""

import json

import numpy as np
import pytest

from b2t.cli import main
from b2t.data.dataset import load_trials
from b2t.data.sources import SourceOptions, detect
from b2t.data.trials import read_signal
from b2t.errors import UserError
from tests.data import vendor_files

for package in ("mne", "mffpy"):
    pytest.importorskip(package)

RATE, BINS = 50, 1200
WINDOW = 60
GENERATOR = np.random.default_rng(0)
MICROVOLTS = 50 * GENERATOR.standard_normal((33, BINS))
COUNTS = np.round(1000 * GENERATOR.standard_normal((3, BINS))).astype(np.int64)
EVENTS = [(100, "go  "), (300, "stop")]


def egi(folder):
    vendor_files.write_egi(folder / "day.egi", MICROVOLTS[:3], RATE, EVENTS)
    return MICROVOLTS[:3] * 1e-6, ["E1", "E2", "E3"]


def mff(folder):
    vendor_files.write_mff(folder / "day.mff", MICROVOLTS, RATE)
    return MICROVOLTS * 1e-6, [*(f"E{number + 1}" for number in range(32)), "Vertex Reference"]


def cnt(folder):
    labels = ["Fz", "Cz", "Pz"]
    vendor_files.write_cnt(folder / "day.cnt", COUNTS, RATE, labels, [(100, 3), (300, 5)])
    return COUNTS * 1e-4 * 204.8e-6, labels


def ctf(folder):
    vendor_files.write_ctf(folder / "day.ds", COUNTS, RATE, gain=1e15, events=EVENTS)
    return COUNTS * 1e-15, ["MLC11-1609", "MLC12-1609", "MLC13-1609"]


def kit(folder):
    vendor_files.write_kit(folder / "day.sqd", COUNTS, RATE, gain=1e-11)
    return COUNTS * 10 / 2**16 * 1e-11, ["MEG 001", "MEG 002", "MEG 003"]


FORMATS = {"egi": egi, "mff": mff, "cnt": cnt, "ctf": ctf, "kit": kit}


@pytest.mark.parametrize("name", FORMATS)
def test_the_signal_is_what_was_written(tmp_path, name, capfd):
    written, labels = FORMATS[name](tmp_path)
    source = detect(tmp_path, SourceOptions(window=1.2))  # divides all splits
    assert source.format == "mne" and source.sampling_rate == RATE
    assert source.channels == labels and {info.session for info in source.trials} == {"day"}
    found = np.concatenate([source.read(index) for index in range(len(source.trials))])
    np.testing.assert_allclose(found, written.T[: len(found)], rtol=1e-5, atol=1e-9 * written.max())
    assert len(found) == BINS and capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("name", "texts"), [("egi", ["go", "stop"]), ("cnt", ["3", "5"]),
                                             ("ctf", ["go", "stop"])])  # fmt: skip
def test_events_are_trials(tmp_path, name, texts):
    written, _ = FORMATS[name](tmp_path)
    source = detect(tmp_path, SourceOptions(window=1.0, annotations=True))
    assert [info.text.strip() for info in source.trials] == texts
    for index, (sample, _) in enumerate(EVENTS):
        expected = written[:, sample : sample + RATE].T
        np.testing.assert_allclose(source.read(index), expected, rtol=1e-5, atol=1e-9)


def test_a_raw_file_of_egi_is_read_where_it_is_named(tmp_path):
    egi(tmp_path)
    (tmp_path / "day.egi").rename(tmp_path / "day.raw")
    assert detect(tmp_path / "day.raw", SourceOptions(window=2.0)).channels == ["E1", "E2", "E3"]
    with pytest.raises(UserError):
        detect(tmp_path, SourceOptions(window=2.0))


@pytest.mark.parametrize("heading", ["NUMBER OF MARKERS", "NAME", "LIST OF SAMPLES"])
def test_markers_of_ctf_that_lack_a_heading_are_refused(tmp_path, heading):
    ctf(tmp_path)  # MNE would look for it for ever
    markers = tmp_path / "day.ds" / "MarkerFile.mrk"
    before, _, after = markers.read_text().rpartition(f"{heading}:")
    markers.write_text(before + after)
    with pytest.raises(UserError, match=rf"MarkerFile\.mrk .* no line '{heading}:'"):
        detect(tmp_path, SourceOptions(window=1.2))


@pytest.mark.parametrize("name", FORMATS)
def test_prepared_inspected_audited(tmp_path, name, capsys):
    (tmp_path / "in").mkdir()
    written, labels = FORMATS[name](tmp_path / "in")
    out = str(tmp_path / "out")
    assert main(["prepare", str(tmp_path / "in"), out, "--window", "1.2"]) == 0
    assert main(["inspect", out, "--no-plot"]) == 0
    assert main(["audit", out, "--out", str(tmp_path / "audit")]) == 0
    capsys.readouterr()
    record = json.loads((tmp_path / "out" / "b2t.json").read_text())
    assert record["channels"] == labels and sum(record["rows"].values()) == BINS // WINDOW
    first = read_signal(load_trials(out, "train").with_format("arrow")[0])
    kept = written[:, : record["rows"]["train"] * WINDOW]
    scaled = (written[:, :WINDOW] - kept.mean(1, keepdims=True)) / kept.std(1, keepdims=True)
    np.testing.assert_allclose(first, scaled.T, rtol=1e-3, atol=1e-3)
