"""Files that survive a crash: text replaced whole, and JSON lines that a kill cannot spoil."""

import errno
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from b2t.errors import UserError


class JsonLines(NamedTuple):
    """Records of a file in order, and the numbers (from 1) of lines that could not be read."""

    records: list[dict[str, Any]]
    malformed: list[int]


class JsonlSink:
    """Appends records to a JSONL file; every line is on its way to the disk when `write` returns.

    A line that a killed process left half written stays as it is and the next record starts a new
    one. Numbers that JSON cannot hold are written as null and named under `non_finite`.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._torn = _ends_within_a_line(self.path)
        # Unbuffered: what a full disk did not take must not wait to be written later, in part.
        self._file = self.path.open("ab", buffering=0)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record.

        Raises:
            OSError: it could not be written, and nothing of it is left in the file.
        """
        line = f"{encode(record)}\n".encode()
        if self._torn:
            line = b"\n" + line
        size = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError:
            self._cut(size)
            raise
        self._torn = False

    def close(self) -> None:
        """Close the file; further writes are errors."""
        self._file.close()

    def _cut(self, size: int) -> None:
        """Take back what was written of a line."""
        try:
            self._file.truncate(size)
        except OSError:
            self._torn = True


def existing_place(folder: Path) -> Path:
    """Return the folder itself, or the nearest one above it that exists."""
    place = folder
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    return place


def require_writable(folder: Path, option: str = "run.dir") -> None:
    """Refuse a folder that cannot be made or written; nothing is left behind.

    Args:
        folder: the folder, which need not exist yet.
        option: what the user named it with.

    Raises:
        UserError: a read-only disk, missing rights, a file in its place.
    """
    place = existing_place(folder)
    try:
        tempfile.TemporaryDirectory(prefix=".b2t-", dir=place).cleanup()
    except OSError as error:
        reason = error.strerror or str(error)
        if not place.is_dir():
            reason = f"{place} is not a folder"
        raise UserError(
            f"{option}={folder}: cannot be written ({reason}); choose another {option}"
        ) from None


def require_file(path: Path, option: str) -> None:
    """Refuse a file that could not be written at the end of a command.

    Raises:
        UserError: it is a folder, or its folder cannot be written.
    """
    if path.is_dir():
        raise UserError(f"{option}={path}: it is a folder; name a file")
    require_writable(path.parent, option)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is either the old one or the whole new one, even after a crash."""
    temporary = path.parent / f".{path.name}.{os.urandom(6).hex()}"
    # Not mkstemp: the umask says who may read what was said, and how it was heard.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def finite(value: Any) -> Any:
    """Return JSON values with None in place of numbers that JSON does not know."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def encode(record: Mapping[str, Any]) -> str:
    """Return one strict JSON object without line breaks."""
    clean = dict(record)
    lost = [k for k, v in clean.items() if isinstance(v, float) and not math.isfinite(v)]
    if lost:
        clean.update(dict.fromkeys(lost))
        clean["non_finite"] = lost
    return json.dumps(clean, ensure_ascii=False, allow_nan=False)


def read_jsonl(path: Path) -> JsonLines:
    """Read a JSONL file that may be missing, empty, torn or still being written."""
    records, malformed = [], []
    if not Path(path).is_file():
        return JsonLines([], [])
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                records.append(record)
            else:
                malformed.append(number)
    return JsonLines(records, malformed)


def rewind(path: Path, step: int) -> int:
    """Drop records after ``step``, which a resumed run will write again; return how many."""
    found = read_jsonl(path)
    kept = [record for record in found.records if _step(record) <= step]
    if len(kept) < len(found.records) or found.malformed:
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in kept]
        write_atomically(Path(path), "".join(lines))
    return len(found.records) - len(kept)


def _step(record: Mapping[str, Any]) -> float:
    step = record.get("step")
    return step if isinstance(step, (int, float)) else -math.inf


def _ends_within_a_line(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"
