"""MATLAB files of one continuous signal, or of trials of equal length, under any name.

``--signal NAME`` is the variable, [samples, channels] or [trials, samples, channels]; ``--rate`` is
a number of Hz or the name of the variable that holds it. What is not named is looked for: the one
large table, and a variable ``fs``, ``srate`` or the like.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

from b2t.data.remarks import Remarks
from b2t.data.sources.arrays import Array, open_array
from b2t.data.sources.base import SourceOptions, rate_in_hertz, require_rate
from b2t.data.sources.cutting import require_sensible
from b2t.data.sources.matlab import MatFile, number, numbers
from b2t.data.sources.parts import Part, PartsSource
from b2t.data.sources.sessions import session_name
from b2t.errors import UserError

NAME = "mat"
READS = "MATLAB files of one signal (.mat; --signal NAME --rate HZ|NAME)"
OPTIONS = frozenset({"window", "overlap", "channels", "signal", "rate", "layout"})
_RATES = ("fs", "srate", "sfreq", "rate", "sampling_rate", "samplingrate", "sample_rate", "fsample")


def find(path: Path) -> list[Path]:
    """Return the MATLAB files at ``path``."""
    candidates = [path] if path.is_file() else sorted(path.rglob("*"))
    return [file for file in candidates if file.is_file() and file.suffix.lower() == ".mat"]


def open_source(path: Path, files: list[Path], options: SourceOptions) -> PartsSource:
    """Open all files."""
    require_sensible(options)
    remarks = Remarks()
    latest = lru_cache(maxsize=1)(_signal)  # trials are read file by file
    parts = [_open(file, path, latest, options, remarks) for file in files]
    return PartsSource(NAME, path, parts, options, remarks)


def _open(
    file: Path,
    root: Path,
    load: Callable[[Path, str], np.ndarray],
    options: SourceOptions,
    remarks: Remarks,
) -> Part:
    content = MatFile(file)
    name = options.signal or _likely_signal(content)
    rate = _rate(content, options)
    require_rate(rate, options.resample, file)
    signal = load(file, name)
    if not options.signal:
        remarks.add(
            f"read variable {name} at {rate:g} Hz; --signal and --rate choose otherwise",
            str(file),
            "file",
        )
    array = Array(
        file=file,
        place=name,
        session=session_name(file, root),
        shape=signal.shape,
        rate=rate,
        load=lambda: load(file, name),
    )
    return open_array(array, options, remarks)


def _signal(file: Path, name: str) -> np.ndarray:
    return numbers(MatFile(file)[name], f"{file}, {name}")


def _likely_signal(content: MatFile) -> str:
    large = {
        name: int(np.prod(shape))
        for name, shape in content.shapes().items()
        if len(shape) in (2, 3) and min(shape) > 1
    }
    if not large:
        raise UserError(
            f"{content.file} holds no table of numbers (its variables: "
            f"{', '.join(content.names()) or 'none'}): name the signal with --signal NAME"
        )
    name = max(large, key=large.__getitem__)
    rivals = [other for other, size in large.items() if other != name and 2 * size > large[name]]
    if rivals:
        raise UserError(
            f"{content.file} holds several tables ({', '.join([name, *rivals])}): name the signal "
            "with --signal NAME"
        )
    return name


def _rate(content: MatFile, options: SourceOptions) -> float:
    if options.rate is not None:
        try:
            float(options.rate)
        except ValueError:
            return number(content[options.rate], f"{content.file}, {options.rate}")
        return rate_in_hertz(options.rate)
    for name in content.names():
        if name.lower() in _RATES:
            return number(content[name], f"{content.file}, {name}")
    raise UserError(
        f"{content.file} does not say its sampling rate (its variables: "
        f"{', '.join(content.names())}): give it with --rate HZ, or --rate NAME of a variable"
    )
