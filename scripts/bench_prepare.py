"""What `b2t prepare` costs beside h5py's reading alone, as ratios within one run.

    scripts/bench_prepare.py                              # as they lie in memory
    scripts/bench_prepare.py --cold                       # from the disk: the page cache is emptied
    scripts/bench_prepare.py --compression gzip           # HDF5 that was compressed

Recordings are noise in the layout of Brain-to-Text '25, written for the purpose and removed. What
is compared is the time by the clock of `b2t.data.prepare` with ``--workers`` processes (default: as
`b2t prepare` chooses), least of ``--repeats``, and that of a loop over `h5py`, which keeps nothing.
What preparing costs whatever the size (the picture of the card, starting its processes) is measured
on a few trials and told apart; starting Python and importing libraries is in neither.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import torch
import xxhash
from bench_data import MIB, write_release

from b2t.data.prepare import PrepareOptions, Reopen, prepare
from b2t.data.sources import SourceOptions
from b2t.log import quiet_libraries

FEW = 8
"""Trials that what does not depend on their number is measured on."""


class Took(NamedTuple):
    """Seconds by the clock, and of this process's processor."""

    clock: float
    processor: float


def arguments() -> argparse.Namespace:
    """Options of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=1440, help="in the recordings (1440)")
    parser.add_argument("--channels", type=int, default=512, help="of them (512)")
    parser.add_argument("--compression", choices=("none", "gzip"), default="none")
    parser.add_argument("--cold", action="store_true", help="empty the page cache of the files")
    parser.add_argument("--workers", type=int, help="processes (default: as b2t prepare)")
    parser.add_argument("--repeats", type=int, default=3, help="of each time (3)")
    parser.add_argument("--scratch", type=Path, help="folder to write below (default: /tmp)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    return parser.parse_args()


def main() -> int:
    """Measure, print a line for each ratio."""
    options = arguments()
    quiet_libraries()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        found = measure(Path(scratch), options)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))
    return 0


def measure(scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Read recordings, prepare them; return the ratios."""
    release, few = scratch / "release", scratch / "few"
    compression = None if options.compression == "none" else options.compression
    size = write_release(release, options.trials, options.channels, compression)
    write_release(few, FEW, options.channels, compression)
    stored = sum(file.stat().st_size for file in release.rglob("*.hdf5"))
    print(
        f"{size / MIB:,.0f} MiB ({stored / MIB:,.0f} on disk, {options.compression}) in "
        f"{options.trials} trials of {options.channels} channels, files in "
        f"{'no cache' if options.cold else 'the page cache'}, {len(os.sched_getaffinity(0))} cores"
    )

    def least(work: Callable[[], None], source: Path = release) -> Took:
        return least_of(work, source, options.repeats, options.cold)

    out = scratch / "prepared"
    alone = least(lambda: read(release))
    bound = least(lambda: read_hash_write(release, scratch / "copy.bin"))
    fixed = least(lambda: prepared(few, out, 1), few)
    whole = least(lambda: prepared(release, out, options.workers))
    found = {
        "mib": size / MIB,
        "alone_s": alone.clock,
        "fixed_s": fixed.clock,
        "prepare_s": whole.clock,
        "prepare": alone.clock / whole.clock,
        "prepare_less_fixed": alone.clock / (whole.clock - fixed.clock),
        "bound": alone.clock / bound.clock,
    }
    if options.workers == 1:
        found["processor"] = alone.processor / whole.processor
        found["processor_less_fixed"] = alone.processor / (whole.processor - fixed.processor)
        found["processor_bound"] = alone.processor / bound.processor
    print(
        f"h5py alone {alone.clock:.2f} s · prepare {whole.clock:.2f} s, of which {fixed.clock:.2f} "
        f"s whatever the size\nprepare: {found['prepare']:.2f} × the rate of h5py's reading alone, "
        f"{found['prepare_less_fixed']:.2f} × less what it costs whatever the size; reading, "
        f"hashing and writing in one process {found['bound']:.2f} ×"
    )
    if options.workers == 1:
        print(
            f"by processor time {found['processor']:.2f} ×, {found['processor_less_fixed']:.2f} ×; "
            f"{found['processor_bound']:.2f} ×"
        )
    return found


def read(folder: Path) -> None:
    """Read every trial with h5py."""
    for path in sorted(folder.rglob("*.hdf5")):
        with h5py.File(path, "r") as file:
            for group in file.values():
                group["input_features"][:]


def read_hash_write(folder: Path, copy: Path) -> None:
    """Do what no preparation can leave out: read every trial, hash it, write its bytes."""
    digest = xxhash.xxh3_128()
    copy.unlink(missing_ok=True)
    with copy.open("wb") as out:
        for path in sorted(folder.rglob("*.hdf5")):
            with h5py.File(path, "r") as file:
                for group in file.values():
                    signal = group["input_features"][:]
                    digest.update(signal.data)
                    out.write(signal.data)


def prepared(release: Path, out: Path, workers: int | None) -> None:
    """Do what `b2t prepare` does once Python has started."""
    reopen = Reopen((release,), SourceOptions())
    prepare(reopen.open(), out, PrepareOptions(), reopen=reopen, workers=workers)


def least_of(work: Callable[[], None], source: Path, repeats: int, cold: bool) -> Took:
    """Return the least times of ``work``; what it wrote is removed outside of them."""
    times = []
    for _ in range(repeats):
        os.sync()  # what was written before is not written meanwhile
        if cold:
            forget(source)
        began = Took(time.perf_counter(), time.process_time())
        work()
        times.append(Took(time.perf_counter() - began.clock, time.process_time() - began.processor))
        shutil.rmtree(source.parent / "prepared", ignore_errors=True)
        (source.parent / "copy.bin").unlink(missing_ok=True)
    return Took(min(took.clock for took in times), min(took.processor for took in times))


def forget(folder: Path) -> None:
    """Take files out of the page cache."""
    for path in folder.rglob("*.hdf5"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    raise SystemExit(main())
