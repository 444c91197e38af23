"""`b2t.json`: what `b2t prepare` wrote beside the splits, where they are still those."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from b2t.data import checksums
from b2t.data.prepare import RECORD, arrow_state
from b2t.errors import UserError
from b2t.log import logger


def read_record(path: Path) -> dict[str, Any]:
    """Return the content of `b2t.json` in the folder ``path``, empty where there is none.

    Raises:
        UserError: it is damaged.
    """
    try:
        content = json.loads(_record_text(path))
    except ValueError as error:
        raise UserError(
            f"{path / RECORD} is damaged ({error}): copy the folder again, or prepare "
            "the data again"
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path / RECORD} is damaged: it holds no JSON object; copy the folder again, or "
            "prepare the data again"
        )
    return content


def _record_text(path: Path) -> str:
    file = path / RECORD
    return file.read_bytes().decode("utf-8") if file.is_file() else "{}"


def trusted_record(path: Path, splits: dict[str, Dataset]) -> dict[str, Any]:
    """Return ``b2t.json`` where the splits beside it are those that `b2t prepare` checked.

    Raises:
        UserError: it is damaged, changed, or missing beside checksums that were written with it.
    """
    record = read_record(path)
    if not record:
        checksums.require_record(path, _record_text(path), expected=False)
        return {}
    states = {split: arrow_state(path / split) for split in splits}
    if states != record.get("arrow"):
        logger(__name__).info("%s was changed after `b2t prepare`: it is checked anew", path)
        return {}
    checksums.require_record(path, _record_text(path), "checksums" in record)
    return record
