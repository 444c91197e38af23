"""What is done with one chunk of trials, in this process or in others."""

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from b2t.data.interrupts import left_to_this_process
from b2t.data.prepare.blocks import Scale, TrialMoments, unit_of
from b2t.data.prepare.shards import ShardWriter
from b2t.data.sources import Source, SourceOptions, detect, join
from b2t.data.sources.prepared_folders import not_prepared
from b2t.data.sources.processed import processed
from b2t.data.trial_checks import Looked, look_at
from b2t.data.trials import require_finite, signal_digest
from b2t.errors import UserError
from b2t.signal_processing import ProcessingOptions

_LEAST, _MOST_CHUNKS = 64, 128
Rows = dict[str, list[tuple[int, str]]]
"""Trials of a chunk by split, in the order of the file's rows, each with the `signal_digest` of
what was stored, in hexadecimal."""


def chunk_size(trials: int) -> int:
    """Return how many trials one task reads, and one file of the dataset holds at most.

    As every file stays open while a dataset is read, their number has a limit.
    """
    return max(_LEAST, -(-trials // _MOST_CHUNKS))


@dataclass(frozen=True)
class Reopen:
    """How another process, or a later call, opens the same source.

    Attributes:
        paths: files or folders that the user named.
        options: as given on the command line.
        format: name of the format, None finds it by looking.
        processing: reference and filters.
    """

    paths: tuple[Path, ...]
    options: SourceOptions
    format: str | None = None
    processing: ProcessingOptions = field(default_factory=ProcessingOptions)

    def open(self) -> Source:
        """Open the source: several paths become one."""
        found = [detect(path, self.options, self.format) for path in self.paths]
        opened = processed(self.paths, found, self.processing)
        return opened[0] if len(opened) == 1 else join(list(self.paths), opened)

    def stamps(self) -> list[tuple[str, int, int]]:
        """Return what changes when a file of the source does."""
        files = [
            file
            for path in self.paths
            for file in ([path] if path.is_file() else not_prepared(path, sorted(path.rglob("*"))))
            if file.is_file()
        ]
        return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


@dataclass(frozen=True)
class Plan:
    """What workers need beside the source.

    Attributes:
        folder: of the unfinished dataset.
        splits: split of every trial.
        dtype: of the stored signals.
        skip: leave out bad trials instead of stopping.
        by: what trials are z-scored within: `block`, `session`, `recording`, or `none`.
    """

    folder: Path
    splits: list[str]
    dtype: str
    skip: bool
    by: str


class Seen(NamedTuple):
    """One trial, looked at: ``problem`` says why it is bad."""

    trial: int
    looked: Looked | None
    problem: str | None
    moments: TrialMoments | None = None


class Written(NamedTuple):
    """One chunk, written.

    Attributes:
        seen: its trials, where they were looked at.
        rows: which trials the rows of its files are.
        squared_error: of rounding, summed.
        power: of the signals before rounding, summed.
    """

    seen: list[Seen]
    rows: Rows
    squared_error: float
    power: float


def measure(source: Source, plan: Plan, indices: Sequence[int]) -> list[Seen]:
    """Look at trials and measure each for the statistics of its block."""
    return [
        seen._replace(moments=TrialMoments.of(signal)) if signal is not None else seen
        for seen, signal in _looked(source, plan, indices)
    ]


def write(
    source: Source, plan: Plan, indices: Sequence[int], number: int, scale: Scale | None
) -> Written:
    """Write a chunk's trials, z-scored by ``scale``, into one Arrow file for each split.

    Without a scale the trials are looked at as they are read; with one they have been.
    """
    seen: list[Seen] = []
    rows: Rows = {}
    error = power = 0.0
    writers: dict[str, ShardWriter] = {}
    with ThreadPoolExecutor(1) as beside:
        for index, stored, look in _prepared(source, plan, indices, scale):
            if look is not None:
                seen.append(look)
            if stored is None:
                continue
            if plan.dtype != "float32":
                rounded = _rounded(stored, plan.dtype, source.trials[index].name)
                rest = stored - rounded.astype(np.float32)
                error += float(np.square(rest, dtype=np.float64).sum())
                power += float(np.square(stored, dtype=np.float64).sum())
                stored = rounded
            split = plan.splits[index]
            if split not in writers:
                path = shard(plan.folder, number, split)
                writers[split] = ShardWriter(path, len(source.channels), plan.dtype, beside)
            writers[split].write(row_of(source, index, split), stored)
            looked = None if look is None or plan.dtype != "float32" else look.looked
            digest = signal_digest(stored).hex() if looked is None else looked.digest
            rows.setdefault(split, []).append((index, digest))
        for writer in writers.values():
            writer.close()
    return Written(seen, rows, error, power)


def row_of(source: Source, index: int, split: str) -> dict[str, Any]:
    """Return the columns of one trial, less its signal."""
    info = source.trials[index]
    return {
        "text": info.text,
        "phonemes": None if info.phonemes is None else list(info.phonemes),
        "session": info.session,
        "subject": info.subject,
        "block": info.block,
        "trial": info.trial,
        "sampling_rate": source.sampling_rate,
        "split": split,
    }


def shard(folder: Path, number: int, split: str) -> Path:
    """Return the file of one split of a chunk."""
    return folder / f"chunk-{number:06d}-{split}.arrow"


def _prepared(
    source: Source, plan: Plan, indices: Sequence[int], scale: Scale | None
) -> Iterator[tuple[int, np.ndarray | None, Seen | None]]:
    if scale is None:
        for seen, signal in _looked(source, plan, indices):
            stored = None if signal is None else np.ascontiguousarray(signal, dtype=np.float32)
            yield seen.trial, stored, seen
        return
    for index in indices:
        mean, deviation = scale[unit_of(source, index, plan.by)]
        signal = (source.read(index) - mean) / deviation
        yield index, np.ascontiguousarray(signal, dtype=np.float32), None


def _looked(
    source: Source, plan: Plan, indices: Sequence[int]
) -> Iterator[tuple[Seen, np.ndarray | None]]:
    for index in indices:
        signal = source.read(index)
        try:
            require_finite(signal, source.trials[index].name)
        except UserError as error:
            yield Seen(index, None, str(error)), None
            if not plan.skip:
                return
            continue
        yield Seen(index, look_at(signal, z_scored=source.standardized), None), signal


def _rounded(signal: np.ndarray, dtype: str, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        rounded = signal.astype(dtype)
    if not np.isfinite(rounded).all():
        raise UserError(
            f"trial {name} reaches {np.abs(signal).max():g}, more than {dtype} holds "
            f"({np.finfo(dtype).max:g}): leave --dtype at float32, or z-score by --normalize block"
        )
    return rounded


_MOST_WORKERS = 8
_WORTH_SECONDS = 5.0
"""Work that is less is done before other processes have imported what they need."""

_here: tuple[Source, Plan] | UserError | None = None
"""What a worker process opened when it started, or why it could not."""

Task = Callable[..., Any]


class LostWorkerError(UserError):
    """A process was ended from outside: what is written is sound."""


@contextmanager
def pool(
    source: Source, plan: Plan, reopen: Reopen | None, workers: int | None
) -> Iterator[Callable[[Task, list[tuple[Any, ...]]], Iterator[Any]]]:
    """Yield a function that does tasks and returns their results in order.

    Args:
        source: opened here.
        plan: what goes with it.
        reopen: how other processes open it; without it all is done here.
        workers: processes; 1 is this one. None begins in this one, and starts as many as there are
            cores once what is left would take it more than `_WORTH_SECONDS`.
    """
    cores = max(1, min(_MOST_WORKERS, len(os.sched_getaffinity(0))))
    count = 1 if reopen is None else workers or cores
    executor: ProcessPoolExecutor | None = None

    def each(task: Task, calls: list[tuple[Any, ...]]) -> Iterator[Any]:
        nonlocal executor
        began = time.monotonic()
        for done, call in enumerate(calls):
            left = (time.monotonic() - began) * (len(calls) - done) / done if done else 0.0
            if count > 1 and (executor or workers or left > _WORTH_SECONDS):
                executor = executor or ProcessPoolExecutor(
                    count,
                    get_context("spawn"),
                    initializer=partial(_start, _travelling(source, reopen), plan),
                )
                yield from _in_order(executor, task, calls[done:], 2 * count, source)
                return
            yield task(source, plan, *call)

    try:
        yield each
    finally:
        if executor is not None:
            executor.shutdown(wait=True, cancel_futures=True)


def _in_order(
    executor: ProcessPoolExecutor,
    task: Task,
    calls: list[tuple[Any, ...]],
    ahead: int,
    source: Source,
) -> Iterator[Any]:
    """Submit a few calls ahead: what they return must not pile up."""
    waiting: deque[Any] = deque()
    for call in [*calls, *[None] * ahead]:
        if call is not None:
            with left_to_this_process():
                waiting.append(executor.submit(_do, task, *call))
        if waiting and (call is None or len(waiting) > ahead):
            try:
                result, remarks = waiting.popleft().result()
            except BrokenProcessPool:
                raise LostWorkerError(
                    "a process that was reading ended on the way, most likely because memory ran "
                    "out: the same command goes on from what is written; take fewer --workers"
                ) from None
            source.remarks.merge(remarks)
            yield result


def _travelling(source: Source, reopen: Reopen | None) -> "Source | Reopen":
    """Return what a worker gets: the source itself where it is small, or how to open it."""
    if getattr(source, "portable", False):
        return source
    assert reopen is not None
    return reopen


def _start(given: "Source | Reopen", plan: Plan) -> None:
    """Open the source in a worker, silently: the first process has said what there is to say."""
    global _here
    logging.disable(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"
    try:
        _here = (given.open() if isinstance(given, Reopen) else given, plan)
    except UserError as error:
        _here = error


def _do(task: Task, *call: Any) -> tuple[Any, Any]:
    if isinstance(_here, UserError):
        raise _here
    assert _here is not None
    result = task(*_here, *call)
    return result, _here[0].remarks.take()


def saved(path: Path, content: Any) -> None:
    """Write JSON so that it is whole or not there."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content), "utf-8")
    os.replace(temporary, path)
