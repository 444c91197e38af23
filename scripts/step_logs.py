"""What the log of a step says, in few lines: checks that failed, times, how it ended."""

import re
from pathlib import Path

COLUMNS = {"ms": "ms", "host ms": "host", "graph ms": "graph", "longest ms": "longest"}
"""Of the benchmark's table, beside the case and the method."""


def failing(log: str) -> list[str]:
    """Names of the checks of pytest that failed, with the reason where the log came so far."""
    reasons = dict(re.findall(r"^(?:FAILED|ERROR) (\S+)(.*)$", log, re.MULTILINE))
    # As they go by: "[gw0] [ 12%] FAILED name", or "name FAILED" where one process runs them.
    passing = re.findall(r"\] (?:FAILED|ERROR) (\S+)", log)
    passing += re.findall(r"^(\S+::\S+) (?:FAILED|ERROR)\b", log, re.MULTILINE)
    return [f"{name}{reasons.get(name, '')}" for name in dict.fromkeys([*passing, *reasons])]


def times(log: str) -> list[str]:
    """Rows of the benchmark's tables without what is empty, and its verdicts."""
    names: list[str] = []
    found = []
    for line in log.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| case |"):
            names = cells
        elif line.startswith("| ") and len(cells) == len(names):
            row = dict(zip(names, cells, strict=True))
            figures = [f"{short} {row[name]}" for name, short in COLUMNS.items() if row.get(name)]
            held = f" ({row['held up by']})" if row.get("held up by") else ""
            found.append(f"{row['case']}: {row['method']}: {', '.join(figures)}{held}")
        elif line.startswith(("- ", "WRONG", "left out")):
            found.append(line)
    return found


def ends(out: Path, step: str, lines: int = 12) -> list[str]:
    """The last lines of each log of a step, cut to the width of a page."""
    found = []
    for path in sorted(out.glob(f"{step}*.log")):
        last = path.read_text("utf-8", "replace").splitlines()[-lines:]
        found += [f"{path.name}:", *(f"    {line[:160]}" for line in last)]
    return found


def told(out: Path, step: str, passed: bool) -> list[str]:
    """What is worth saying of a step."""
    log = out / f"{step}.log"
    text = log.read_text("utf-8", "replace") if log.exists() else ""
    said = times(text) if step == "bench" else []
    if step == "correct":
        said += [f"FAILED {name[:300]}" for name in failing(text)]
    return said if passed else [*said, *ends(out, step)]
