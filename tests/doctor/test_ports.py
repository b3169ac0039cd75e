import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cortex.doctor import ports
from cortex.doctor.ports import check_port, find_holder

COMMANDS = frozenset(["serve", "up"])


@contextmanager
def listening() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_a_free_port_is_fine():
    with listening() as port:
        pass
    found = check_port("gateway", "127.0.0.1", port, COMMANDS)
    assert (found.level, found.message) == ("ok", f"127.0.0.1:{port} (gateway): free")


def test_a_port_that_somebody_holds_is_a_failure_with_their_pid():
    with listening() as port:
        holder = find_holder(port)
        assert holder is not None
        assert holder[0] == os.getpid()
        found = check_port("gateway", "127.0.0.1", port, COMMANDS)
    assert found.level == "fail"
    assert f"held by pid {os.getpid()} (" in found.message
    assert found.remedy == "stop what listens there or choose another port"


@pytest.mark.parametrize(
    ("command", "level"),
    [
        (["python", "-m", "cortex", "serve"], "ok"),
        (["/usr/bin/python3", "/usr/bin/cortex", "up"], "ok"),
        (["/usr/bin/python3", "/usr/bin/cortex", "neuron"], "fail"),
        (["nginx"], "fail"),
    ],
)
def test_a_service_that_runs_already_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, command: list[str], level: str
):
    monkeypatch.setattr(ports, "find_holder", lambda port: (7, command))
    with listening() as port:
        assert check_port("gateway", "127.0.0.1", port, COMMANDS).level == level


def test_a_port_of_another_user_asks_for_root(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ports, "find_holder", lambda port: None)
    monkeypatch.setattr(ports, "ASK_S", 0.05)
    with listening() as port:
        found = check_port("gateway", "127.0.0.1", port, COMMANDS)
    assert found.level == "fail"
    assert found.remedy is not None
    assert "as root" in found.remedy


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1"])
def test_an_address_that_is_not_of_this_host_is_a_failure(host: str):
    found = check_port("neuron", host, 13131, frozenset())
    assert found.level == "fail"
    assert f"{host}:13131 (neuron): cannot be listened on: " in found.message
