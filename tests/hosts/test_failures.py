"""Nodes that die, hang and come back, as a client of the gateway sees it."""

import asyncio

import aiohttp

from tests.hosts.conftest import Fleet
from tests.hosts.views import all_healthy, inflict, stats, until_healthy
from tests.support.load import run_load
from tests.support.mock_neuron.faults import FaultCommand

NOTICED_S = 5.0
BACK_S = 15.0
# The aim is one second; a shared machine is not held to it.
SLOWEST_S = 4.0


def body(number: int, model: str = "warm") -> dict[str, object]:
    """A short request; every other one streams."""
    messages = [{"role": "user", "content": f"Question {number}"}]
    return {"model": model, "messages": messages, "max_tokens": 4, "stream": number % 2 == 0}


async def test_a_killed_neuron_fails_no_request_that_had_not_started(fleet: Fleet) -> None:
    with fleet.client.inside():
        async with aiohttp.ClientSession() as session:
            await all_healthy(session, fleet)

            async def kill() -> None:
                await asyncio.sleep(1.5)
                fleet.kill("b")

            done = await run_load([fleet.url("one")], body, rate=100, seconds=4, meanwhile=kill)
    assert len(done.all) == 400
    assert done.failed_before_the_start == []
    # What was in the middle of its answer is lost: at most what one node had in hand.
    assert len(done.failed) <= 40
    assert done.percentile(0.99) < SLOWEST_S


async def test_a_neuron_that_comes_back_is_used_again(fleet: Fleet) -> None:
    with fleet.client.inside():
        async with aiohttp.ClientSession() as session:
            fleet.kill("c")
            await until_healthy(session, fleet, "one", "ab", NOTICED_S)
            fleet.start("c")
            await asyncio.to_thread(fleet.await_ready, "c")
            await until_healthy(session, fleet, "one", "abc", BACK_S)
            done = await run_load([fleet.url("one")], body, rate=1000, seconds=0.03)
            assert done.failed == []
            assert (await stats(session, fleet, "c"))["requests"] > 0


async def test_a_hung_engine_loses_only_what_it_was_answering(fleet: Fleet) -> None:
    with fleet.client.inside():
        async with aiohttp.ClientSession() as session:
            await all_healthy(session, fleet)

            async def hang() -> None:
                await asyncio.sleep(0.5)
                command = FaultCommand(kind="hang_engine", model_id="warm", after_s=2)
                await inflict(session, fleet, "b", command)

            done = await run_load([fleet.url("one")], body, rate=30, seconds=4, meanwhile=hang)
            assert [each.error for each in done.failed if not each.stream] == []
            before = (await stats(session, fleet, "b"))["requests"]
            again = await run_load([fleet.url("one")], body, rate=1000, seconds=0.03)
            assert again.failed == []
            assert (await stats(session, fleet, "b"))["requests"] > before
