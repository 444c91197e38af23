"""Two hosts on one machine: network namespaces joined by a cable, with an sshd in each.

Nothing leaves the machine: the two addresses are of the range for benchmarks (RFC 2544), and exist
inside of the namespaces alone.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

BIN = Path(sys.executable).parent
ADDRESSES = ("198.18.77.1", "198.18.77.2")
NEEDED = ("ip", "sshd", "ssh", "ssh-keygen", "pdsh", "unshare", "mount")

SSHD = """\
Port 22
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
StrictModes no
UsePAM no
PidFile none
PrintMotd no
"""

ENTER = """\
set -e
hostname {name}
mount -t tmpfs private {private}
mount -t tmpfs run /run
mkdir /run/sshd
exec {sshd} -D -e -f {folder}/sshd-{name}
"""


def why_not() -> str | None:
    """Say why two hosts cannot be made here, None where they can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    absent = [name for name in NEEDED if shutil.which(name, path=_search()) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: iproute2 openssh-server pdsh)"
    probe = f"b2t-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces cannot be made: {made.stderr.strip()}"
    entered = ["ip", "netns", "exec", probe, "unshare", "--uts", "--mount", "true"]
    tried = subprocess.run(entered, capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return f"no namespace can be entered: {tried.stderr.strip()}" if tried.returncode else None


def _search() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


@dataclass
class Hosts:
    """The two hosts, named host-a and host-b; ranks are started from the first.

    Attributes:
        folder: keys, the hostfile, and what ranks say. Both hosts see it.
        private: a folder of the same name that each host has for itself.
    """

    folder: Path
    spaces: tuple[str, str] = field(init=False)
    daemons: list[subprocess.Popen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.spaces = (f"b2t-{os.getpid()}-a", f"b2t-{os.getpid()}-b")
        self.private = self.folder / "private"
        self.hostfile = self.folder / "hosts"

    def open(self) -> None:
        """Make namespaces, cable, addresses, keys and daemons."""
        self.private.mkdir()
        for space in self.spaces:
            _do("ip", "netns", "add", space)
        first, second = self.spaces
        cable = ["link", "add", "eth0", "netns", first, "type", "veth"]
        _do("ip", *cable, "peer", "name", "eth0", "netns", second)
        for key in ("host_key", "user_key"):
            _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key))
        self.hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
        for space, address in zip(self.spaces, ADDRESSES, strict=True):
            _do("ip", "-n", space, "address", "add", f"{address}/30", "dev", "eth0")
            for link in ("lo", "eth0"):
                _do("ip", "-n", space, "link", "set", link, "up")
            self._start_sshd(space, address)
        for address in ADDRESSES:
            self._wait_for(address)

    def close(self) -> None:
        """End everything that runs in the namespaces, and the namespaces."""
        for space in self.spaces:
            listed = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True)
            for pid in listed.stdout.split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)
        for daemon in self.daemons:
            daemon.wait()

    def _start_sshd(self, space: str, address: str) -> None:
        name = f"host-{space[-1]}"
        (self.folder / f"sshd-{name}").write_text(SSHD.format(address=address, folder=self.folder))
        sshd = shutil.which("sshd", path=_search())
        script = ENTER.format(name=name, private=self.private, sshd=sshd, folder=self.folder)
        with (self.folder / f"sshd-{name}.log").open("w") as log:
            command = ["unshare", "--uts", "--mount", "sh", "-c", script]
            daemon = subprocess.Popen(inside(space, command), stdout=log, stderr=log)
        self.daemons.append(daemon)

    def _wait_for(self, address: str) -> None:
        until = time.monotonic() + 10
        while True:
            ssh = ["ssh", *self.ssh_options().split(), address, "true"]
            done = subprocess.run(inside(self.spaces[0], ssh), capture_output=True, text=True)
            if done.returncode == 0:
                return
            assert time.monotonic() < until, done.stderr
            time.sleep(0.1)

    def ssh_options(self) -> str:
        """Our key and no other, and giving up on a host that does not answer for 4 s."""
        return (
            f"-i {self.folder}/user_key -o IdentitiesOnly=yes -o BatchMode=yes -o LogLevel=ERROR "
            "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o ConnectTimeout=5 "
            "-o ServerAliveInterval=2 -o ServerAliveCountMax=2"
        )

    def launch(
        self,
        repository: Path,
        name: str,
        *arguments: str,
        only: str = "",
        script: str = "train_ds.py",
    ) -> "Launched":
        """Start ranks with DeepSpeed's launcher on the first host.

        Args:
            repository: the checkout.
            name: of this start; what each rank says and its status are kept below it.
            arguments: of `train_ds.py`.
            only: the launcher's `--include`.
            script: what each rank runs.
        """
        said = self.folder / f"said-{name}"
        said.mkdir()
        port = 29500 + len(list(self.folder.glob("said-*")))  # in namespaces: all are free
        start = said / "start"
        start.write_text(
            f'#!/bin/sh\n{sys.executable} -u {script} "$@" >{said}/$RANK.log 2>&1\n'
            f"echo $? >{said}/$RANK.status\nexit $(cat {said}/$RANK.status)\n"
        )
        start.chmod(0o755)
        command = [str(BIN / "deepspeed"), f"--hostfile={self.hostfile}", "--no_ssh_check"]
        command += [f"--master_addr={ADDRESSES[0]}", f"--master_port={port}", "--no_python"]
        command += [f"--include={only}"] if only else []
        with (said / "launcher.log").open("w") as log:
            process = subprocess.Popen(
                inside(self.spaces[0], [*command, str(start), *arguments]),
                cwd=repository,
                env=self._environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Launched(process, said)

    def _environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("NCCL", "GLOO"))}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            kept.pop(name, None)
        # The launcher exports these over ssh, and hands on its own environment on one host alone.
        ranks = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "B2T_THREADS": "1"}
        settings = self.folder / "deepspeed_env"
        settings.write_text("".join(f"{name}={value}\n" for name, value in ranks.items()))
        return {
            **kept,
            **ranks,
            "PATH": f"{BIN}:{_search()}",
            "DS_ENV_FILE": str(settings),
            "PDSH_SSH_ARGS_APPEND": self.ssh_options(),
        }

    def cut(self) -> None:
        """Pull the cable out."""
        _do("ip", "-n", self.spaces[1], "link", "set", "eth0", "down")

    def mend(self) -> None:
        """Put it back."""
        _do("ip", "-n", self.spaces[1], "link", "set", "eth0", "up")


@dataclass
class Launched:
    """Ranks on the two hosts and their launcher."""

    process: subprocess.Popen
    said: Path

    def wait(self, seconds: float = 240.0) -> int:
        """Return the launcher's status."""
        return self.process.wait(seconds)

    def log(self, rank: int) -> str:
        """What a rank has said."""
        file = self.said / f"{rank}.log"
        return file.read_text() if file.exists() else ""

    def status(self, rank: int, seconds: float = 240.0) -> int:
        """Return a rank's status once it has one."""
        file, until = self.said / f"{rank}.status", time.monotonic() + seconds
        while not (file.exists() and file.read_text().strip()):
            assert time.monotonic() < until, f"rank {rank} does not end:\n{self.log(rank)[-3000:]}"
            time.sleep(0.05)
        return int(file.read_text())

    def wait_for_step(self, metrics: Path, step: int, seconds: float = 240.0) -> None:
        """Return when a step is in the metrics file."""
        until = time.monotonic() + seconds
        while True:
            lines = metrics.read_text().splitlines() if metrics.is_file() else []
            if any(json.loads(line)["step"] >= step for line in lines if line.endswith("}")):
                return
            launcher = (self.said / "launcher.log").read_text()
            assert self.process.poll() is None, launcher[-2000:] + self.log(0)[-3000:]
            assert time.monotonic() < until, self.log(0)[-3000:]
            time.sleep(0.02)


def inside(space: str, command: list[str]) -> list[str]:
    """The same command in a namespace."""
    return ["ip", "netns", "exec", space, *command]


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
