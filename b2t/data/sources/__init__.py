"""Sources of trials: one module per file format, and the choice among them."""

import os
from dataclasses import fields
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path

from b2t.data.sources import (
    bids,
    csv_files,
    labram,
    mat_files,
    mne_files,
    numpy_files,
    nwb,
    pickle_files,
    t12,
    t15,
    zuco,
)
from b2t.data.sources.base import Source, SourceFormat, SourceOptions, TrialInfo
from b2t.data.sources.joined import join
from b2t.data.sources.prepared_folders import not_prepared
from b2t.errors import UserError

ENTRY_POINTS = "b2t.sources"
"""Group of entry points by which other packages bring formats: modules, see `SourceFormat`."""

FORMATS: tuple[SourceFormat, ...] = (
    bids,
    labram,
    t15,
    t12,
    pickle_files,
    zuco,
    nwb,
    mne_files,
    mat_files,
    numpy_files,
    csv_files,
)
"""In the order in which they are asked whether a file is theirs."""

__all__ = [
    "ENTRY_POINTS", "FORMATS", "Source", "SourceFormat", "SourceOptions", "TrialInfo", "detect",
    "formats", "join",
]  # fmt: skip

_ALWAYS = {"resample", "fractions"}
_SUFFIXES = (
    ".hdf5", ".h5", ".fdt", ".mat", ".npy", ".npz", ".nwb", ".csv", ".zip", ".pkl",
    *mne_files.EXTENSIONS,
)  # fmt: skip


@lru_cache(maxsize=1)
def formats() -> tuple[SourceFormat, ...]:
    """Return our formats and those that other packages bring.

    Raises:
        UserError: an installed package's format cannot be loaded.
    """
    found = []
    for point in entry_points(group=ENTRY_POINTS):
        try:
            module = point.load()
        except Exception as error:  # another package's code, which may raise anything
            raise UserError(
                f"the format {point.name} of {point.value} cannot be loaded "
                f"({type(error).__name__}: {error}): repair or remove that package"
            ) from None
        missing = [
            name
            for name in ("NAME", "READS", "OPTIONS", "find", "open_source")
            if not hasattr(module, name)
        ]
        if missing:
            raise UserError(
                f"the format {point.name} of {point.value} has no {missing[0]}: see "
                "b2t.data.sources.base.SourceFormat"
            )
        found.append(module)
    return (*found, *FORMATS)


def detect(
    path: str | Path, options: SourceOptions | None = None, source: str | None = None
) -> Source:
    """Open ``path``, a file or a folder, with the format that knows it.

    Args:
        path: a file or a folder.
        options: how to read it.
        source: name of the format; None looks at the path.

    Raises:
        UserError: nothing there, nothing readable there, two formats in one folder, or an option
            that the format does not know.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if (path / "dataset_dict.json").exists():
        raise UserError(
            f"{path} is a prepared dataset already: look at it with `b2t inspect {path}`"
        )
    _require_whole_links(path)
    module, files = _chosen(path, source)
    options = options or SourceOptions()
    _require_known(options, module, path)
    return module.open_source(path, files, options)


def _chosen(path: Path, source: str | None) -> tuple[SourceFormat, list[Path]]:
    known = formats()
    if source is not None:
        named = [module for module in known if source == module.NAME]
        if not named:
            names = ", ".join(module.NAME for module in known)
            raise UserError(f"--source {source}: b2t reads {names}")
        files = not_prepared(path, named[0].find(path))
        if not files:
            raise UserError(
                f"{path}: nothing that --source {source} reads ({_content(path)}); it reads "
                f"{named[0].READS}"
            )
        return named[0], files
    found: list[tuple[SourceFormat, list[Path]]] = []
    taken: set[Path] = set()
    for module in known:
        files = [file for file in not_prepared(path, module.find(path)) if file not in taken]
        if files:
            found.append((module, files))
            taken.update(files)
            if module.NAME == bids.NAME:
                break  # everything else in a BIDS folder belongs to it
    if not found:
        raise UserError(
            f"{path}: nothing that b2t reads ({_content(path)}). Expected one of: "
            + "; ".join(module.READS for module in known)
        )
    if len(found) > 1:
        names = " and ".join(f"{files[0]} ({module.NAME})" for module, files in found)
        raise UserError(
            f"{path} mixes formats: {names}: prepare them apart, or choose one with --source"
        )
    return found[0]


def _require_known(options: SourceOptions, module: SourceFormat, path: Path) -> None:
    given = [
        field.name
        for field in fields(options)
        if field.name not in _ALWAYS and getattr(options, field.name) != field.default
    ]
    strange = [name for name in given if name not in module.OPTIONS]
    if strange:
        flags = ", ".join("--" + name.replace("_", "-") for name in strange)
        takes = ", ".join("--" + name.replace("_", "-") for name in sorted(module.OPTIONS))
        raise UserError(
            f"{path} is read as {module.NAME} ({module.READS}), where {flags} means nothing; it "
            f"takes {takes or 'no such option'}"
        )


def _require_whole_links(path: Path) -> None:
    """Refuse a recording that is a link to nothing: looking for files would pass it over."""
    places = sorted(path.rglob("*")) if path.is_dir() else []
    dangling = [
        place
        for place in places
        if place.name.lower().endswith(_SUFFIXES) and place.is_symlink() and not place.exists()
    ]
    if dangling:
        raise UserError(
            f"{dangling[0]} is a link to {os.readlink(dangling[0])}, which is not there "
            f"({len(dangling)} such links): bring the file back, or remove the link"
        )


def _content(path: Path) -> str:
    if path.is_file():
        return f"a file of {path.stat().st_size} bytes"
    names = sorted(entry.name for entry in path.iterdir())
    shown = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
    return f"it holds {shown}" if names else "an empty folder"
