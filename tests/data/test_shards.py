"""Files of trials that are written once, joined without a copy, and read back by `datasets`."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from datasets import load_from_disk

from b2t.cli import main
from b2t.data.augment import Augment
from b2t.data.batches import BatchPlan, TrialRows, collate, train_batches
from b2t.data.prepare import PrepareOptions, arrow_state, prepare, shards, work
from b2t.data.prepare.shards import ShardWriter, join_shards, without
from b2t.data.sources import SourceOptions, detect
from b2t.data.trials import row_id, signal_lengths, trial_features
from b2t.data.verification import verify, verify_sample
from b2t.errors import UserError
from tests.data.test_batches import trials
from tests.data.test_prepare_processes import content, write_tables


def row(number):
    return {
        "text": None if number % 3 else f"sentence {number}", "phonemes": [1, 40] * (number % 2),
        "session": "day0", "subject": "s", "block": 1, "trial": number, "sampling_rate": 50.0,
        "split": "train",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_short_and_long_trials_come_back_as_they_were(tmp_path, dtype):
    generator = np.random.default_rng(0)
    lengths = [3, 1, 5, 100_000, 2, 70_000, 70_000, 4]  # of 4 channels: more and less than a batch
    signals = [generator.standard_normal((length, 4)).astype(dtype) for length in lengths]
    files = []
    for part, numbers in enumerate((range(5), range(5, 8))):
        files.append(tmp_path / f"chunk-{part}.arrow")
        writer = ShardWriter(files[-1], 4, dtype)
        for number in numbers:
            writer.write(row(number), signals[number])
        assert not files[-1].exists(), "it has its name when it is whole"
        writer.close()
    files[0] = without(files[0], [0, 3])
    join_shards(tmp_path / "data", trial_features(4, dtype), {"train": files}, {"train": "mark"})
    found = load_from_disk(str(tmp_path / "data"))["train"]
    assert arrow_state(tmp_path / "data" / "train") == "mark"
    assert found.features == trial_features(4, dtype)
    for read, number in zip(found.with_format("numpy"), (0, 3, 5, 6, 7), strict=True):
        np.testing.assert_array_equal(read["signal"], signals[number])
        assert read["trial"] == number and read["text"] == row(number)["text"]
        assert list(read["phonemes"]) == row(number)["phonemes"]


def test_files_of_a_dataset_have_a_limit():
    assert work.chunk_size(200) == 64
    assert all(-(-count // work.chunk_size(count)) <= 128 for count in (8193, 100_001, 10**6))


def test_processes_that_start_in_the_middle_change_nothing(tmp_path, monkeypatch):
    source = write_tables(tmp_path / "eeg")
    assert main(["prepare", str(source), str(tmp_path / "one"), "--workers", "1"]) == 0
    started, done = [], []

    def opened(reopen, plan):
        monkeypatch.setattr(work, "_here", (reopen.open(), plan))

    def pool(count, _, initializer):  # a thread: processes are tried elsewhere
        started.append(count)
        return ThreadPoolExecutor(1, initializer=initializer)

    def counted(task, *call):
        done.append(task)
        return in_worker(task, *call)

    in_worker = work._do
    for name, value in {
        "_WORTH_SECONDS": 0.0, "_start": opened, "ProcessPoolExecutor": pool, "_do": counted,
    }.items():  # fmt: skip
        monkeypatch.setattr(work, name, value)
    monkeypatch.setattr(work.os, "sched_getaffinity", lambda _: {0, 1})
    assert main(["prepare", str(source), str(tmp_path / "two")]) == 0
    assert started == [2]
    assert done == [work.measure] * 2 + [work.write] * 3, "the first chunk of three is done here"
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_a_disk_without_hard_links_is_no_hindrance(tmp_path, monkeypatch, t15_release):
    folder, _ = t15_release(8)
    prepare(detect(folder), tmp_path / "links", PrepareOptions())

    def refused(*_):
        raise PermissionError

    monkeypatch.setattr(shards.os, "link", refused)
    prepare(detect(folder), tmp_path / "moved", PrepareOptions())
    assert verify(tmp_path / "moved") == 16
    assert (tmp_path / "links/checksums.npz").read_bytes() == (
        tmp_path / "moved/checksums.npz"
    ).read_bytes()


def test_a_chunk_whose_file_is_gone_is_written_again(tmp_path, monkeypatch):
    from b2t.data.prepare import run

    source = write_tables(tmp_path / "eeg")
    words = ["prepare", str(source), str(tmp_path / "out"), "--workers", "1"]

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "assemble", interrupted)
    assert main(words) == 130
    monkeypatch.undo()
    sorted((tmp_path / "out.partial").glob("chunk-*.arrow"))[1].unlink()
    assert main(words) == 0 and verify(tmp_path / "out") == 180


def test_checksums_of_another_version_are_not_called_damage(tmp_path, t15_release, monkeypatch):
    from b2t.data.prepare import assemble

    folder, _ = t15_release(8)
    monkeypatch.setattr(assemble, "VERSION", 1)
    prepare(detect(folder, SourceOptions()), tmp_path / "data", PrepareOptions())
    with pytest.raises(UserError, match="checksums of another version of b2t"):
        verify(tmp_path / "data")
    assert verify_sample(tmp_path / "data", limit=5, seconds=9.0, seed=(0,)) == 0


@pytest.mark.parametrize("augment", [None, Augment(enabled=False, smoothing_bins=2.0), Augment()])
def test_a_batch_names_the_trial_and_the_bin_of_what_is_not_finite(augment):
    def spoilt(example):
        signal = np.array(example["signal"], np.float32)
        if row_id(example) == names[3]:
            signal[4, 1] = np.nan
        return {"signal": signal}

    dataset = trials(6)
    names = [row_id(example) for example in dataset]
    rows = TrialRows(dataset.map(spoilt, features=dataset.features), None, [], augment)
    with pytest.raises(UserError, match=rf"trial {names[3]} holds nan at bin 4, channel 1"):
        collate([rows.example(0, index) for index in range(6)])


def test_the_thread_that_reads_ahead_ends_with_the_batches():
    dataset = trials(30)
    before = threading.active_count()
    plan = BatchPlan(signal_lengths(dataset), 4)
    batches = train_batches(dataset, plan, None, [], None, seed=0, micro_batch=4)
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before


def test_a_record_says_what_its_marks_are_taken_over(tmp_path, t15_release):
    folder, _ = t15_release(8)
    found = [
        prepare(detect(folder), tmp_path / name, PrepareOptions())["arrow"] for name in ("a", "b")
    ]
    assert found[0] == found[1] and found[0]["train"] != found[0]["val"]
    assert json.loads((tmp_path / "a" / "b2t.json").read_text())["version"] == 2
