"""Commands whose output nobody reads any more end as `cat` does: at once, without a word."""

import os
import signal
import subprocess
import sys

import pytest

from b2t.closed_pipe import EXIT_CLOSED_PIPE, until_closed

PRINT = "while True: print('a line')"
TABLE = """
from rich.console import Console
console = Console()
while True: console.print('a line')
"""
SHORT = "print('a line')"
ARGPARSE = """
import argparse
argparse.ArgumentParser(description='word ' * 100).parse_args(['--help'])
"""


def ended(*words: str) -> tuple[int, str]:
    """Run a command whose reader has gone before it writes; return its status and stderr."""
    # argparse drops what it cannot write at once.
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=buffered
    )
    process.stdout.close()
    _, said = process.communicate(timeout=120)
    return process.returncode, said


def python(body: str, status: int = 0) -> tuple[int, str]:
    indented = "".join(f"    {line}\n" for line in body.strip().splitlines())
    return ended(
        sys.executable,
        "-c",
        "import sys\nfrom b2t.closed_pipe import until_closed\n"
        f"def command():\n{indented}    return {status}\nsys.exit(until_closed(command))",
    )


@pytest.mark.parametrize(
    "body", [PRINT, TABLE, SHORT, ARGPARSE], ids=["print", "rich", "short", "help"]
)
def test_the_status_is_that_of_a_command_that_the_signal_ended(body):
    assert python(body) == (EXIT_CLOSED_PIPE, "")


def test_the_status_is_what_a_shell_says_of_cat(tmp_path):
    (tmp_path / "long").write_text("a line\n" * 100_000)
    script = f"cat {tmp_path / 'long'} | true; exit ${{PIPESTATUS[0]}}"
    assert subprocess.run(["bash", "-c", script]).returncode == EXIT_CLOSED_PIPE
    assert EXIT_CLOSED_PIPE == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "b2t.cli", "inspect", "{trials}", "--no-plot"],
        ["-m", "b2t.train", "--config", "demo", "--print-config"],
    ],
    ids=["inspect", "train"],
)
def test_commands_end_quietly(words, tiny_trials):
    filled = [word.format(trials=tiny_trials) for word in words]
    assert ended(sys.executable, *filled) == (EXIT_CLOSED_PIPE, "")


def test_a_command_that_is_read_keeps_its_status(capfd):
    assert until_closed(lambda: print("said") or 3) == 3
    assert capfd.readouterr().out == "said\n"
    with pytest.raises(SystemExit, match="5"):
        until_closed(lambda: sys.exit(5))


def test_a_broken_pipe_of_its_own_is_an_error():
    read, write = os.pipe()
    os.close(read)
    with pytest.raises(BrokenPipeError):
        until_closed(lambda: os.write(write, b"to a process that died"))
    os.close(write)
