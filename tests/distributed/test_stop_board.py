"""A request to stop that reaches one rank of two while each works on its own."""

import json
import subprocess
import sys

import pytest

from tests.distributed.conftest import environment
from tests.distributed.ports import free_port

pytestmark = pytest.mark.distributed

WORKER = """
import json, signal, sys, time
from b2t.train.ranks import join, leave
from b2t.train.signals import StopSignals
from b2t.train.stopping import Interrupted, StopRequests

ranks = join(timeout_s=120)
stop = StopSignals()
stops = StopRequests(ranks, stop)
ranks.barrier()
began, taken = time.monotonic(), 0
for number in stops.until_heard(range(10**9)):
    taken += 1
    time.sleep(0.02)
    if ranks.rank == 1 and number == 20:
        signal.raise_signal(signal.SIGTERM)
    assert time.monotonic() - began < 60, "not heard"
try:
    stops.agree()
    ended = "together"
except Interrupted:
    ended = "interrupted"
print(json.dumps({"taken": taken, "ended": ended, "own": stop.requested}), flush=True)
leave()
"""


def test_it_is_heard_by_the_other(repository):
    port = free_port()
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER],
            cwd=repository,
            env={**environment(), **places, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [json.loads(worker.communicate(timeout=300)[0].splitlines()[-1]) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert [each["ended"] for each in said] == ["interrupted", "interrupted"]
    assert [each["own"] for each in said] == [False, True]
    assert said[1]["taken"] == 21
