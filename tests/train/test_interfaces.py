"""The interface to other hosts: as the routing table says, in a form that DeepSpeed reads."""

import os
import shutil
import socket
import subprocess

import pytest

from b2t.cli import main
from b2t.errors import UserError
from b2t.train import interfaces as network
from b2t.train.ranks import _own_gpu

ELSEWHERE = "198.51.100.7"  # TEST-NET-2 of RFC 5737: nobody is there


def routed(address):
    """What iproute2 says of the way to an address."""
    if shutil.which("ip") is None:
        pytest.skip("no iproute2")
    done = subprocess.run(["ip", "-o", "route", "get", address], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no route to {address}")
    words = done.stdout.split()
    return words[words.index("dev") + 1], words[words.index("src") + 1]


def test_the_interface_is_the_one_of_the_route():
    name, address = routed(ELSEWHERE)
    assert network.interface_to(ELSEWHERE) == name
    assert network.local_address(ELSEWHERE) == address
    # The first host reaches itself by loopback, and is reached through what has its address.
    assert network.interface_to(address) == name


def test_loopback_is_no_interface_to_others():
    assert network.interface_to("127.0.0.1") is None


@pytest.fixture
def hosts(monkeypatch):
    """This host (10.0.0.1 and 10.9.0.1) and others, on two networks."""
    addresses = {"here": "10.0.0.1", "near": "10.0.0.2", "far": "10.9.0.2"}
    known = {
        "lo": (True, ["127.0.0.1"]),
        "ib0": (True, ["10.0.0.1"]),
        "eth0": (True, ["10.9.0.1"]),
    }
    monkeypatch.setattr(socket, "gethostbyname", addresses.__getitem__)
    monkeypatch.setattr(network, "interfaces", lambda: known)
    sources = {"here": "10.0.0.1", "near": "10.0.0.1", "far": "10.9.0.1"}
    monkeypatch.setattr(network, "local_address", sources.__getitem__)
    return known


def test_deepspeed_exports_what_was_written(hosts, tmp_path):
    from deepspeed.launcher.multinode_runner import PDSHRunner

    hostfile, target = tmp_path / "hostfile", tmp_path / ".deepspeed_env"
    hostfile.write_text("# two hosts\nhere slots=2\nnear slots=2\n")
    target.write_text("PDSH_SSH_ARGS=-q\nGLOO_SOCKET_IFNAME=old\n\n")
    hosts["ib01"] = (True, [])
    network.write_env(hostfile, target)
    # As runner.main reads it: a line without `=` would be an error.
    pairs = [line.split("=", maxsplit=1) for line in target.open()]
    runner = PDSHRunner.__new__(PDSHRunner)
    runner.exports = {}
    for key, value in pairs:
        PDSHRunner.add_export(runner, key, value)
    assert runner.exports == {
        "PDSH_SSH_ARGS": "-q",
        "GLOO_SOCKET_IFNAME": "ib0",
        "NCCL_SOCKET_IFNAME": "=ib0",  # ib0 alone would mean ib01 too
    }


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("here slots=2\n", "no host but this one"),
        ("here slots=2\nnear slots=1\nfar slots=1\n", "near by ib0; far by eth0"),
        ("here slots=2\nhere slots=2\n", "each host once"),
        ("here\nnear slots=1\n", "slots=2"),
    ],
)
def test_hostfiles_that_name_no_interface(hosts, tmp_path, content, named):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text(content)
    with pytest.raises(UserError, match=named):
        network.write_env(hostfile, tmp_path / "env")
    assert not (tmp_path / "env").exists()


def test_no_hostfile_is_one_message(tmp_path, capsys):
    assert main(["doctor", "--write-env", "--hostfile", str(tmp_path / "none")]) == 2
    assert "give --hostfile FILE" in capsys.readouterr().err


def test_gloo_listens_where_the_first_host_is_reached(monkeypatch):
    name, address = routed(ELSEWHERE)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert network.choose_for_gloo() is None and "GLOO_SOCKET_IFNAME" not in os.environ
    monkeypatch.setenv("MASTER_ADDR", address)
    assert network.choose_for_gloo() == os.environ["GLOO_SOCKET_IFNAME"] == name
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "chosen")
    assert network.choose_for_gloo() is None and os.environ["GLOO_SOCKET_IFNAME"] == "chosen"


def test_more_ranks_than_gpus_are_one_message(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert _own_gpu(1, 2) == 1
    with pytest.raises(UserError, match=r"rank 3 is number 1 of .* sees 1 GPU: .*gpus-per-node"):
        _own_gpu(1, 1)
