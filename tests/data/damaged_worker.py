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
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.io import loadmat, savemat

from b2t.config import load_config
from b2t.data.dataset import dataset_info, load_trials
from b2t.data.prepare import PrepareOptions, prepare
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
from tests.data import damages

SECONDS = 10
MEMORY = 3 * 2**30
"""Bytes of address space that reading may ask for on top of what the libraries hold."""

PathDamage = Callable[[np.random.Generator, Path], None]


class Kind(NamedTuple):
    """Inputs of one kind: the damaged files (globs), how often, how, and who reads them."""

    count: int
    files: tuple[str, ...]
    damages: dict[str, damages.Damage | PathDamage]
    read: Callable[[Path, Path], Any]


# ---- damage that keeps a file readable


def hdf5_content(generator: np.random.Generator, path: Path) -> None:
    """Another attribute, dataset or kind of object in one trial."""
    strange: list[Any] = [
        -1, 0, 3, 2**62, np.nan, np.inf, 1.5, "text", "", b"\xff\xfe", [1, 2], np.zeros((2, 2)),
        np.zeros(0), 1j, True, "2023", np.full(9, -5), np.full((12, 4), 1e38),
        np.full((12, 4), "a", dtype="S1"), np.zeros((12, 4)), np.ones((1, 4)), np.ones((12, 5)),
        np.arange(48).reshape(12, 4), h5py.SoftLink("/gone"), h5py.ExternalLink("gone.h5", "/"),
    ]  # fmt: skip
    with h5py.File(path, "a") as file:
        trial = file[str(generator.choice(sorted(file)))]
        value = strange[int(generator.integers(0, len(strange)))]
        name = str(
            generator.choice(sorted(trial.attrs) if generator.random() < 0.5 else sorted(trial))
        )
        if name in trial.attrs and not isinstance(value, (h5py.SoftLink, h5py.ExternalLink)):
            del trial.attrs[name]
            trial.attrs[name] = value
        elif name in trial:
            del trial[name]
            if generator.random() < 0.8:
                trial[name] = value
        else:
            del trial.attrs[name]


def set_content(generator: np.random.Generator, path: Path) -> None:
    """Another value in a field of EEGLAB's struct, or a field less."""
    strange: list[Any] = [
        np.nan, -1.0, 0.0, 1e9, 1e300, "text", np.zeros((0, 0)), np.zeros((2, 2)), np.inf,
        np.array([], dtype=object), {"a": 1.0}, 3.7, np.full((3, 600), np.nan), 1 + 2j,
    ]  # fmt: skip
    eeg = loadmat(path, struct_as_record=False, squeeze_me=True)["EEG"]
    fields = {name: getattr(eeg, name) for name in eeg._fieldnames}
    name = str(generator.choice(sorted(fields)))
    fields[name] = strange[int(generator.integers(0, len(strange)))]
    if generator.random() < 0.2:
        del fields[name]
    whole = fields if generator.random() < 0.95 else strange[int(generator.integers(0, 10))]
    path.unlink()
    savemat(path, {"EEG": whole}, appendmat=False)


def parquet_content(generator: np.random.Generator, path: Path) -> None:
    """Another type or other values in one column, or a column less."""
    table = pq.read_table(path)
    name = str(generator.choice(table.column_names))
    place, rows = table.column_names.index(name), len(table)
    strange: list[list[Any]] = [
        [None], [1], [-1], [0.5], [float("nan")], ["text"], [b"\xff"], [[]], [[1, None]], [[[]]],
        [[[1.0], [2.0, 3.0]]], [[[None]]], [[["a"]]], [{"a": 1}], [True], [2**62], [[float("inf")]],
        [[[1e38] * 4]], [[[0.0] * 4] * 3], ["dev"], ["train"], [["text"]], [10**30],
    ]  # fmt: skip
    chosen = strange[int(generator.integers(0, len(strange)))]
    if generator.random() < 0.1:
        table = table.remove_column(place)
    else:
        values = table.column(name).to_pylist()
        alone = generator.random() < 0.5
        mixed = [*values[:-1], *chosen] if alone else chosen * rows
        try:
            table = table.set_column(place, name, pa.array(mixed))
        except (pa.ArrowException, OverflowError, TypeError):
            table = table.set_column(place, name, pa.array([str(value) for value in chosen * rows]))
    path.unlink()
    pq.write_table(table, path)


# ---- who reads


def read_recording(folder: Path, work: Path) -> Any:
    """Prepare it, as `b2t prepare` does."""
    out = work / "out"
    release = any(folder.rglob("*.hdf5"))  # whose trials are not cut
    source = detect(folder, SourceOptions() if release else SourceOptions(window=1.0))
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

KINDS = {
    "hdf5": Kind(200, ("*/data_train.hdf5",), {**_B, "content": hdf5_content}, read_recording),
    "fif": Kind(120, ("*.fif",), _B, read_recording),
    "fif-epochs": Kind(80, ("*.fif",), _B, read_recording),
    "edf": Kind(130, ("*.edf",), {**_B, **_EDF}, read_recording),
    "bdf": Kind(80, ("*.bdf",), {**_B, **_EDF}, read_recording),
    "set": Kind(130, ("*.set",), {**_B, "content": set_content}, read_recording),
    "set-epochs": Kind(80, ("*.set",), {**_B, "content": set_content}, read_recording),
    "parquet": Kind(50, ("train-*.parquet",), {**_B, "content": parquet_content}, read_dataset),
    "prepared": Kind(120, ("train/*.arrow", "*.npz"), _B, read_dataset),
    "prepared-json": Kind(80, ("*.json", "*/*.json"), {**_B, **_JSON}, read_dataset),
    "run": Kind(60, ("**/*.safetensors",), _B, read_run),
    "run-json": Kind(100, ("*.json", "checkpoints/**/*.json"), {**_B, **_JSON}, read_run),
    "run-lines": Kind(50, ("*.jsonl",), {**_B, "value": damages.lines_value}, read_run),
    "run-config": Kind(50, ("config.yaml",), {**_B, **_YAML}, read_run),
    "yaml": Kind(200, ("*.yaml",), {**_B, **_YAML}, read_yaml),
    "deepspeed": Kind(120, ("*.json",), {**_B, **_JSON, "markup": damages.markup}, read_deepspeed),
}


# ---- one after another


class _Heard(logging.Handler):
    """Keeps what is said to the user."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


class Slow(BaseException):
    """Reading took longer than SECONDS."""


def _late(*_: Any) -> None:
    raise Slow


def outcome(kind: Kind, folder: Path, work: Path, heard: _Heard) -> dict[str, Any]:
    """Read one input; say how it ended."""
    heard.said.clear()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
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
        function(generator, file)
    return file, chosen


def main(bases: Path, work: Path, seed: int, names: list[str]) -> None:
    """Read all inputs of the kinds ``names``."""
    quiet_libraries()
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
        _say(kind=name, number=-1, damage="none", **outcome(kind, folder, work, heard))
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
