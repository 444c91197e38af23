"""Python in a process of its own, where Triton compiles: interpretation cannot share one."""

import os
import subprocess
import sys


def run(repository, *command, **variables):
    """What it prints; fails with what it says of its failure."""
    own = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=repository,
        env=own | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
