"""The store of counters: in this process, on a server, and while the server is away."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cortex.core.errors import ConfigError, LimitsUnavailableError
from cortex.gateway.counters import Counters
from tests.support.redis import RedisServer, redis_server


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as running:
        yield running


async def check_counting(counters: Counters, others: Counters) -> None:
    assert await counters.add("a", 5, 60) == 5
    assert await others.add("a", 7, 60) == 12
    assert await counters.add("a", -10, 60) == 2
    assert await counters.read("a") == 2
    assert await counters.read("b") == 0


async def test_counters_in_memory_count() -> None:
    counters = Counters("memory", clock=Clock(), on_fault=lambda: None)
    await check_counting(counters, counters)
    await counters.close()


@pytest.mark.parametrize("scheme", ["redis", "valkey"])
async def test_counters_on_a_server_are_common_to_all_who_use_it(
    server: RedisServer, scheme: str
) -> None:
    url = server.url.replace("redis", scheme, 1)
    ours = Counters(url, clock=Clock(), on_fault=lambda: None)
    theirs = Counters(url, clock=Clock(), on_fault=lambda: None)
    await check_counting(ours, theirs)
    await ours.close()
    await theirs.close()


async def test_what_hardly_changes_is_asked_for_once_a_second(server: RedisServer) -> None:
    clock = Clock()
    counters = Counters(server.url, clock=clock, on_fault=lambda: None)
    await counters.add("a", 5, 60)
    assert await counters.read_settled("a") == 5
    await counters.add("a", 1, 60)
    clock.now_s += 0.9
    assert await counters.read_settled("a") == 5
    clock.now_s += 0.1
    assert await counters.read_settled("a") == 6
    await counters.close()


async def test_a_server_that_goes_away_is_left_alone_for_a_moment_and_told_of_once(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "cortex.gateway.counters")
    clock, faults = Clock(), []
    counters = Counters(server.url, clock=clock, on_fault=lambda: faults.append(1))
    assert await counters.add("a", 1, 60) == 1
    server.stop()
    for _ in range(3):
        with pytest.raises(LimitsUnavailableError):
            await counters.add("a", 1, 60)
    assert len(faults) == 3
    clock.now_s += 2
    with pytest.raises(LimitsUnavailableError):
        await counters.read("a")
    server.start()
    # It is not asked again before its time.
    with pytest.raises(LimitsUnavailableError):
        await counters.read("a")
    clock.now_s += 2
    assert await counters.add("a", 1, 60) == 1
    assert [each.message for each in caplog.records] == [
        "the server of limits.storage does not answer",
        "the server of limits.storage answers again",
    ]
    await counters.close()


async def test_only_the_scheme_of_a_url_is_read_as_another_name_of_redis() -> None:
    counters = Counters("valkey://valkey:6380/2", clock=Clock(), on_fault=lambda: None)
    assert counters._pool is not None
    place = counters._pool.connection_kwargs
    assert (place["host"], place["port"], place["db"]) == ("valkey", 6380, 2)
    unix = Counters("valkey+unix:///run/valkey.sock?db=3", clock=Clock(), on_fault=lambda: None)
    assert unix._pool is not None
    assert unix._pool.connection_kwargs["path"] == "/run/valkey.sock"
    assert unix._pool.connection_kwargs["db"] == 3


async def test_a_url_that_cannot_be_used_stops_the_start_without_being_quoted() -> None:
    with pytest.raises(ConfigError) as caught:
        Counters("redis://:hunter2@host:port", clock=Clock(), on_fault=lambda: None)
    assert "hunter2" not in caught.value.message
