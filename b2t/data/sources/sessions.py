"""What a file's session and subject are called."""

import re
from pathlib import Path


def session_name(file: Path, root: Path, member: str | None = None) -> str:
    """Name a session by its file, below ``root``, without extension.

    Args:
        file: the recording.
        root: what the user named: the file itself, or a folder above it.
        member: which part of the file, where it holds several sessions.
    """
    name = str(file.relative_to(root)) if root.is_dir() else file.name
    name = re.sub(r"(\.[A-Za-z][A-Za-z0-9]{1,4})?(\.gz)?$", "", name)
    if member is not None:
        name = f"{name}_{re.sub(r'[.][A-Za-z0-9]+$', '', member)}"
    return re.sub(r"[/\\]+", "_", name)


def subject_name(file: Path, fallback: str) -> str:
    """Return the subject that a path names (``sub-01``, ``subject04``), else ``fallback``."""
    named = re.search(r"(?:^|[/_\\-])(sub(?:ject)?-?[A-Za-z0-9]+)", str(file))
    return named.group(1) if named else fallback
