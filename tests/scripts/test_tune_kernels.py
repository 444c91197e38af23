"""Tile shapes tried where there is no GPU: interpreted, and compiled for one."""

import json
import os
import subprocess
import sys

import pytest
import torch

# Half as many programs as rows need: what a forgotten entry of AXES would do.
BROKEN = """
import sys
sys.argv[1:] = {arguments}
sys.path.insert(0, "scripts")
import tile_launches
tile_launches.AXES["settle_kernel"] = {{}}
import tune_kernels
sys.exit(tune_kernels.main())
"""


def run(repository, command, interpreted):
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    variables.pop("TRITON_INTERPRET", None)
    if interpreted:
        variables["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, *command], cwd=repository, env=variables, capture_output=True, text=True
    )


def test_shapes_are_run_and_wrong_answers_found(repository, tmp_path):
    written = tmp_path / "found.json"
    arguments = ["--dry", "--most", "3", "--only", "settle (exact", "--out", str(written)]
    done = run(repository, ["scripts/tune_kernels.py", *arguments], True)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(written.read_text())
    assert len({json.dumps(trial["options"]) for trial in found["trials"]}) == 3
    assert not any(trial["fault"] for trial in found["trials"])
    run(repository, ["-c", BROKEN.format(arguments=arguments)], True)
    (found,) = json.loads(written.read_text())
    assert not found["trials"][0]["fault"]
    assert any(trial["fault"] for trial in found["trials"][1:])


@pytest.mark.skipif(torch.cuda.is_available(), reason="times instead of compiling")
def test_other_processes_compile(repository, tmp_path):
    written = tmp_path / "found.json"
    arguments = ["--dry", "--most", "2", "--workers", "1", "--only", "rows", "--out", str(written)]
    arguments += ["--size", "1500x1024x64"]
    done = run(repository, ["scripts/tune_kernels.py", *arguments], False)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(written.read_text())
    assert [trial["fault"] for trial in found["trials"]] == ["", ""]
    assert all(trial["shared"] > 0 for trial in found["trials"])
