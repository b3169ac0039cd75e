"""What the service manager is told."""

import asyncio
import logging
from collections.abc import Iterator

import pytest

from cortex.core.config import child_environment, foreign_environment, service_environment
from cortex.core.notify import Notifier
from cortex.core.serve import feed_watchdog, told
from tests.support import virtual_time
from tests.support.service_manager import ServiceManager


@pytest.fixture
def manager() -> Iterator[ServiceManager]:
    with ServiceManager() as manager:
        yield manager


def notifier(manager: ServiceManager, **environment: str) -> Notifier:
    return Notifier(manager.environment(**environment), pid=7, clock_ns=lambda: 123_456_789)


def test_each_state_is_one_datagram_of_lines(manager: ServiceManager):
    it = notifier(manager)
    it.ready("serving on port 1")
    it.reloading()
    it.ready("the file\nis  broken")
    it.stopping("draining")
    it.extend(20)
    it.alive()
    it.close()
    assert manager.read() == [
        {"READY": "1", "STATUS": "serving on port 1"},
        {"RELOADING": "1", "MONOTONIC_USEC": "123456", "STATUS": "reading the configuration"},
        {"READY": "1", "STATUS": "the file is broken"},
        {"STOPPING": "1", "STATUS": "draining"},
        {"EXTEND_TIMEOUT_USEC": "20000000"},
        {"WATCHDOG": "1"},
    ]


def test_an_abstract_socket_is_reached_by_its_name():
    with ServiceManager(abstract=True) as manager:
        assert manager.address.startswith("@")
        it = notifier(manager)
        it.ready("up")
        it.close()
        assert manager.read() == [{"READY": "1", "STATUS": "up"}]


def test_without_a_manager_nothing_is_told_and_no_watchdog_asked_for():
    it = Notifier({"WATCHDOG_USEC": "1000000"})
    it.ready("up")
    assert not it.is_listened_to
    assert it.watchdog_s is None


def test_an_address_of_an_unknown_kind_is_told_once_and_not_used(
    caplog: pytest.LogCaptureFixture,
):
    it = Notifier({"NOTIFY_SOCKET": "vsock:2:1234"})
    it.ready("up")
    assert not it.is_listened_to
    assert "neither a path nor an abstract name" in caplog.text


def test_a_manager_that_has_gone_is_told_of_once(caplog: pytest.LogCaptureFixture):
    it = Notifier({"NOTIFY_SOCKET": "/nonexistent/notify"})
    it.alive()
    it.alive()
    it.close()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "cannot be told" in record.message


def test_a_manager_that_does_not_read_holds_nothing_up(
    manager: ServiceManager, caplog: pytest.LogCaptureFixture
):
    it = notifier(manager)
    # More than any queue of datagrams takes; a blocking send would hang here.
    for _ in range(5000):
        it.alive()
    it.close()
    assert len(caplog.records) == 1
    assert 0 < len(manager.read()) < 5000


@pytest.mark.parametrize(
    ("environment", "watchdog_s"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_the_one_meant_for_this_process(
    manager: ServiceManager, environment: dict[str, str], watchdog_s: float | None
):
    assert notifier(manager, **environment).watchdog_s == watchdog_s


def test_the_watchdog_is_fed_twice_as_often_as_it_asks_and_not_by_a_blocked_loop(
    manager: ServiceManager,
):
    it = notifier(manager, WATCHDOG_USEC="10000000")

    async def live() -> tuple[int, int, int]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, virtual_time.VirtualTimeLoop)
        async with asyncio.TaskGroup() as tasks:
            feeding = tasks.create_task(feed_watchdog(it))
            await asyncio.sleep(21)
            healthy = len(manager.read())
            # Sixty seconds pass, and no other task gets its turn.
            loop._advance(60)
            blocked = len(manager.read())
            await asyncio.sleep(1)
            feeding.cancel()
        return healthy, blocked - healthy, len(manager.read()) - blocked

    # At 0, 5, 10, 15 and 20 s; never while blocked; at once when the loop goes on.
    assert virtual_time.run(live()) == (5, 0, 1)
    it.close()


def test_a_long_end_is_told_and_extended_until_it_is_over(manager: ServiceManager):
    it = notifier(manager)

    async def end() -> None:
        shutdown = asyncio.Event()
        async with told(it, shutdown, 90):
            await asyncio.sleep(100)
            assert manager.read() == []
            shutdown.set()
            await asyncio.sleep(12)

    virtual_time.run(end())
    assert manager.read() == [
        {"STOPPING": "1", "STATUS": "draining, for 90 s at most"},
        *[{"EXTEND_TIMEOUT_USEC": "20000000"}] * 3,
    ]


def test_what_is_between_a_service_and_its_manager_stays_there(monkeypatch: pytest.MonkeyPatch):
    told = {"NOTIFY_SOCKET": "/run/notify", "WATCHDOG_USEC": "1", "STATE_DIRECTORY": "/var/lib/x"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert told.items() <= service_environment().items()
    assert not told.keys() & child_environment({}).keys()
    assert not told.keys() & foreign_environment().keys()
