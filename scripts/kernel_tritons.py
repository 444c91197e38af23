"""Run the kernels' tests under every triton that a supported torch brings, and under the newest.

    python scripts/kernel_tritons.py                      # all: minutes each
    python scripts/kernel_tritons.py --triton 3.7.1       # one
    python scripts/kernel_tritons.py --write              # and update kernels/RESULTS.md
    python scripts/kernel_tritons.py --triton 3.7.1 --write    # and its row there alone

Each triton lies in a folder of its own under .envs/, with an older numpy where its interpreter
needs one, and goes before this environment's packages. So torch stays the one that is installed;
`pip install torch==2.9.1` in another environment tries the pair. The exit status is 1 when a test
fails or a configuration of the kernels spills.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "kernels" / "RESULTS.md"
BEGIN, END = "<!-- tritons: begin -->", "<!-- tritons: end -->"

# The torch releases that require each, from their metadata.
TRITONS = {
    "3.4.0": "2.8",
    "3.5.1": "2.9",
    "3.6.0": "2.10, 2.11",
    "3.7.0": "2.12",
    "3.7.1": "2.13",
    "3.8.0": "2.14",
    "3.9.0": "2.15",
}
# Interpreters up to 3.6 convert arrays of one element to integers, which numpy 2.4 refuses.
OLDER_NUMPY = "numpy<2.4"
NEEDS_OLDER_NUMPY = ("3.4", "3.5", "3.6")


@dataclass(frozen=True)
class Outcome:
    """What one triton gave."""

    triton: str
    numpy: str
    passed: int
    failed: int
    configurations: int
    spilling: int
    registers: int

    @property
    def fine(self) -> bool:
        """Whether nothing failed and nothing spilled."""
        return self.passed > 0 and not self.failed and not self.spilling


def packages(version: str) -> list[str]:
    """What goes into the folder of one triton."""
    older = version.startswith(NEEDS_OLDER_NUMPY)
    return [f"triton=={version}", *([OLDER_NUMPY] if older else [])]


def install(version: str, folder: Path) -> Path:
    """The folder that holds this triton; made beside its place and renamed when complete."""
    place = folder / f"triton-{version}"
    if place.is_dir():
        return place
    unfinished = folder / f"triton-{version}.part"
    shutil.rmtree(unfinished, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*command, "--target", str(unfinished), *packages(version)], check=True)
    return unfinished.rename(place)


def environment(place: Path) -> dict[str, str]:
    """Variables that put the packages of ``place`` before those installed."""
    paths = [place, ROOT, ROOT / "kernels"]
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return {**kept, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}


def versions(variables: dict[str, str]) -> dict[str, str]:
    """The triton and numpy that a process with these variables imports."""
    code = "import json, numpy, triton; print(json.dumps([triton.__version__, numpy.__version__]))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=variables, check=True, capture_output=True, text=True)
    return dict(zip(("triton", "numpy"), json.loads(done.stdout), strict=True))


def counted(summary: str, word: str) -> int:
    """The number before ``word`` in pytest's last line, 0 if it is not there."""
    found = re.search(rf"(\d+) {word}", summary)
    return int(found[1]) if found else 0


def run_tests(variables: dict[str, str]) -> tuple[int, int]:
    """How many of tests/kernels passed and failed; prints what pytest says."""
    # `compiled` does the same as the test that is left out, and reports it.
    left_out = "tests/kernels/test_kernel_resources.py::test_every_configuration"
    command = [sys.executable, "-m", "pytest", "tests/kernels", "-p", "no:cacheprovider"]
    command += ["--deselect", left_out]
    done = subprocess.run(
        [*command, "-o", "addopts=--import-mode=importlib --tb=short"],
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        text=True,
    )
    print(done.stdout, flush=True)
    summary = done.stdout.strip().rsplit("\n", 1)[-1]
    failed = counted(summary, "failed") + counted(summary, "error")
    if done.returncode and not failed:
        raise SystemExit(f"pytest ended with status {done.returncode}: {summary}")
    return counted(summary, "passed"), failed


def compiled(variables: dict[str, str], place: Path) -> list[dict]:
    """What every configuration takes when this triton compiles it."""
    written = place / "resources.json"
    written.unlink(missing_ok=True)
    command = [sys.executable, "scripts/kernel_resources.py", "--json", str(written)]
    done = subprocess.run(command, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL)
    if not written.exists():
        raise SystemExit(f"scripts/kernel_resources.py ended with status {done.returncode}")
    return json.loads(written.read_text())


def judge(version: str, folder: Path) -> Outcome:
    """Test one triton."""
    place = install(version, folder)
    variables = environment(place)
    seen = versions(variables)
    if seen["triton"] != version:
        raise SystemExit(f"{place}: found triton {seen['triton']}, expected {version}; delete it")
    passed, failed = run_tests(variables)
    reports = compiled(variables, place)
    spilling = sum(report["local_memory_instructions"] > 0 for report in reports)
    most = max(report["registers"] for report in reports)
    return Outcome(version, seen["numpy"], passed, failed, len(reports), spilling, most)


def written_rows(text: str) -> dict[str, str]:
    """Rows of the table in ``text``, by triton."""
    return {row[1]: row[0] for row in re.finditer(r"^\| (\d[\d.]*) \|.*$", text, re.MULTILINE)}


def table(outcomes: list[Outcome], earlier: dict[str, str] | None = None) -> str:
    """The outcomes as a Markdown table, with rows of other tritons from ``earlier``."""
    head = [
        f"Python {sys.version.split()[0]}, torch {metadata.version('torch')}.",
        "",
        "| triton | required by torch | numpy | tests/kernels | configurations | of them spill "
        "| most registers |",
        "|---" * 7 + "|",
    ]
    rows = dict(earlier or {})
    for outcome in outcomes:
        tests = f"{outcome.passed} passed, {outcome.failed} failed"
        rows[outcome.triton] = (
            f"| {outcome.triton} | {TRITONS.get(outcome.triton, 'none')} | {outcome.numpy} | "
            f"{tests} | {outcome.configurations} | {outcome.spilling} | {outcome.registers} |"
        )
    return "\n".join([*head, *(rows[triton] for triton in sorted(rows, key=_number))])


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--triton", nargs="+", default=list(TRITONS), help="versions")
    parser.add_argument("--envs", type=Path, default=ROOT / ".envs", help="where they are kept")
    parser.add_argument("--write", action="store_true", help="update kernels/RESULTS.md")
    options = parser.parse_args()
    options.envs.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for version in options.triton:
        print(f"triton {version}", flush=True)
        outcomes.append(judge(version, options.envs))
    print(table(outcomes))
    if options.write:
        from kernel_resources import write_between_markers

        held = RESULTS.read_text("utf-8").split(BEGIN)[1].split(END)[0]
        write_between_markers(RESULTS, table(outcomes, written_rows(held)), BEGIN, END)
    return 0 if all(outcome.fine for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
