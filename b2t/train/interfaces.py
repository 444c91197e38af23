"""Which network interface leads to another host: asked of the routing table, not guessed."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from b2t.errors import UserError
from b2t.records import write_atomically

ENV_FILE = ".deepspeed_env"
"""What DeepSpeed's launcher exports on every host, one KEY=VALUE a line; found where it starts."""


def interfaces() -> dict[str, tuple[bool, list[str]]]:
    """Network interfaces by name: up or not, and IPv4 addresses."""
    import psutil

    up = {name: stats.isup for name, stats in psutil.net_if_stats().items()}
    return {
        name: (up.get(name, False), [a.address for a in found if a.family == socket.AF_INET])
        for name, found in psutil.net_if_addrs().items()
    }


def local_address(host: str) -> str:
    """Return the IPv4 address of this host that packets to ``host`` leave from. Sends nothing.

    Raises:
        UserError: the name has no address, or no route leads there.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((socket.gethostbyname(host), 9))  # of UDP: only looks for the route
        except OSError as error:
            raise UserError(
                f"{host}: no way there from {socket.gethostname()} ({error.strerror or error}): "
                "look at /etc/hosts or DNS, and at `ip route`"
            ) from None
        return str(probe.getsockname()[0])


def interface_to(host: str) -> str | None:
    """Return the interface through which this host reaches ``host``; None: it is this host itself.

    A name of this host leads to the loopback interface where the address is 127.0.0.1 or alike, and
    to the interface that has the address elsewhere.

    Raises:
        UserError: no way there.
    """
    address = local_address(host)
    if address.startswith("127."):
        return None
    return next((name for name, (_, own) in interfaces().items() if address in own), None)


def choose_for_gloo() -> str | None:
    """Let gloo listen where the first host is reached, unless the user chose; return the interface.

    Gloo listens on the address of this host's name, which Debian makes 127.0.1.1: ranks of several
    hosts then wait for each other in vain.
    """
    first = os.environ.get("MASTER_ADDR")
    if first is None or "GLOO_SOCKET_IFNAME" in os.environ:
        return None
    try:
        name = interface_to(first)
    except UserError:  # joining says more
        return None
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name
    return name


def hosts_of(hostfile: Path) -> list[str]:
    """Names of the hosts in a hostfile.

    Raises:
        UserError: it cannot be read, or is none.
    """
    from deepspeed.launcher.runner import fetch_hostfile

    if not hostfile.is_file():
        raise UserError(f"{hostfile}: no such hostfile; give --hostfile FILE")
    try:
        return list(fetch_hostfile(str(hostfile)))
    except ValueError as error:
        raise UserError(
            f"{hostfile}: {error}; expected lines like `node1 slots=2` with each host once"
        ) from None


def interface_to_others(hostfile: Path) -> str:
    """Return the one interface of this host that leads to all others of a hostfile.

    Raises:
        UserError: there is no other host, no way to one, or several interfaces lead there.
    """
    own = {address for _, found in interfaces().values() for address in found}
    names = hosts_of(hostfile)
    ways = {name: local_address(name) for name in names}
    others = [name for name in names if socket.gethostbyname(name) not in own]
    if not others:
        raise UserError(
            f"{hostfile}: names no host but this one ({', '.join(names) or 'none'}); {ENV_FILE} is "
            "for several hosts"
        )
    by_interface: dict[str, list[str]] = {}
    for name in others:
        holding = [each for each, (_, found) in interfaces().items() if ways[name] in found]
        by_interface.setdefault(holding[0] if holding else ways[name], []).append(name)
    if len(by_interface) > 1:
        found = "; ".join(f"{', '.join(hosts)} by {way}" for way, hosts in by_interface.items())
        raise UserError(
            f"{hostfile}: the hosts are reached by different interfaces ({found}); name them by "
            "addresses of one network"
        )
    return next(iter(by_interface))


def write_env(hostfile: Path, target: Path = Path(ENV_FILE)) -> list[str]:
    """Name the interface to the other hosts for gloo and NCCL; return the lines that were set.

    Other lines of the file stay. The launcher exports them on every host, so that the interface
    must have the same name everywhere.

    Raises:
        UserError: see `interface_to_others`; or the file cannot be written.
    """
    name = interface_to_others(hostfile)
    # NCCL takes a prefix, or an exact name after a `=`.
    longer = any(each != name and each.startswith(name) for each in interfaces())
    wanted = {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}" if longer else name}
    try:
        before = target.read_text("utf-8").splitlines() if target.exists() else []
        kept = [
            each for each in before if each.strip() and each.split("=")[0].strip() not in wanted
        ]
        lines = [f"{key}={value}" for key, value in wanted.items()]
        write_atomically(target, "".join(f"{line}\n" for line in [*kept, *lines]))
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
    return lines
