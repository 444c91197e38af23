"""Written chunks into a dataset with its record, fingerprint and checksums."""

import json
import shutil
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    concatenate_datasets,
    disable_progress_bars,
    load_from_disk,
)
from tqdm import tqdm

from b2t.data import checksums
from b2t.data.checksums import row_checksum
from b2t.data.phonemes import PHONEMES
from b2t.data.prepare.work import Plan, row_of, shard
from b2t.data.sources import Source
from b2t.data.sources.base import SPLITS
from b2t.data.trials import Fingerprint, TrialReader, signal_of
from b2t.errors import UserError
from b2t.signal_spec import Z_SCORE

RECORD = "b2t.json"
VERSION = 1


Chunks = list[dict[str, list[int]]]
"""Trials of each chunk by split, in the order of the rows."""


def assemble(
    source: Source, plan: Plan, kept: list[int], chunks: Chunks, more: dict[str, Any]
) -> dict[str, Any]:
    """Write ``plan.folder / "dataset"`` from the chunks beside it.

    Args:
        source: whose trials they are.
        plan: where and how they were written.
        kept: trials that the dataset holds, ascending.
        chunks: which rows of the chunks are which trials.
        more: entries of `b2t.json` beside those that the data themselves tell.

    Returns:
        The content of ``b2t.json``.

    Raises:
        UserError: no trial is left for training.
    """
    found = {split: _rows(plan, set(kept), chunks, split) for split in SPLITS}
    datasets = {split: rows for split, rows in found.items() if rows is not None}
    if "train" not in datasets:
        raise UserError("no trial is left for training: every one is bad")
    folder = plan.folder / "dataset"
    shutil.rmtree(folder, ignore_errors=True)
    disable_progress_bars()
    DatasetDict(datasets).save_to_disk(str(folder))
    fingerprint, sums = _marks(source, plan, kept, folder, list(datasets))
    rows = {split: len(dataset) for split, dataset in datasets.items()}
    content = {**_content(source, rows, more), "fingerprint": fingerprint, **more}
    content["arrow"] = {split: arrow_state(folder / split) for split in datasets}
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


def _rows(plan: Plan, kept: set[int], chunks: Chunks, split: str) -> Dataset | None:
    """Return the rows of one split in the order of the trials; None where there are none."""
    parts = []
    for number, written in enumerate(chunks):
        rows = [row for row, index in enumerate(written.get(split, [])) if index in kept]
        if not rows:
            continue
        part = Dataset.from_file(str(shard(plan.folder, number, split)))
        parts.append(part if len(rows) == len(part) else part.select(rows))
    return concatenate_datasets(parts) if parts else None


def _marks(
    source: Source, plan: Plan, kept: list[int], folder: Path, splits: list[str]
) -> tuple[str, dict[str, list[int]]]:
    """Return the fingerprint of what was written, and the checksum of every row.

    Read back from the disk, so that they do not depend on who wrote which chunk.
    """
    marks = {split: Fingerprint() for split in splits}
    sums: dict[str, list[int]] = {split: [] for split in splits}
    readers = {split: TrialReader(load_from_disk(str(folder / split))) for split in splits}
    places = dict.fromkeys(splits, 0)
    for index in tqdm(kept, desc="checksums", unit="trial", disable=None):
        split = plan.splits[index]
        signal = signal_of(readers[split].row(places[split])[1])
        places[split] += 1
        row = row_of(source, index, split)
        marks[split].add(row, signal)
        sums[split].append(row_checksum(row, signal))
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
