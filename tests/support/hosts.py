"""Hosts of their own on one machine: network namespaces behind a bridge, with links to cut.

Names are unique per network and everything is taken away by `Network.close`, whatever became of
the tests. Linux, root and iproute2 are needed; `missing` says what is not there.
"""

import ctypes
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

NETWORK = "10.77.0"
COMMAND_S = 10
CLONE_NEWNET = 0x40000000


def missing() -> str | None:
    """Return why there can be no network here, None where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the `ip` command is missing; install iproute2"
    probe = f"cx{secrets.token_hex(3)}"
    made = subprocess.run(
        ["ip", "netns", "add", probe],
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
        check=False,
    )
    if made.returncode != 0:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], timeout=COMMAND_S, check=False)
    return None


class Host:
    """One namespace with one address.

    Attributes:
        space: the namespace's name.
    """

    def __init__(self, network: "Network", number: int) -> None:
        self.space = f"{network.prefix}h{number}"
        self.address = f"{NETWORK}.{number}"
        self._port = f"{network.prefix}p{number}"
        self._network = network

    def popen(self, command: Sequence[str], **options: object) -> subprocess.Popen[str]:
        """Start a process on this host; its id is the command's own."""
        started: subprocess.Popen[str] = subprocess.Popen(  # type: ignore[call-overload]
            ["ip", "netns", "exec", self.space, *command], text=True, **options
        )
        return started

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Have sockets that this thread makes meanwhile belong to this host."""
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            _enter(Path("/run/netns", self.space))
            try:
                yield
            finally:
                _setns(own)
        finally:
            os.close(own)

    def cut(self) -> None:
        """Pull the cable: packets vanish, nobody is told."""
        _ip("-n", self._network.switch, "link", "set", self._port, "down")

    def mend(self) -> None:
        """Plug it in again, and forget routes to nowhere."""
        _ip("-n", self._network.switch, "link", "set", self._port, "up")
        for line in _ip("-n", self.space, "route", "show", "type", "blackhole").splitlines():
            _ip("-n", self.space, "route", "del", "blackhole", line.split()[1])

    def swallow(self, other: "Host") -> None:
        """Lose what this host sends to another one; what comes from there arrives."""
        _ip("-n", self.space, "route", "add", "blackhole", f"{other.address}/32")


class Network:
    """A bridge with hosts on it; close it."""

    def __init__(self, num_hosts: int) -> None:
        self.prefix = f"cx{secrets.token_hex(3)}"
        self.switch = f"{self.prefix}sw"
        self._spaces: list[str] = []
        try:
            self._add(self.switch)
            _ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self.switch, "link", "set", "bridge", "up")
            self.hosts = [self._host(number) for number in range(1, num_hosts + 1)]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Take everything away."""
        for space in self._spaces:
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "del", space)

    def _add(self, space: str) -> None:
        _ip("netns", "add", space)
        self._spaces.append(space)
        _ip("-n", space, "link", "set", "lo", "up")

    def _host(self, number: int) -> Host:
        host = Host(self, number)
        self._add(host.space)
        port = f"{self.prefix}p{number}"
        peer = ["peer", "name", "eth0", "netns", host.space]
        _ip("-n", self.switch, "link", "add", port, "type", "veth", *peer)
        _ip("-n", self.switch, "link", "set", port, "master", "bridge", "up")
        _ip("-n", host.space, "addr", "add", f"{host.address}/24", "dev", "eth0")
        _ip("-n", host.space, "link", "set", "eth0", "up")
        return host


def _ip(*arguments: str) -> str:
    done = subprocess.run(
        ["ip", *arguments], capture_output=True, text=True, timeout=COMMAND_S, check=True
    )
    return done.stdout


def _enter(space: Path) -> None:
    descriptor = os.open(space, os.O_RDONLY)
    try:
        _setns(descriptor)
    finally:
        os.close(descriptor)


def _setns(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns failed")
