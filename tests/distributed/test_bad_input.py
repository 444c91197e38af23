"""A user's mistake through the real command: status 2, one message, no traceback."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from datasets import load_from_disk

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def with_nan(dataset, tmp_path_factory):
    """The dataset with one NaN, in a trial of its middle."""

    def poison(row, index):
        if index == 20:
            row["signal"][3][5] = float("nan")
        return row

    folder = tmp_path_factory.mktemp("nan") / "prepared"
    content = load_from_disk(str(dataset))
    content["train"] = content["train"].map(poison, with_indices=True)
    content.save_to_disk(str(folder))
    shutil.copy(dataset / "b2t.json", folder)
    row = content["train"][20]
    return folder, f"{row['session']}/{row['block']}/{row['trial']}"


@pytest.fixture(scope="module")
def other_data(dataset, tmp_path_factory):
    """The dataset with one row less."""
    folder = tmp_path_factory.mktemp("other") / "prepared"
    content = load_from_disk(str(dataset))
    content["train"] = content["train"].select(range(47))
    content.save_to_disk(str(folder))
    return folder


@pytest.fixture(scope="module")
def read_only(tmp_path_factory):
    """A disk that cannot be written, None where none can be mounted."""
    folder = tmp_path_factory.mktemp("disk")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(folder)])
    yield folder if done.returncode == 0 else None
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def trained(training):
    """A short run of one rank that is over."""
    return training.run("trained", "phases.0.steps=2", launcher="python", ranks=1)


CASES = {
    "missing path": ["nowhere/at/all: no such folder"],
    "misspelt key": ["phases.0.stepz: unknown key; did you mean 'steps'?"],
    "nan": ["holds nan at bin 3, channel 5", "--skip-bad-trials"],
    "text too long": ["more than the limit of 5", "raise the limit"],
    "other configuration": [
        "holds a run that differs",
        "phases.0.lr: 0.001 then, 0.002 now",
        "global batch: 2 then, 4 now",
        "another run.dir",
    ],
    "other data": ["holds a run that differs", "fingerprint"],
    "fp16 without a GPU": ["fp16 needs a GPU", "zero2_cpu.json"],
    "resume never": ["--resume never"],
    "a file in place of the folder": ["a-file/run: cannot be written", "choose another run.dir"],
    "a read-only folder": ["cannot be written (Read-only file system)", "choose another run.dir"],
}


@pytest.fixture(scope="module")
def refused(training, trained, with_nan, other_data, ds_file, repository, read_only):
    """The ends of all cases, two at a time."""
    one = {"launcher": "python", "ranks": 1}
    short = "phases.0.steps=2"
    starts = {
        "missing path": (("data.path=nowhere/at/all",), one),
        "misspelt key": (("phases.0.stepz=3",), one),
        "nan": ((f"data.path={with_nan[0]}",), {"launcher": "deepspeed", "ranks": 2}),
        "text too long": (("data.max_text_tokens=5",), one),
        "other configuration": (
            (f"run.dir={trained.folder}", short, "phases.0.lr=0.002"),
            {**one, "deepspeed": ds_file(train_micro_batch_size_per_gpu=4)},
        ),
        "other data": ((f"run.dir={trained.folder}", short, f"data.path={other_data}"), one),
        "fp16 without a GPU": (
            (),
            {**one, "deepspeed": repository / "ds_configs" / "zero2_fp16.json"},
        ),
        # Said before the data is read: these have none.
        "a file in place of the folder": (
            (f"run.dir={training.folder / 'a-file' / 'run'}", "data.path=nowhere/at/all"),
            {"launcher": "deepspeed", "ranks": 2},
        ),
        "a read-only folder": ((f"run.dir={read_only}/run", "data.path=nowhere/at/all"), one),
        "resume never": ((f"run.dir={trained.folder}", short, "--resume=never"), one),
    }
    assert starts.keys() == CASES.keys()
    (training.folder / "a-file").write_text("not a folder")
    if read_only is None:
        del starts["a read-only folder"]

    def end(name):
        overrides, options = starts[name]
        return training.start(f"bad-{name.replace(' ', '-')}", *overrides, **options).wait()

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(starts, pool.map(end, starts), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_one_clear_message(refused, name):
    if name not in refused:
        pytest.skip("a read-only disk cannot be mounted here")
    done = refused[name]
    assert done.status == 2, done.output[-4000:]
    assert "Traceback" not in done.output, done.output[-4000:]
    assert done.output.count("train_ds.py: error:") == 1, done.output[-4000:]
    for text in CASES[name]:
        assert text in done.output, done.output[-4000:]


def test_the_bad_trial_is_named(refused, with_nan):
    assert with_nan[1] in refused["nan"].output


def test_refusing_leaves_the_run_as_it_was(refused, trained):
    assert trained.checkpoints == [2]
    assert "lr: 0.001" in (trained.folder / "config.yaml").read_text()


def test_a_finished_run_on_moved_data_is_recognised(training, trained, dataset, tmp_path):
    """The data's place may change, its content may not."""
    shutil.copytree(dataset, tmp_path / "moved")
    done = training.start(
        "moved",
        f"run.dir={trained.folder}",
        "phases.0.steps=2",
        f"data.path={tmp_path / 'moved'}",
        launcher="python",
        ranks=1,
    ).wait()
    assert done.status == 0 and "already trained" in done.output, done.output[-4000:]
