"""What ranks send each other, counted in a process without a process group of its own."""

import subprocess
import sys
from pathlib import Path


def test_messages_between_ranks(repository):
    checks = Path(__file__).with_name("pending_checks.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(checks)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "8 passed" in done.stdout
