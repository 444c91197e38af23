"""The Triton kernels on CPU: interpretation and compilation cannot share a process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

GROUPS = {
    "test_search_shapes": "kernel_checks.py",
    "test_search and not shapes": "kernel_checks.py",
    "test_exact or few_rows or long_inputs": "kernel_checks.py",
    "usage or residual or sums or prepared or gradients": "kernel_checks.py",
    "not test_search and not test_exact and not few_rows and not long_inputs and not usage"
    " and not residual and not sums and not prepared and not gradients": "kernel_checks.py",
    "draws": "draw_checks.py",
    "not draws": "draw_checks.py",
}


@pytest.mark.parametrize("group", GROUPS)
def test_kernels_interpreted(group, repository):
    checks = Path(__file__).with_name(GROUPS[group])
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(checks)]
    finished = subprocess.run(
        [*command, "-k", group],
        cwd=repository,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-2000:]
    assert " passed" in finished.stdout
