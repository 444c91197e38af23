"""Sentences or phonemes that any decoder wrote to a file, read to be scored."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from b2t.data.phonemes import BLANK
from b2t.errors import UserError

_TEXT_KEYS = ("prediction", "text", "sentence", "target")
_FORMATS = (
    ".txt (one sentence per line), .jsonl (objects with `row` and `prediction`, `text` or "
    "`target`), .csv (columns id and text) or .json (a list of sentences or of phoneme sequences)"
)


class Outputs(NamedTuple):
    """What a file holds.

    Attributes:
        rows: sentences, or phonemes joined by single spaces.
        ids: of the rows, None where only their order tells.
        phonemes: whether the units are phonemes.
    """

    rows: list[str]
    ids: list[str] | None
    phonemes: bool


def read_outputs(path: Path, key: str | None = None) -> Outputs:
    """Read a file of sentences or phonemes.

    Args:
        path: .txt, .jsonl, .csv or .json.
        key: of the text in JSON lines, or the column of a CSV; None takes the first that is there
            of prediction, text, sentence, target.

    Raises:
        UserError: it is missing or damaged, or of no known kind.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: it is a folder; name a file, {_FORMATS}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text in UTF-8 (byte {error.start})") from None
    readers = {".txt": _lines, ".jsonl": _json_lines, ".csv": _table, ".json": _json}
    if path.suffix not in readers:
        raise UserError(f"{path}: expected {_FORMATS}")
    found = readers[path.suffix](text, path, key)
    if not found.rows:
        raise UserError(f"{path}: holds no sentence")
    return found


def paired(reference: Outputs, said: Outputs, names: tuple[Path, Path]) -> list[str]:
    """Rows of ``said`` in the order of the reference: by id where both have them, else in order.

    Raises:
        UserError: other ids, another number of rows, or phonemes beside sentences.
    """
    if reference.phonemes != said.phonemes:
        raise UserError(f"{names[0]} and {names[1]}: one holds phonemes, the other sentences")
    if reference.ids is not None and said.ids is not None:
        rows = dict(zip(said.ids, said.rows, strict=True))
        for name, ids in zip(names, (reference.ids, said.ids), strict=True):
            twice = {row for row in ids if ids.count(row) > 1} if len({*ids}) < len(ids) else {}
            if twice:
                raise UserError(f"{name}: {min(twice)} stands there more than once")
        lacking = [row for row in reference.ids if row not in rows]
        if lacking or len(rows) != len(reference.ids):
            extra = sorted({*rows} - {*reference.ids})
            example = f"{lacking[0]} is missing" if lacking else f"{extra[0]} is not in {names[0]}"
            raise UserError(
                f"{names[1]}: {len(rows)} rows, {names[0]} has {len(reference.ids)} ({example}); "
                "both must be of the same trials"
            )
        return [rows[row] for row in reference.ids]
    if len(reference.rows) != len(said.rows):
        raise UserError(
            f"{names[1]}: {len(said.rows)} rows, {names[0]} has {len(reference.rows)}; expected "
            "one for each (an empty line where nothing was said)"
        )
    return said.rows


def _lines(text: str, path: Path, key: str | None) -> Outputs:
    return Outputs(text.splitlines(), None, False)


def _json_lines(text: str, path: Path, key: str | None) -> Outputs:
    rows, ids = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: no JSON ({error.msg})") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: expected an object with a text")
        name = _key(record, key, f"{path}, line {number}")
        if record[name] is None:
            raise UserError(f"{path}, line {number}: {name} is null")
        rows.append(str(record[name]))
        ids.append(record.get("row", record.get("id")))
    return Outputs(rows, None if None in ids else [str(row) for row in ids], False)


def _table(text: str, path: Path, key: str | None) -> Outputs:
    records = list(csv.DictReader(io.StringIO(text)))
    if not records:
        return Outputs([], None, False)
    name = _key(records[0], key, str(path))
    short = [number for number, record in enumerate(records, 2) if record[name] is None]
    if short:
        raise UserError(f"{path}, line {short[0]}: no column {name}")
    ids = [record["id"] for record in records] if "id" in records[0] else None
    return Outputs([record[name] for record in records], ids, False)


def _json(text: str, path: Path, key: str | None) -> Outputs:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: no JSON ({error.msg}, line {error.lineno})") from None
    if not isinstance(found, list) or not all(isinstance(row, (str, list)) for row in found):
        raise UserError(f"{path}: expected a list of sentences or of phoneme sequences")
    if all(isinstance(row, str) for row in found):
        return Outputs(found, None, False)
    return Outputs([" ".join(_phonemes(row)) for row in found], None, True)


def _phonemes(row: Sequence[Any]) -> list[str]:
    """Phonemes as words without white space; blanks, which pad label arrays, are left out."""
    return ["_".join(str(phoneme).split()) for phoneme in row if phoneme != BLANK]


def _key(record: dict[str, Any], key: str | None, where: str) -> str:
    for name in (key,) if key is not None else _TEXT_KEYS:
        if name in record:
            return name
    wanted = key if key is not None else ", ".join(_TEXT_KEYS)
    raise UserError(f"{where}: found {', '.join(map(str, record))}; expected {wanted} (--key)")
