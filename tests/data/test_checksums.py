"""Checksums of prepared data: damage that reading cannot see is found and named."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from b2t.data.dataset import load_trials
from b2t.data.prepare import PrepareOptions, prepare
from b2t.data.sources import detect
from b2t.data.trials import read_signal
from b2t.data.verification import verify, verify_sample
from b2t.errors import UserError
from b2t.train import startup
from b2t.train.ranks import Ranks


@pytest.fixture
def prepared(t15_release, tmp_path):
    folder, _ = t15_release(8)
    prepare(detect(folder), tmp_path / "data", PrepareOptions())
    return tmp_path / "data"


def flip(file, wanted: bytes, bit: int) -> None:
    """Flip one bit of the only place in ``file`` that holds ``wanted``."""
    content = bytearray(file.read_bytes())
    assert content.count(wanted) == 1
    content[content.index(wanted) + bit // 8] ^= 1 << bit % 8
    # Another file in its place: the old one may still be mapped.
    file.unlink()
    file.write_bytes(content)


def arrow_file(prepared, split="train"):
    return next((prepared / split).glob("*.arrow"))


def signal_bytes(prepared, row, split="train"):
    return read_signal(load_trials(prepared, split).with_format("arrow")[row]).tobytes()


def sample(prepared, seed=0, **options):
    return verify_sample(prepared, **{"limit": 128, "seconds": 60.0, "seed": (seed,), **options})


def test_what_was_prepared_is_as_it_was(prepared):
    assert verify(prepared) == 16
    assert sample(prepared) == 16 and sample(prepared, limit=5) == 5


@pytest.mark.parametrize("bit", [0, 22, 23, 31, 8 * 4 * 8 * 26 - 1])
def test_a_flipped_bit_of_a_signal_is_named(prepared, bit):
    flip(arrow_file(prepared), signal_bytes(prepared, 2), bit)
    place = re.escape(f"trial t15.2023.08.11/1/2 ({prepared}, train, row 2) has another checksum")
    with pytest.raises(UserError, match=place):
        verify(prepared)
    with pytest.raises(UserError, match=place):
        sample(prepared)


def test_a_flipped_bit_of_a_label_is_named(prepared):
    texts = "".join(load_trials(prepared, "val")["text"]).encode()
    flip(arrow_file(prepared, "val"), texts, 8 * 3)
    with pytest.raises(UserError, match=r"t15\.2023\.08\.11/0/0 .*val, row 0\) has another"):
        verify(prepared)


def test_a_sample_finds_damage_with_its_share_of_the_rows(prepared):
    flip(arrow_file(prepared), signal_bytes(prepared, 2), 5)
    found = 0
    for seed in range(64):
        try:
            sample(prepared, seed, limit=8)
        except UserError:
            found += 1
    # 8 of 16 rows: half of the samples hold the damaged one, give or take four deviations.
    assert 16 <= found <= 48


def test_a_sample_takes_no_longer_than_it_may(prepared):
    assert sample(prepared, seconds=0.0) == 1


def test_a_changed_record_is_refused(prepared):
    record = prepared / "b2t.json"
    record.write_text(record.read_text().replace('"channel3"', '"channel9"'))
    with pytest.raises(UserError, match=r"b2t\.json is missing, or has another checksum than when"):
        load_trials(prepared, "train")


def test_a_record_that_is_no_json_is_refused(prepared):
    (prepared / "b2t.json").write_bytes((prepared / "b2t.json").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"b2t\.json is damaged"):
        load_trials(prepared, "train")
    (prepared / "b2t.json").write_text("[]")
    with pytest.raises(UserError, match=r"b2t\.json is damaged: it holds no JSON object"):
        load_trials(prepared, "train")


def test_a_record_that_is_gone_is_missed(prepared):
    """Without it, names of channels and the mark of a simulation would be lost without a word."""
    (prepared / "b2t.json").write_text("{}")
    with pytest.raises(UserError, match=r"b2t\.json is missing, or has another checksum than when"):
        load_trials(prepared, "train")
    (prepared / "b2t.json").unlink()
    with pytest.raises(UserError, match=r"b2t\.json is missing, or has another checksum than when"):
        load_trials(prepared, "train")
    (prepared / "checksums.npz").unlink()
    assert len(load_trials(prepared, "train"))


def test_missing_and_damaged_checksums_are_refused(prepared):
    sums = prepared / "checksums.npz"
    content = sums.read_bytes()
    for damaged in (b"", content[:-30], content[: len(content) // 2], content.replace(b"NUM", b"")):
        sums.write_bytes(damaged)
        with pytest.raises(UserError, match=r"checksums\.npz is damaged"):
            verify(prepared)
    sums.unlink()
    with pytest.raises(UserError, match=r"checksums\.npz is missing"):
        verify(prepared)


def test_rows_and_checksums_of_another_number_are_refused(prepared, t15_release, tmp_path):
    other, _ = t15_release(8, (5, 2, 2), name="release2")
    prepare(detect(other), tmp_path / "other", PrepareOptions())
    with np.load(prepared / "checksums.npz") as file:
        mine = dict(file)
    with np.load(tmp_path / "other" / "checksums.npz") as file:
        mine["train"] = file["train"]
    np.savez(prepared / "checksums.npz", **mine)
    with pytest.raises(UserError, match=r"train: 8 rows, and checksums\.npz is of 10"):
        verify(prepared)


def old(prepared):
    """Make the folder what was prepared before there were checksums."""
    record = json.loads((prepared / "b2t.json").read_text())
    del record["checksums"]
    (prepared / "b2t.json").write_text(json.dumps(record))
    (prepared / "checksums.npz").unlink()


def test_data_without_checksums_load_and_are_compared_by_their_fingerprint(prepared):
    old(prepared)
    assert len(load_trials(prepared, "train")) == 8
    assert verify(prepared) == 16 and sample(prepared) == 0
    flip(arrow_file(prepared), signal_bytes(prepared, 2), 5)
    with pytest.raises(UserError, match="another fingerprint than when it was prepared"):
        verify(prepared)


def test_other_data_have_nothing_to_compare_with(prepared, tmp_path):
    load_trials(prepared, "train").to_parquet(str(tmp_path / "train-0.parquet"))
    with pytest.raises(UserError, match="has no checksums to compare with"):
        verify(str(tmp_path / "*.parquet"))
    assert sample(str(tmp_path / "*.parquet")) == 0


def test_all_ranks_hear_of_the_damage_that_one_found(prepared, caplog):
    single = Ranks(0, 1, 0, torch.device("cpu"))
    with caplog.at_level("INFO", logger="b2t"):
        startup.check_data(single, str(prepared), 0)
    assert "16 trials have the checksums" in caplog.text

    class First(Ranks):
        def gather(self, value):
            return [value, "trial x has another checksum"]

    with pytest.raises(UserError, match="trial x has another checksum"):
        startup.check_data(First(0, 2, 0, torch.device("cpu")), str(prepared), 0)
    flip(arrow_file(prepared), signal_bytes(prepared, 2), 5)
    with pytest.raises(UserError, match=r"train, row 2\) has another checksum"):
        startup.check_data(single, str(prepared), 0)


def test_a_copy_is_as_good_as_the_first(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "copy")
    assert verify(tmp_path / "copy") == 16


def test_whole_rates_are_the_same_as_written(t15_release, tmp_path):
    from b2t.data.sources import SourceOptions

    folder, _ = t15_release(8)
    prepare(detect(folder, SourceOptions(resample=25)), tmp_path / "data", PrepareOptions())
    assert verify(tmp_path / "data") == 16
