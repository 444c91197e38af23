"""Bins as they come: from a pipe, or from a file that another program goes on writing."""

import os
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from b2t.errors import UserError

_READ = 1 << 16
_POLL_S = 0.005


def read_bins(source: str, channels: int, idle_s: float) -> Iterator[np.ndarray]:
    """Yield bins [n, C] float32, n ≥ 1, as soon as they are there.

    Args:
        source: `-` for standard input, or a file: raw values, or `.npy` with rows of bins, whose
            rows may go on beyond the length in its header.
        channels: C.
        idle_s: a file that has not grown for so long has ended; standard input ends by itself.

    Raises:
        UserError: no such file, another type or number of channels, or a last bin that is cut off.
    """
    width = 4 * channels
    rest = b""
    for block in _blocks(source, channels, idle_s):
        block = rest + block
        whole = len(block) - len(block) % width
        rest = block[whole:]
        if whole:
            yield np.frombuffer(block[:whole], "<f4").reshape(-1, channels)
    if rest:
        raise UserError(
            f"{source}: it ends within a bin, {len(rest)} bytes after the last whole one of "
            f"{channels} float32 values: is that the model's number of channels?"
        )


def sentences(bins: Iterator[np.ndarray], at_once: int) -> Iterator[np.ndarray | None]:
    """Yield bins [n ≤ `at_once`, C] of sentences, and None where one ends."""
    open_ = False
    for block in bins:
        breaks = np.isnan(block).all(axis=1)
        edges = [0, *(np.flatnonzero(breaks[1:] != breaks[:-1]) + 1), len(block)]
        for first, last in pairwise(edges):
            if breaks[first]:
                if open_:
                    yield None
                open_ = False
                continue
            for start in range(first, last, at_once):
                open_ = True
                yield block[start : min(start + at_once, last)]
    if open_:
        yield None


def _blocks(source: str, channels: int, idle_s: float) -> Iterator[bytes]:
    if source == "-":
        while block := os.read(sys.stdin.fileno(), _READ):
            yield block
        return
    path = Path(source)
    if not path.is_file():
        raise UserError(f"--follow={source}: no such file; - reads standard input")
    with path.open("rb") as file:
        if path.suffix == ".npy":
            _read_header(file, source, channels)
        last = time.monotonic()
        while True:
            block = file.read(_READ)
            if block:
                yield block
                last = time.monotonic()
            elif time.monotonic() - last > idle_s:
                return
            else:
                time.sleep(_POLL_S)


def _read_header(file: BinaryIO, source: str, channels: int) -> None:
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(file)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{source}: not a .npy file ({error}); raw bins have another name"
        ) from None
    if dtype != np.dtype("<f4") or fortran or len(shape) != 2 or shape[1] != channels:
        order = ", in Fortran's order" if fortran else ""
        raise UserError(
            f"{source}: {dtype} of shape {'×'.join(map(str, shape))}{order}; expected float32 in "
            f"rows of {channels} channels"
        )
