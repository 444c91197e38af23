"""`manifest.json`: sizes and checksums of the files of a folder, written last."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

MANIFEST = "manifest.json"


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    """Describe files of ``folder``, replacing an earlier manifest."""
    found = {name: ((folder / name).stat().st_size, sha256(folder / name)) for name in names}
    write_entries(folder, found)


def write_entries(folder: Path, found: Mapping[str, tuple[int, str]]) -> None:
    """Write the manifest of files whose bytes and SHA-256 are known."""
    entries = {
        name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(found.items())
    }
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1), "utf-8")


def find_problem(folder: Path, required: Iterable[str]) -> str | None:
    """Compare a folder with its manifest; None means that every file is as it was written.

    Args:
        folder: that holds the files and their manifest.
        required: files that the manifest must describe; all that it describes are compared.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"{MANIFEST} is missing"
    try:
        entries = json.loads(manifest.read_text("utf-8"))
    except ValueError:
        return f"{MANIFEST} is not valid JSON"
    entries = entries if isinstance(entries, dict) else {}
    for name in dict.fromkeys([*required, *entries]):
        file, entry = folder / name, entries.get(name)
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= set(entry):
            return f"{MANIFEST} does not describe {name}"
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, expected {entry['bytes']}"
        if sha256(file) != entry["sha256"]:
            return f"{name} has another checksum than when it was written"
    return None


def sha256(path: Path) -> str:
    """Checksum of a file, as hexadecimal text."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
