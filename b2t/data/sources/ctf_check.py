"""A look at the markers of a CTF folder before MNE reads them: it seeks for ever what is missing.

Layout of `MarkerFile.mrk`: lines of headings, each above its value; for every marker its name, the
number of its samples, and a list of them below a line of titles.
"""

from collections.abc import Iterator
from pathlib import Path

from b2t.errors import UserError

_COUNT, _EACH = "NUMBER OF MARKERS:", ("NAME:", "NUMBER OF SAMPLES:", "LIST OF SAMPLES:")


def require_sound(folder: Path) -> None:
    """Refuse a `.ds` folder whose markers lack a heading.

    Raises:
        UserError: names the file and the heading.
    """
    path = folder / "MarkerFile.mrk"
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        missing = _missing(file)
    if missing:
        raise UserError(
            f"{path} cannot be read as CTF: it has no line {missing!r} where one is expected; the "
            "file is damaged or incomplete, copy the folder again (without the file markers are "
            "left out)"
        )


def _missing(lines: Iterator[str]) -> str | None:
    """Return the first heading that does not come; what else may be wrong, MNE refuses."""
    if not any(line.startswith(_COUNT) for line in lines):
        return _COUNT
    count = next(lines, "").strip()
    for _ in range(int(count) if count.lstrip("+-").isdecimal() else 0):
        for heading in _EACH:
            if not any(line.startswith(heading) for line in lines):
                return heading
    return None
