"""Reservations: settled once, taken back when cancelled, kept over a reload."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex.core.entitlements import ApiKey, Entitlements, LimitsConfig
from cortex.core.errors import RateLimitError
from cortex.gateway import counters, limiter
from cortex.gateway.auth import Caller, Gatekeeper
from cortex.gateway.fleet import Fleet
from cortex.gateway.limiter import Limiter, Reservation
from cortex.gateway.metrics import Metrics
from tests.support.redis import redis_server

MIDNIGHT_S = 1_728_000_000.0
BODY = b'{"max_tokens": 30}'  # 4 tokens of prompt and 30 of answer, by estimate
ESTIMATE = 34


def caller(**limits: int) -> Caller:
    entry = ApiKey(key="k", account_id="a", key_id="k", **limits)  # type: ignore[arg-type]
    return Gatekeeper(Entitlements(keys=[entry])).find([(b"x-api-key", b"k")])


@asynccontextmanager
async def running(config: LimitsConfig | None = None) -> AsyncIterator[Limiter]:
    made = Limiter(
        config or LimitsConfig(),
        Metrics(Fleet([])),
        wall_clock=lambda: MIDNIGHT_S,
        clock=lambda: MIDNIGHT_S,
    )
    async with asyncio.TaskGroup() as tasks:
        settling = tasks.create_task(made.run())
        try:
            yield made
        finally:
            await made.close()
            settling.cancel()


async def used(of: Limiter, who: Caller) -> list[int]:
    # The notes are worked off in a turn of their own.
    for _ in range(20):
        await asyncio.sleep(0)
    return [each.used for each in await of.standings(who)]


async def test_a_reservation_is_settled_once() -> None:
    who = caller(tokens_per_day=1000)
    async with running() as limits:
        reservation = limits.begin(who, BODY)
        await limits.count(reservation)
        assert await used(limits, who) == [ESTIMATE]
        limits.settle(reservation, 12)
        limits.settle(reservation, 999)
        assert await used(limits, who) == [12]


async def test_spending_more_than_was_reserved_is_counted_too() -> None:
    who = caller(tokens_per_day=10)
    async with running() as limits:
        reservation = limits.begin(who, BODY)
        await limits.count(reservation)
        assert await used(limits, who) == [10]
        limits.settle(reservation, 50)
        assert await used(limits, who) == [50]
        with pytest.raises(RateLimitError):
            await limits.count(limits.begin(who, BODY))


async def test_a_reload_keeps_what_is_counted_and_takes_the_new_limits() -> None:
    who = caller(tokens_per_day=1000, max_concurrent=1)
    async with running() as limits:
        reservation = limits.begin(who, BODY)
        await limits.count(reservation)
        limits.reload(LimitsConfig(reserve_output_tokens=5))
        who = caller(tokens_per_day=40, max_concurrent=2)
        assert await used(limits, who) == [ESTIMATE]
        with pytest.raises(RateLimitError, match="34 of 40 tokens of tokens_per_day are used"):
            await limits.count(limits.begin(who, BODY))
        limits.settle(reservation, 10)
        assert await used(limits, who) == [10]
        await limits.count(limits.begin(who, BODY))
        assert await used(limits, who) == [10 + 4 + 5]


async def test_a_reload_with_a_storage_that_cannot_be_used_keeps_the_old_one() -> None:
    who = caller(tokens_per_day=1000)
    async with running() as limits:
        await limits.count(limits.begin(who, BODY))
        limits.reload(LimitsConfig(storage="redis://host:port"))
        assert await used(limits, who) == [ESTIMATE]


async def test_a_request_cancelled_while_it_is_counted_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    who = caller(requests_per_minute=5, tokens_per_day=1000, max_concurrent=1)
    async with running() as limits:
        reservation = limits.begin(who, BODY)
        with monkeypatch.context() as patched:
            waiting = asyncio.Event()

            async def hang(_self: object, _name: str) -> int:
                waiting.set()
                await asyncio.Event().wait()
                raise AssertionError

            patched.setattr(counters.Counters, "read_settled", hang)
            async with asyncio.TaskGroup() as tasks:
                counting = tasks.create_task(limits.count(reservation))
                await waiting.wait()
                counting.cancel()
        limits.settle(reservation, 7)
        assert await used(limits, who) == [0, 0]
        limits.begin(who, BODY)


async def test_the_queue_of_notes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limiter, "MAX_NOTES", 1)
    metrics = Metrics(Fleet([]))
    made = Limiter(LimitsConfig(), metrics, wall_clock=lambda: MIDNIGHT_S, clock=lambda: MIDNIGHT_S)
    who = caller(tokens_per_day=1000)
    for _ in range(3):
        reservation = made.begin(who, BODY)
        await made.count(reservation)
        made.settle(reservation, 1)
    assert b"cortex_limits_storage_errors_total 2.0" in metrics.render()


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(["begin", "settle", "leave"]), st.integers(0, 60))),
    amount=st.integers(20, 300),
)
def test_whatever_requests_do_the_counters_hold_what_is_spent_and_what_is_open(
    steps: list[tuple[str, int]], amount: int
) -> None:
    who = caller(requests_per_minute=5, tokens_per_day=amount, max_concurrent=3)

    async def walk() -> None:
        spent = requests = 0
        open_now: list[Reservation] = []
        async with running() as limits:
            for step, number in steps:
                if step == "begin":
                    try:
                        reservation = limits.begin(who, BODY)
                        await limits.count(reservation)
                    except RateLimitError:
                        continue
                    open_now.append(reservation)
                    requests += 1
                elif open_now:
                    reservation = open_now.pop(number % len(open_now))
                    tokens = number if step == "settle" else 0
                    limits.settle(reservation, tokens)
                    limits.settle(reservation, 1000)
                    spent += tokens
                reserved = min(ESTIMATE, amount) * len(open_now)
                assert await used(limits, who) == [requests, spent + reserved]
                assert len(open_now) <= 3
                assert requests <= 5
            for reservation in open_now:
                limits.settle(reservation, 0)
            assert await used(limits, who) == [requests, spent]

    asyncio.run(walk())


async def test_what_could_not_be_settled_is_settled_when_the_server_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counters, "STORAGE_RETRY_S", 0.0)
    monkeypatch.setattr(limiter, "STORAGE_RETRY_S", 0.01)
    who = caller(hard_cap=1000)
    with redis_server(tmp_path) as server:
        async with running(LimitsConfig(storage=server.url)) as limits:
            reservation = limits.begin(who, BODY)
            await limits.count(reservation)
            server.stop()
            limits.settle(reservation, 12)
            await asyncio.sleep(0)
            server.start()
            # The new server knows nothing: what arrives is the difference, below zero, so 0.
            async with asyncio.timeout(10):
                while (await limits.standings(who))[0].current != 12 - ESTIMATE:
                    await asyncio.sleep(0.01)
            assert await used(limits, who) == [0]
