"""Reads damaged inputs one after another, in a process of its own with little memory to ask for.

    python -m tests.data.damaged_worker BASES WORK SEED [KIND …]

prints a JSON object before each input, so that the one that ends the process is known, and one with
its outcome after it. Every input is a function of (seed, kind, number).
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from b2t.config import load_config
from b2t.data.dataset import dataset_info, load_trials
from b2t.data.prepare import PrepareOptions, prepare
from b2t.data.prepare import run as prepare_run
from b2t.data.sources import SourceOptions, detect
from b2t.data.trials import read_signal
from b2t.data.verification import verify
from b2t.errors import UserError
from b2t.evaluate.run_folder import load_model, open_run
from b2t.log import quiet_libraries
from b2t.report.run_data import load_run
from b2t.report.summary import summarize
from b2t.report.watch import render_state
from b2t.train.checkpoint import CheckpointStore
from b2t.train.ds_config import load_ds_config
from tests.data import damaged_content, damages

SECONDS = 10
FIRST_SECONDS = 120  # the first reading of a kind imports what it needs
MEMORY = 3 * 2**30
"""Bytes of address space that reading may ask for on top of what the libraries hold."""

PathDamage = Callable[[np.random.Generator, Path], None]


class Kind(NamedTuple):
    """Inputs of one kind: the damaged files (globs), how often, how, and who reads them."""

    count: int
    files: tuple[str, ...]
    damages: dict[str, damages.Damage | PathDamage]
    read: Callable[[Path, Path], Any]


def read_recording(folder: Path, work: Path, **options: Any) -> Any:
    """Prepare it, as `b2t prepare` does, but for the picture of its card."""
    out = work / "out"
    source = detect(folder, SourceOptions(**options))
    content = prepare(source, out, PrepareOptions(overwrite=True))
    trials = [(info.session, info.text, info.phonemes, info.split) for info in source.trials]
    return [content["fingerprint"], content["channels"], content["sampling_rate"], trials]


def read_dataset(folder: Path, work: Path) -> Any:
    """Load it as training does, then compare its checksums."""
    parquet = any(folder.glob("*.parquet"))
    path = str(folder / "*.parquet") if parquet else str(folder)
    info = dataset_info(path)
    digest = hashlib.sha256(repr(info).encode())
    for split in info.splits:
        trials = load_trials(path, split)
        rows = trials.with_format("arrow")
        for index in range(len(rows)):
            row = rows[index]
            digest.update(read_signal(row).tobytes())
            digest.update(repr(row.drop_columns(["signal"]).to_pylist()).encode())
    if not parquet:
        verify(path)
    return digest.hexdigest()


def read_run(folder: Path, work: Path) -> Any:
    """Show it, open its best model, and go on from its checkpoint."""
    from rich.console import Console

    run = load_run(folder)
    summary = summarize(run)
    shown = io.StringIO()
    Console(file=shown, width=100).print(render_state(run))
    checkpoint = CheckpointStore(folder / "checkpoints").load()
    model, _ = load_model(open_run(folder), "cpu")
    weights = {**model.state_dict(), **(checkpoint.weights if checkpoint else {})}
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in weights.values()))
    return [
        shown.getvalue(),
        repr(summary),
        checkpoint.state if checkpoint else None,
        digest.hexdigest(),
    ]


def read_yaml(folder: Path, work: Path) -> Any:
    """Load the configuration."""
    return load_config(next(folder.glob("*.yaml"))).model_dump(mode="json")


def read_deepspeed(folder: Path, work: Path) -> Any:
    """Load the DeepSpeed file."""
    return load_ds_config(next(folder.glob("*.json"))).raw


_JSON = {"json_value": damages.json_value, "json_key": damages.json_key}
_YAML = {"yaml_value": damages.yaml_value, "yaml_key": damages.yaml_key, "markup": damages.markup}
_EDF = {"edf_field": damages.edf_field, "edf_numbers": damages.edf_numbers}
_B = damages.BYTES
_HDF5 = {**_B, "content": damaged_content.any_hdf5_content}
_MAT = {**_B, "content": damaged_content.mat_content}
_TABLE = {**_B, "content": damaged_content.table_content}


def _recording(
    count: int, files: str, damages: dict[str, damages.Damage | PathDamage], **options: Any
) -> Kind:
    return Kind(count, tuple(files.split()), damages, partial(read_recording, **options))


KINDS = {
    "hdf5": _recording(120, "*/data_train.hdf5", {**_B, "content": damaged_content.hdf5_content}),
    "fif": _recording(80, "*.fif", _B, window=1.0),
    "fif-epochs": _recording(50, "*.fif", _B),
    "edf": _recording(80, "*.edf", {**_B, **_EDF}, window=1.0),
    "bdf": _recording(50, "*.bdf", {**_B, **_EDF}, window=1.0),
    "set": _recording(90, "*.set", {**_B, "content": damaged_content.set_content}, window=1.0),
    "set-epochs": _recording(50, "*.set", {**_B, "content": damaged_content.set_content}),
    "brainvision": _recording(
        60, "*.vhdr *.vmrk", {**_B, "content": damaged_content.settings_content}, window=1.0
    ),
    "bids": _recording(40, "**/*.tsv **/*.json", _B, window=1.0),
    "t12": _recording(60, "train/*.mat", _MAT),
    "t12-73": _recording(50, "train/*.mat", _HDF5),
    "pickle": _recording(100, "*.pkl", {**_B, "content": damaged_content.pickle_content}),
    "zuco": _recording(60, "*.mat", _MAT),
    "zuco-73": _recording(40, "*.mat", _HDF5, level="sentences"),
    "nwb": _recording(50, "*.nwb", _HDF5, text_column="sentence"),
    "labram": _recording(60, "*.hdf5", _HDF5, window=1.0),
    "mat": _recording(60, "*.mat", _MAT, window=1.0),
    "mat-73": _recording(40, "*.mat", _HDF5, window=1.0),
    "numpy": _recording(
        80,
        "*.npy *.npz",
        {**_B, "content": damaged_content.numpy_content},
        window=1.0,
        rate="50",
    ),
    "numpy-lines": _recording(60, "*.jsonl", {**_B, "value": damages.lines_value}, rate="50"),
    "csv": _recording(70, "*.csv", _TABLE, text_column="word"),
    "csv-zip": _recording(60, "*.zip", _B, text_column="word"),
    "ctf": _recording(30, "*/*.res4 */*.meg4 */*.mrk", _B, window=1.0),
    "kit": _recording(25, "*.sqd", _B, window=1.0),
    "cnt": _recording(25, "*.cnt", _B, window=1.0),
    "egi": _recording(25, "*.egi", _B, window=1.0),
    "mff": _recording(30, "*/*.xml */*.bin", _B, window=1.0),
    "parquet": Kind(
        50, ("train-*.parquet",), {**_B, "content": damaged_content.parquet_content}, read_dataset
    ),
    "prepared": Kind(120, ("train/*.arrow", "*.npz"), _B, read_dataset),
    "prepared-json": Kind(80, ("*.json", "*/*.json"), {**_B, **_JSON}, read_dataset),
    "run": Kind(60, ("**/*.safetensors",), _B, read_run),
    "run-json": Kind(100, ("*.json", "checkpoints/**/*.json"), {**_B, **_JSON}, read_run),
    "run-lines": Kind(50, ("*.jsonl",), {**_B, "value": damages.lines_value}, read_run),
    "run-config": Kind(50, ("config.yaml",), {**_B, **_YAML}, read_run),
    "yaml": Kind(200, ("*.yaml",), {**_B, **_YAML}, read_yaml),
    "deepspeed": Kind(120, ("*.json",), {**_B, **_JSON, "markup": damages.markup}, read_deepspeed),
}


class _Heard(logging.Handler):
    """Keeps what is said to the user."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


class Slow(BaseException):
    """Reading took longer than it may."""


def _late(*_: Any) -> None:
    raise Slow


def outcome(
    kind: Kind, folder: Path, work: Path, heard: _Heard, seconds: float = SECONDS
) -> dict[str, Any]:
    """Read one input; say how it ended."""
    heard.said.clear()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    began = time.monotonic()
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = json.dumps(kind.read(folder, work), default=str, sort_keys=True)
        found = {"end": "read", "content": hashlib.sha256(content.encode()).hexdigest()}
    except UserError as error:
        found = {"end": "refused", "message": str(error)}
    except Slow:
        found = {"end": "slow", "message": traceback.format_exc()[-2000:]}
    except BaseException:
        found = {"end": "traceback", "message": traceback.format_exc()[-3000:]}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return {**found, "said": heard.said[:5], "seconds": time.monotonic() - began}


def damage(kind: Kind, name: str, seed: int, number: int, folder: Path) -> tuple[Path, str]:
    """Damage one file of ``folder``; return it and the name of the damage."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
    files = sorted({file for pattern in kind.files for file in folder.glob(pattern)})
    file = files[number % len(files)]
    chosen = str(generator.choice(sorted(kind.damages)))
    function: Any = kind.damages[chosen]
    if function.__annotations__["return"] is bytes:
        content = function(generator, file.read_bytes())
        file.unlink()  # the old one may be mapped into memory
        file.write_bytes(content)
    else:
        content = file.read_bytes()
        file.unlink()  # a reader may still hold the old one open
        file.write_bytes(content)
        function(generator, file)
    return file, chosen


def main(bases: Path, work: Path, seed: int, names: list[str]) -> None:
    """Read all inputs of the kinds ``names``."""
    quiet_libraries()
    prepare_run.write_card = lambda *_: None  # a picture takes longer than all the reading
    heard = _Heard()
    root = logging.getLogger("b2t")
    root.handlers[:] = [heard]
    root.propagate = False
    signal.signal(signal.SIGALRM, _late)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    for name in names:
        kind, folder = KINDS[name], work / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(bases / name, folder)
        first = outcome(kind, folder, work, heard, FIRST_SECONDS)
        _say(kind=name, number=-1, damage="none", **first)
        for number in range(kind.count):
            file, how = damage(kind, name, seed, number, folder)
            _say(kind=name, number=number, damage=how, file=str(file.relative_to(folder)))
            found = outcome(kind, folder, work, heard)
            message = found.get("message", "")
            named = file.name in message or str(folder) in message
            _say(kind=name, number=number, named=named, **found)
            file.unlink(missing_ok=True)
            shutil.copy2(bases / name / file.relative_to(folder), file)


_OUT = os.fdopen(os.dup(1), "w") if __name__ == "__main__" else sys.stdout
"""Where the lines go; what libraries print must not come between them."""


def _say(**line: Any) -> None:
    print(json.dumps(line, default=str), file=_OUT, flush=True)


if __name__ == "__main__":
    os.dup2(2, 1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] or list(KINDS))
