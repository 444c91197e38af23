"""From a source to a folder that training reads, in steps that a later call can go on from."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from b2t.data.prepare.assemble import RECORD, VERSION, assemble
from b2t.data.prepare.blocks import (
    FILE,
    Blocks,
    Scale,
    TrialMoments,
    read_statistics,
    save_statistics,
    unit_of,
)
from b2t.data.prepare.card import write_card
from b2t.data.prepare.options import PrepareOptions
from b2t.data.prepare.splits import assign_splits, require_filled
from b2t.data.prepare.work import (
    LostWorkerError,
    Plan,
    Reopen,
    Rows,
    Seen,
    Written,
    chunk_size,
    measure,
    pool,
    saved,
    shard,
    write,
)
from b2t.data.sources import Source
from b2t.data.sources.prepared_folders import KEY, UNFINISHED
from b2t.data.trial_checks import Looked, TrialChecks
from b2t.data.trials import row_id
from b2t.errors import UserError
from b2t.log import logger

log = logger(__name__)
DTYPES = ("float32", "float16")
NORMALIZATIONS = ("auto", "block", "session", "recording", "none")


def prepare(
    source: Source,
    out: str | Path,
    options: PrepareOptions,
    *,
    record: dict[str, Any] | None = None,
    reopen: Reopen | None = None,
    workers: int | None = None,
    licence: str | None = None,
) -> dict[str, Any]:
    """Write ``source`` to ``out`` as a ``DatasetDict`` with ``b2t.json`` beside it.

    A call that is killed or interrupted leaves ``out.partial``, which nothing loads; the same call
    goes on from it. The result does not depend on the number of processes or interruptions.

    Args:
        source: an opened source (`b2t.data.sources.detect`).
        out: a folder that does not exist yet, or an earlier result to overwrite.
        options: normalisation and splits.
        record: further entries of ``b2t.json``, such as where the data came from.
        reopen: how to open the source again; None: one process, nothing left if interrupted.
        workers: processes; None takes as many as there are cores where it is worth starting them.
        licence: of the recordings, for the data card.

    Returns:
        The content of ``b2t.json``.

    Raises:
        UserError: ``out`` exists, a split would be empty, or a trial is empty, holds NaN or occurs
            twice.
    """
    out = Path(out)
    _require_known(options.dtype)
    _require_free(out, options.overwrite)
    splits = assign_splits(source, options)
    require_filled(source, splits, options)
    partial = out.with_name(out.name + UNFINISHED)
    plan = _plan(source, splits, options, partial)
    lock = _enter(partial, _key(source, splits, options, reopen))
    try:
        with pool(source, plan, reopen, workers) as each:
            job = _Job(source, plan, options, each)
            content = job.content(record or {})
        write_card(partial / "dataset", out.name, content, licence)
        _replace(partial / "dataset", out)
        shutil.rmtree(partial, ignore_errors=True)
    except (KeyboardInterrupt, LostWorkerError):
        if reopen is None:
            shutil.rmtree(partial, ignore_errors=True)
        else:
            log.info("interrupted: the same command goes on from %s", partial)
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)
        source.remarks.say()
    job.say_skipped()
    return content


def _require_known(dtype: str) -> None:
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: expected {' or '.join(DTYPES)}")


def _plan(source: Source, splits: list[str], options: PrepareOptions, folder: Path) -> Plan:
    by = _normalization(source, options)
    return Plan(folder, splits, options.dtype, options.skip_bad_trials, by)


def _normalization(source: Source, options: PrepareOptions) -> str:
    """Return what trials are z-scored within, `none` where they are not."""
    if options.normalize not in NORMALIZATIONS:
        raise UserError(f"--normalize {options.normalize}: expected {', '.join(NORMALIZATIONS)}")
    if options.statistics not in ("train", "all"):
        raise UserError(f"--statistics {options.statistics}: expected train or all")
    by = options.normalize
    if by == "auto":
        by = "none" if source.standardized else "block"
    units = getattr(source, "units", ())
    if by == "none" and len(units) > 1:
        raise UserError(
            f"--normalize none: the sources have units {', '.join(map(str, units))}, and one "
            "dataset needs one: z-score them (--normalize block), or prepare them apart"
        )
    return by


def _replace(new: Path, out: Path) -> None:
    if out.exists():
        shutil.rmtree(out)
    new.rename(out)


class _Job:
    """The two passes over the trials, chunk by chunk, and what they find."""

    def __init__(
        self,
        source: Source,
        plan: Plan,
        options: PrepareOptions,
        each: Callable[..., Iterator[Any]],
    ) -> None:
        self.source = source
        self.plan = plan
        self.options = options
        self.each = each
        self.skipped: list[str] = []
        self.kept = list(range(len(source.trials)))
        self.rows: list[Rows] = []
        self.squared_error = self.power = 0.0
        self._checks = TrialChecks(source.remarks, z_scored=source.standardized)
        self.scales: Scale = {}
        """What `statistics.npz` holds."""

    def content(self, record: dict[str, Any]) -> dict[str, Any]:
        """Do all, and return what `b2t.json` then says."""
        scale = None if self.plan.by == "none" else self._measure()
        self._write(scale)
        more = {
            "normalization": self.plan.by,
            "processing": getattr(self.source, "processing", None),
            "skipped": len(self.skipped),
            "options": asdict(self.options),
            "dtype": self.plan.dtype,
            **self._rounding(),
            **record,
        }
        found = assemble(self.source, self.plan, self.kept, self.rows, more)
        if self.scales:
            save_statistics(self.plan.folder / "dataset", self.scales)
        return found

    def say_skipped(self) -> None:
        """Warn of trials that were left out, and of splits that are empty without them."""
        if self.skipped:
            log.warning("left out %d bad trials, the first: %s", len(self.skipped), self.skipped[0])
        left = {self.plan.splits[index] for index in self.kept}
        for split in sorted(set(self.plan.splits) - left):
            log.warning("there is no %s split: all of its trials are bad", split)

    def _chunks(self) -> list[list[int]]:
        """Return the trials that are kept, in chunks that do not depend on which those are."""
        kept = set(self.kept)
        count = len(self.source.trials)
        size = chunk_size(count)
        return [
            [index for index in range(start, min(start + size, count)) if index in kept]
            for start in range(0, count, size)
        ]

    def _measure(self) -> Scale:
        options = self.options
        known = None if options.like is None else read_statistics(Path(options.like))
        blocks = Blocks(self.source, self.plan.by, self.plan.splits, options.statistics, known)
        everything, kept = self._chunks(), []
        done = [_load_measured(self.plan.folder, number) for number in range(len(everything))]
        fresh = self.each(
            measure,
            [(chunk,) for chunk, found in zip(everything, done, strict=True) if found is None],
        )
        with self._progress("measuring blocks") as bar:
            for number, chunk in enumerate(everything):
                found = done[number]
                if found is None:
                    found = next(fresh)
                    _save_measured(self.plan.folder, number, found)
                for seen in found:
                    if self._accept(seen):
                        kept.append(seen.trial)
                        assert seen.moments is not None
                        blocks.add(seen.trial, seen.moments)
                bar.update(len(chunk))
        self.kept = kept
        blocks.say_flat(getattr(self.source, "absent", ()))
        scale, self.scales = blocks.scale(), blocks.kept()
        return scale

    def _write(self, scale: Scale | None) -> None:
        everything, kept = self._chunks(), []
        done = [_load_written(self.plan.folder, number) for number in range(len(everything))]
        fresh = self.each(
            write,
            [
                (chunk, number, self._scale_of(chunk, scale))
                for number, chunk in enumerate(everything)
                if done[number] is None
            ],
        )
        with self._progress("writing trials") as bar:
            for number, chunk in enumerate(everything):
                found = done[number]
                if found is None:
                    found = next(fresh)
                    _save_written(self.plan.folder, number, found)
                kept += [seen.trial for seen in found.seen if self._accept(seen)]
                self.rows.append(found.rows)
                self.squared_error += found.squared_error
                self.power += found.power
                bar.update(len(chunk))
        if scale is None:
            self.kept = kept

    def _scale_of(self, chunk: list[int], scale: Scale | None) -> Scale | None:
        """Return what a chunk needs of a scale: it travels to another process."""
        if scale is None:
            return None
        units = {unit_of(self.source, index, self.plan.by) for index in chunk}
        return {unit: scale[unit] for unit in units}

    def _accept(self, seen: Seen) -> bool:
        """Whether a trial is kept.

        Raises:
            UserError: it is bad, and bad trials are not to be skipped.
        """
        info = self.source.trials[seen.trial]
        problem = seen.problem
        if problem is None and seen.looked is not None:
            try:
                split = self.plan.splits[seen.trial]
                self._checks.compare(seen.looked, row_id(vars(info)), info.name, split)
                return True
            except UserError as error:
                problem = str(error)
        if not self.options.skip_bad_trials:
            raise UserError(problem)
        self.skipped.append(str(problem))
        return False

    def _progress(self, what: str) -> Any:
        return tqdm(total=len(self.source.trials), desc=what, unit="trial", disable=None)

    def _rounding(self) -> dict[str, float]:
        """Return the signal-to-noise ratio of rounded signals, in dB."""
        if not self.squared_error:
            return {}
        return {"rounding_snr_db": round(10 * np.log10(self.power / self.squared_error), 2)}


def _require_free(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    ours = (out / RECORD).exists()
    if not overwrite or not ours:
        raise UserError(
            f"{out} exists: "
            + ("replace it with --overwrite, or " if ours else "it is no prepared dataset; ")
            + "choose another name"
        )


def _key(
    source: Source, splits: list[str], options: PrepareOptions, reopen: Reopen | None
) -> str | None:
    """Return what an unfinished folder must have in common with this call to be gone on from."""
    if reopen is None:
        return None
    content = [
        VERSION,
        chunk_size(len(source.trials)),
        source.format,
        source.channels,
        source.sampling_rate,
        [asdict(info) for info in source.trials],
        splits,
        {**asdict(options), "overwrite": None},
        asdict(reopen.options),
        reopen.processing.model_dump(),
        None if options.like is None else (Path(options.like) / FILE).stat().st_mtime_ns,
        reopen.stamps(),
    ]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _enter(partial: Path, key: str | None) -> int:
    """Make the unfinished folder, or find it as an earlier call of the same kind left it.

    Returns:
        The folder opened, for this call alone until it is closed.
    """
    if partial.is_dir():
        os.close(_locked(partial))
    _make(partial, key)
    return _locked(partial)


def _locked(partial: Path) -> int:
    """Open a folder that no other call may have open."""
    handle = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(
            f"{partial}: another call of `b2t prepare` is writing there; wait for it, or choose "
            "another OUT"
        ) from None
    except OSError:
        pass  # a file system without locks
    return handle


def _make(partial: Path, key: str | None) -> None:
    place = partial / KEY
    if key is not None:
        with contextlib.suppress(OSError, ValueError):
            if json.loads(place.read_text()) == key:
                shutil.rmtree(partial / "dataset", ignore_errors=True)
                log.info("going on from %s, which an earlier call left", partial)
                return
    if partial.exists() and not place.exists() and {*os.listdir(partial)} - {"key.tmp"}:
        raise UserError(
            f"{partial} is in the way, and no unfinished dataset: choose another OUT, or rename it"
        )
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    saved(place, key)


def _save_measured(folder: Path, number: int, found: list[Seen]) -> None:
    moments = [seen.moments for seen in found if seen.moments is not None]
    place = folder / f"measured-{number:06d}.npz"
    arrays = {
        "seen": np.array(json.dumps([_plain(seen) for seen in found])),
        "bins": np.array([each.bins for each in moments], np.int64),
        "mean": np.array([each.mean for each in moments]),
        "squares": np.array([each.squares for each in moments]),
    }
    with (folder / "measured.tmp").open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub has one keyword alone
    os.replace(folder / "measured.tmp", place)


def _load_measured(folder: Path, number: int) -> list[Seen] | None:
    place = folder / f"measured-{number:06d}.npz"
    if not place.exists():
        return None
    with np.load(place, allow_pickle=False) as file:
        columns = zip(file["bins"], file["mean"], file["squares"], strict=True)
        moments = [TrialMoments(int(bins), mean, squares) for bins, mean, squares in columns]
        found = [_seen(plain) for plain in json.loads(str(file["seen"]))]
    measured = iter(moments)
    return [seen if seen.problem else seen._replace(moments=next(measured)) for seen in found]


def _save_written(folder: Path, number: int, found: Written) -> None:
    seen = [_plain(each) for each in found.seen]
    content = [seen, found.rows, found.squared_error, found.power]
    saved(folder / f"chunk-{number:06d}.json", content)


def _load_written(folder: Path, number: int) -> Written | None:
    place = folder / f"chunk-{number:06d}.json"
    if not place.exists():
        return None
    seen, rows, error, power = json.loads(place.read_text())
    if not all(shard(folder, number, split).exists() for split in rows):
        return None
    return Written([_seen(plain) for plain in seen], rows, error, power)


def _plain(seen: Seen) -> list[Any]:
    looked = None if seen.looked is None else list(seen.looked)
    return [seen.trial, looked, seen.problem]


def _seen(plain: list[Any]) -> Seen:
    index, looked, problem = plain
    return Seen(index, None if looked is None else Looked(*looked), problem)
