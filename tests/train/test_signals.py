"""Signals in a process of their own: the first asks to stop, the second leaves."""

import os
import signal
import subprocess
import sys
import time

import pytest

from b2t.train.signals import EXIT_KILLED, EXIT_STOPPED, StopSignals

WAITER = """
import sys, time
from b2t.train.signals import StopSignals
stop = StopSignals(0.5)
print("ready", flush=True)
while not stop.requested:
    time.sleep(0.005)
print("requested", flush=True)
time.sleep(0.2)
print("still here", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_the_first_asks_and_the_second_leaves_at_once(first, second, repository):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITER],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=repository,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(first)
    assert process.stdout.readline() == "requested\n", "it goes on until it has saved"
    for number in (first, second):
        process.send_signal(number)
    assert process.stdout.readline() == "still here\n", "a launcher repeats a signal at once"
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(second)
    _, said = process.communicate(timeout=20)
    assert process.returncode == EXIT_KILLED == 76
    assert EXIT_STOPPED == 75
    assert "Traceback" not in said


def test_handlers_from_before_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    stop = StopSignals()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.requested
    stop.close()
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == before
