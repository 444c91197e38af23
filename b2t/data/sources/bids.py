"""BIDS datasets of EEG, MEG and intracranial recordings, read by MNE-BIDS.

Each run is a session; events become annotations, bad channels are left out.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from b2t.data.remarks import Remarks
from b2t.data.sources import ctf_check
from b2t.data.sources.base import SourceOptions
from b2t.data.sources.mne_files import MNESource, continuous
from b2t.data.sources.parts import Part
from b2t.errors import UserError

NAME = "bids"
READS = "BIDS folders (dataset_description.json; EEG, MEG, iEEG)"
OPTIONS = frozenset({"window", "overlap", "annotations", "channels"})
_KINDS = ("eeg", "meg", "ieeg")
_BESIDE = (".tsv", ".json", ".eeg", ".vmrk", ".fdt")
"""Files that go with a recording."""


def find(path: Path) -> list[Path]:
    """Return the folder, if it is the root of a BIDS dataset."""
    return [path] if (path / "dataset_description.json").is_file() else []


def open_source(path: Path, files: list[Path], options: SourceOptions) -> MNESource:
    """Open all runs."""
    try:
        from mne_bids import find_matching_paths, read_raw_bids
    except ImportError:
        raise UserError('reading BIDS needs MNE-BIDS: pip install "b2t[bids]"') from None
    found = find_matching_paths(
        path, datatypes=list(_KINDS), suffixes=list(_KINDS), ignore_json=True, ignore_nosub=True
    )
    runs = {Path(run.fpath): run for run in found if run.extension not in _BESIDE}
    if not runs:
        raise UserError(f"{path}: no EEG, MEG or iEEG run of a subject in this BIDS dataset")

    def read(file: Path, remarks: Remarks) -> tuple[Any, Callable[..., Part]]:
        if file.suffix == ".ds":
            ctf_check.require_sound(file)
        return read_raw_bids(runs[file], verbose="WARNING"), continuous

    named = [(file, run.basename.rsplit("_", 1)[0]) for file, run in runs.items()]
    return MNESource(NAME, path, named, options, read)
