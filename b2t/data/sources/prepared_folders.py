"""Which files are what `b2t prepare` wrote: it may write below the folder that it reads."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

UNFINISHED = ".partial"
"""What the name of an unfinished dataset ends with."""
KEY = "key.json"
"""In an unfinished dataset: what it was begun from."""
_FINISHED = "dataset_dict.json"


def not_prepared(root: Path, files: Iterable[Path]) -> list[Path]:
    """Return the ``files`` that lie in no dataset, whole or unfinished, below ``root``."""

    @cache
    def ours(folder: Path) -> bool:
        if folder == root or root not in folder.parents:
            return False
        begun = folder.name.endswith(UNFINISHED) and (folder / KEY).exists()
        return begun or (folder / _FINISHED).exists() or ours(folder.parent)

    return [file for file in files if not ours(file.parent)]
