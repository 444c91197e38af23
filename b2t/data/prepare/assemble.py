"""Written chunks into a dataset with its record, fingerprint and checksums."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from datasets import disable_progress_bars

from b2t.data import checksums
from b2t.data.checksums import row_checksum
from b2t.data.phonemes import PHONEMES
from b2t.data.prepare.shards import join_shards, without
from b2t.data.prepare.work import Plan, Rows, row_of, shard
from b2t.data.sources import Source
from b2t.data.sources.base import SPLITS
from b2t.data.trials import Fingerprint, trial_features
from b2t.errors import UserError
from b2t.signal_spec import Z_SCORE

RECORD = "b2t.json"
VERSION = 2
"""Of `b2t.json` and of what fingerprints and checksums are taken over."""


def assemble(
    source: Source, plan: Plan, kept: list[int], chunks: list[Rows], more: dict[str, Any]
) -> dict[str, Any]:
    """Write ``plan.folder / "dataset"`` from the chunks beside it.

    Args:
        source: whose trials they are.
        plan: where and how they were written.
        kept: trials that the dataset holds, ascending.
        chunks: the rows of each chunk.
        more: entries of `b2t.json` beside those that the data themselves tell.

    Returns:
        The content of ``b2t.json``.

    Raises:
        UserError: no trial is left for training.
    """
    among = set(kept)
    shards = {split: _files(plan, among, chunks, split) for split in SPLITS}
    shards = {split: files for split, files in shards.items() if files}
    if "train" not in shards:
        raise UserError("no trial is left for training: every one is bad")
    fingerprint, sums = _marks(source, among, chunks, list(shards))
    rows = {split: len(found) for split, found in sums.items()}
    content = {**_content(source, rows, more), "fingerprint": fingerprint, **more}
    content["arrow"] = {split: _arrow_mark(found) for split, found in sums.items()}
    folder = plan.folder / "dataset"
    shutil.rmtree(folder, ignore_errors=True)
    disable_progress_bars()
    features = trial_features(len(source.channels), plan.dtype)
    join_shards(folder, features, shards, content["arrow"])
    content["checksums"] = checksums.FILE
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (folder / RECORD).write_text(text, "utf-8")
    checksums.save(folder, sums, text)
    return content


def combined_fingerprint(splits: dict[str, str]) -> str:
    """Join the fingerprints of splits into that of a dataset."""
    return "-".join(splits[split][:12] for split in sorted(splits))


def arrow_state(folder: Path) -> str:
    """Return datasets' own mark of a saved split, which any later change of it renews."""
    return str(json.loads((folder / "state.json").read_text())["_fingerprint"])


def _arrow_mark(sums: list[int]) -> str:
    """Return what `datasets` is to know a split by: the same for the same rows."""
    return hashlib.blake2b(np.asarray(sums, "<u8").tobytes(), digest_size=8).hexdigest()


def _files(plan: Plan, kept: set[int], chunks: list[Rows], split: str) -> list[Path]:
    """Return the files of one split in the order of the trials."""
    files = []
    for number, chunk in enumerate(chunks):
        rows = chunk.get(split, [])
        places = [place for place, (index, _) in enumerate(rows) if index in kept]
        if places:
            file = shard(plan.folder, number, split)
            files.append(file if len(places) == len(rows) else without(file, places))
    return files


def _marks(
    source: Source, kept: set[int], chunks: list[Rows], splits: list[str]
) -> tuple[str, dict[str, list[int]]]:
    """Return the fingerprint of what was written, and the checksum of every row."""
    marks = {split: Fingerprint() for split in splits}
    sums: dict[str, list[int]] = {split: [] for split in splits}
    for chunk in chunks:
        for split, rows in chunk.items():
            for index, signal in rows:
                if index in kept:
                    row, digest = row_of(source, index, split), bytes.fromhex(signal)
                    marks[split].add(row, digest)
                    sums[split].append(row_checksum(row, digest))
    return combined_fingerprint({split: marks[split].hexdigest() for split in splits}), sums


def _content(source: Source, rows: dict[str, int], more: dict[str, Any]) -> dict[str, Any]:
    z_scored = source.standardized or more["normalization"] != "none"
    return {
        "version": VERSION,
        "format": source.format,
        "simulated": source.simulated,
        "z_scored": z_scored,
        "unit": Z_SCORE if z_scored else source.unit,
        "sampling_rate": source.sampling_rate,
        "channels": source.channels,
        "phonemes": list(PHONEMES) if any(info.phonemes for info in source.trials) else None,
        "rows": rows,
    }
