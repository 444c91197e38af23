"""Texts on terminals and pipes that do not take all of Unicode, as in Latin-1 or ASCII."""

import codecs
import io
import sys
import unicodedata

HANDLER = "b2t-plain"

_PLAIN = {
    "→": "->", "←": "<-", "–": "-", "—": "-", "‑": "-", "‐": "-", "−": "-", "…": "...", "·": "*",
    "×": "x", "±": "+-", "≤": "<=", "≥": ">=", "≈": "~", "‖": "||", "µ": "u", "μ": "u",
    "σ": "sigma", "²": "^2", "’": "'", "‘": "'", "“": '"', "”": '"', "„": '"',
    "\u00a0": " ", "\u202f": " ",
    "█": "#", "▇": "#", "▆": "+", "▅": "+", "▄": "=", "▃": "-", "▂": "_", "▁": ".",
}  # fmt: skip
"""What stands for our own signs; letters of texts and names keep their number (`\\u0142`)."""


def plain(error: UnicodeError) -> tuple[str, int]:
    """Stand in for what an encoding does not have, as a handler of `codecs.register_error`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = ""
    for sign in error.object[error.start : error.end]:
        if sign in _PLAIN:
            found += _PLAIN[sign]
        elif unicodedata.category(sign)[0] in "LMNC":
            found += sign.encode("ascii", "backslashreplace").decode()
        else:
            found += "?"
    return found, error.end


def show_in_any_encoding() -> None:
    """Let standard output and errors of this process write what their encoding does not have.

    Python itself ends a program at the first such sign, after whatever work came before it. UTF-8
    has no place for one kind either: bytes of a file's name that were no UTF-8.
    """
    codecs.register_error(HANDLER, plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=HANDLER)
