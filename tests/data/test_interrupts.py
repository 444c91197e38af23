"""Ctrl-C while processes are started: they never see it, and this one does not lose it."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from b2t.data.interrupts import left_to_this_process

pytestmark = pytest.mark.usefixtures("answers_interrupts")

_CHILD = """\
import os, signal
os.kill(os.getpid(), signal.SIGINT)
print("alive")
"""


@pytest.fixture(params=[0, 1])
def threads_beside(request):
    """So many threads that do not block SIGINT."""
    done = threading.Event()
    threads = [threading.Thread(target=done.wait) for _ in range(request.param)]
    for thread in threads:
        thread.start()
    yield
    done.set()
    for thread in threads:
        thread.join()


@pytest.mark.usefixtures("threads_beside")
def test_it_is_held_back_and_then_answered():
    reached = False
    with pytest.raises(KeyboardInterrupt), left_to_this_process():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)  # until the other thread was handed it
        reached = True
    assert reached
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_processes_started_meanwhile_never_see_it():
    def started():
        return subprocess.run(
            [sys.executable, "-c", _CHILD], check=False, capture_output=True, text=True
        )

    with left_to_this_process():
        assert started().stdout == "alive\n"
    assert started().returncode != 0
