"""Sources of trials: one module per file format, and the choice among them."""

import os
from pathlib import Path

from b2t.data.sources import mne_files, t15
from b2t.data.sources.base import Source, SourceFormat, SourceOptions, TrialInfo
from b2t.errors import UserError

_RECORDINGS = (".hdf5", ".h5", ".fdt", *mne_files.EXTENSIONS)

FORMATS: tuple[SourceFormat, ...] = (t15, mne_files)

__all__ = ["FORMATS", "Source", "SourceFormat", "SourceOptions", "TrialInfo", "detect"]


def detect(path: str | Path, options: SourceOptions | None = None) -> Source:
    """Open ``path``, a file or a folder, with the format that knows it.

    Raises:
        UserError: nothing there, nothing readable there, or two formats in one folder.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if (path / "dataset_dict.json").exists():
        raise UserError(
            f"{path} is a prepared dataset already: look at it with `b2t inspect {path}`"
        )
    _require_whole_links(path)
    found = [(module, files) for module in FORMATS if (files := module.find(path))]
    if not found:
        raise UserError(
            f"{path}: nothing that b2t reads ({_content(path)}). Expected a Brain-to-Text '25 "
            "folder (…/t15.YYYY.MM.DD/data_train.hdf5), or recordings in FIF, EDF, BDF or EEGLAB "
            "SET (.fif, .fif.gz, .edf, .bdf, .set)"
        )
    if len(found) > 1:
        names = " and ".join(f"{files[0]} ({module.NAME})" for module, files in found)
        raise UserError(f"{path} mixes formats: {names}: prepare them apart")
    module, files = found[0]
    return module.open_source(path, files, options or SourceOptions())


def _require_whole_links(path: Path) -> None:
    """Refuse a recording that is a link to nothing: looking for files would pass it over."""
    places = sorted(path.rglob("*")) if path.is_dir() else []
    dangling = [
        place
        for place in places
        if place.name.lower().endswith(_RECORDINGS) and place.is_symlink() and not place.exists()
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
