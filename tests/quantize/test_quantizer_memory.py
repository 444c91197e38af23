"""Memory of the quantizer at N = 65,536 frames, in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

FRAMES, CODES, DIM = 65_536, 2048, 256


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_forward_backward_and_update_never_hold_frames_by_codes(repository):
    # N × K float32 would be 537 MB; N × D, of which the output and a gradient are two, 67 MB.
    done = subprocess.run(
        [
            sys.executable, str(repository / "scripts" / "bench_quantizer.py"), "--memory",
            "--memory-frames", str(FRAMES), "--codes", str(CODES), "--dim", str(DIM),
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=repository,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)},
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert 3 * FRAMES * DIM * 4 < found["memory_extra"] < 250e6
