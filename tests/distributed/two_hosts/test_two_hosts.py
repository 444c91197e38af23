"""Training over a network that is cut and mended, started by DeepSpeed's own launcher."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.distributed.conftest import DEEPSPEED, TINY, changed
from tests.distributed.two_hosts.hosts import ADDRESSES, Hosts, inside, why_not

pytestmark = pytest.mark.distributed

TIMEOUT_S = 10
STEPS = 60


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    made = Hosts(tmp_path_factory.mktemp("hosts"))
    try:
        made.open()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def arguments(hosts, dataset):
    """The same command each time, but for the run folder."""
    config = changed(TINY, checkpoint={"every": 5, "keep": 100})
    config["phases"][0]["steps"] = STEPS
    config["stability"] = {"collective_timeout_s": TIMEOUT_S, "dry_batch": False}
    (hosts.folder / "config.yaml").write_text(yaml.safe_dump(config))
    (hosts.folder / "ds.json").write_text(json.dumps(DEEPSPEED))
    return [
        f"--deepspeed_config={hosts.folder}/ds.json",
        f"--config={hosts.folder}/config.yaml",
        f"data.path={dataset}",
    ]


@pytest.fixture(scope="module")
def cut(hosts, arguments, repository):
    """A run whose cable is pulled: both ranks, the launcher, and how long that took."""
    run = hosts.folder / "run"
    started = hosts.launch(repository, "cut", *arguments, f"run.dir={run}")
    started.wait_for_step(run / "metrics.jsonl", 8)
    hosts.cut()
    pulled = time.monotonic()
    started.statuses = [started.status(rank) for rank in (0, 1)]
    started.ranks_left_after = time.monotonic() - pulled
    started.launcher_status = started.wait()
    started.launcher_left_after = time.monotonic() - pulled
    return started


def test_both_ranks_leave_a_network_that_is_cut(cut):
    assert cut.statuses == [4, 4], cut.log(0)[-2000:] + cut.log(1)[-2000:]
    assert cut.ranks_left_after < TIMEOUT_S + 10
    for rank, host in enumerate(("host-a", "host-b")):
        last = cut.log(rank).strip().splitlines()[-1]
        assert f"rank {rank} on {host}: " in last and f"waited {TIMEOUT_S} s" in last
        assert "of phase joint" in last and "goes on from the newest checkpoint" in last


def test_the_launcher_comes_back_with_its_ssh(cut):
    """ServerAliveInterval bounds how long it waits for a host that answers nothing."""
    assert cut.launcher_status != 0
    assert cut.launcher_left_after < TIMEOUT_S + 15


def finished(started, rank=0):
    assert started.wait() == 0, started.log(rank)[-3000:]
    assert started.status(rank) == 0
    return started.log(rank)


def steps_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss/total" in line]


def test_the_host_that_is_left_goes_on_alone(cut, hosts, arguments, repository):
    run = hosts.folder / "alone"
    shutil.copytree(hosts.folder / "run", run)
    only = ADDRESSES[0]
    said = finished(hosts.launch(repository, "alone", *arguments, f"run.dir={run}", only=only))
    assert "2 ranks then, 1 now" in said
    assert steps_of(run) == list(range(1, STEPS + 1))


def test_the_same_command_goes_on_when_the_network_is_back(cut, hosts, arguments, repository):
    hosts.mend()
    run = hosts.folder / "run"
    said = finished(hosts.launch(repository, "again", *arguments, f"run.dir={run}"))
    assert "2 ranks then, 2 now" in said
    assert steps_of(run) == list(range(1, STEPS + 1))


def test_a_run_folder_that_hosts_do_not_share_is_refused(hosts, arguments, repository):
    hosts.mend()
    folder = hosts.private / "run"
    started = hosts.launch(repository, "unshared", *arguments, f"run.dir={folder}")
    assert [started.status(rank) for rank in (0, 1)] == [2, 2]
    assert started.wait() != 0
    said = started.log(0)
    assert f"run.dir={folder}: rank 0 on host-a" in said and "rank 1 on host-b did not see" in said


def test_sharded_weights_in_fp16_train_over_the_network(hosts, arguments, repository):
    """Under ZeRO-3 each weight's parts lie on both hosts; the loss scale falls on both alike."""
    hosts.mend()
    run, file = hosts.folder / "sharded", hosts.folder / "zero3_fp16.json"
    zero = {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0}
    half = {"enabled": True, "initial_scale_power": 24}
    file.write_text(json.dumps({**DEEPSPEED, "zero_optimization": zero, "fp16": half}))
    started = hosts.launch(
        repository,
        "sharded",
        f"--deepspeed_config={file}",
        *arguments[1:],
        f"run.dir={run}",
        "phases.0.steps=6",
        script=str(Path(__file__).with_name("fp16_train.py")),
    )
    said = finished(started)
    assert "2 ranks on cpu, ZeRO-3, fp16" in said
    assert started.status(1) == 0
    assert steps_of(run) == list(range(1, 7))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scales = [record["optim/loss_scale"] for record in records if "loss/total" in record]
    assert 0 < scales[-1] < 2**24, "the first steps overflowed"


def test_the_interface_between_the_hosts_is_found(hosts, tmp_path):
    code = (
        "import sys; from pathlib import Path; from b2t.train.interfaces import write_env;"
        "write_env(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    target = tmp_path / "env"
    command = [sys.executable, "-c", code, str(hosts.hostfile), str(target)]
    subprocess.run(inside(hosts.spaces[0], command), check=True)
    assert target.read_text() == "GLOO_SOCKET_IFNAME=eth0\nNCCL_SOCKET_IFNAME=eth0\n"
