"""Two processes that compile one operator: real builds, by a compiler that takes its time."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BUILD = """
import sys
from pathlib import Path
from torch.utils.cpp_extension import load
from b2t.train.build_lock import lock_builds

cache = Path(sys.argv[1])
lock_builds(cache)
(cache / "operator").mkdir(exist_ok=True)
print("begins", flush=True)
load("operator", [str(cache / "operator.cpp")], build_directory=str(cache / "operator"),
     is_python_module=False, with_cuda=False)
print("built", flush=True)
"""


@pytest.fixture
def cache(tmp_path):
    """An operator and a compiler that notes that it runs, and waits for the file `go`."""
    (tmp_path / "operator.cpp").write_text('extern "C" int answer() { return 42; }\n')
    compiler = tmp_path / "slow-c++"
    compiler.write_text(
        "#!/bin/bash\n"
        f'if [[ " $* " == *" -c "* ]]; then echo $$ >> {tmp_path}/runs; '
        f"while [ ! -e {tmp_path}/go ]; do sleep 0.05; done; fi\n"
        'exec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    return tmp_path


def start(cache, repository):
    """A process that builds, in a group of its own."""
    paths = [str(repository), str(repository / "kernels")]
    variables = {"CXX": str(cache / "slow-c++"), "PYTHONPATH": os.pathsep.join(paths)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(cache)],
        env={**os.environ, **variables, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def compiled(cache):
    runs = cache / "runs"
    return len(runs.read_text().split()) if runs.exists() else 0


def test_a_build_that_takes_long_is_waited_for(cache, repository):
    first = start(cache, repository)
    wait_for(lambda: compiled(cache) == 1)
    for file in (cache / "operator").glob("lock*"):
        os.utime(file, (1, 1))  # as old as can be
    second = start(cache, repository)
    assert second.stdout.readline() == "begins\n"
    time.sleep(1)  # it has come to the lock
    assert second.poll() is None, second.communicate()
    (cache / "go").touch()
    for process, built in ((first, "begins\nbuilt\n"), (second, "built\n")):
        out, error = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, built), error
    assert compiled(cache) == 1, "the second took what the first had built"


def test_the_lock_of_a_killed_build_is_nobodys(cache, repository):
    first = start(cache, repository)
    wait_for(lambda: compiled(cache) == 1)
    second = start(cache, repository)
    assert second.stdout.readline() == "begins\n"
    time.sleep(1)  # it has come to the lock
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    _, error = second.communicate(timeout=120)
    assert second.returncode == 1 and "ended before it was done" in error
    (cache / "go").touch()
    third = start(cache, repository)
    out, error = third.communicate(timeout=120)
    assert (third.returncode, out) == (0, "begins\nbuilt\n"), error
    assert compiled(cache) == 2
