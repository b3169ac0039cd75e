"""Two gateways over the same neurons, and one that is killed and comes back."""

import asyncio

import aiohttp

from tests.hosts.conftest import Fleet
from tests.hosts.test_failures import NOTICED_S, body
from tests.hosts.views import all_healthy, stats, until_healthy
from tests.support.load import ask, run_load


async def test_a_cold_model_asked_for_at_both_gateways_is_loaded_once(fleet: Fleet) -> None:
    with fleet.client.inside():
        async with aiohttp.ClientSession() as session:
            await all_healthy(session, fleet)
            urls = [fleet.url(name) for name in fleet.gateways]
            done = await run_load(urls, lambda number: body(number, "cold"), rate=20, seconds=1)
            assert done.failed == []
            starts = [
                each
                for name in fleet.neurons
                for each in (await stats(session, fleet, name))["starts"]
            ]
            assert starts == ["cold"]


async def test_both_gateways_agree_on_who_is_there(fleet: Fleet) -> None:
    with fleet.client.inside():
        async with aiohttp.ClientSession() as session:
            await all_healthy(session, fleet)
            fleet.kill("a")
            async with asyncio.TaskGroup() as tasks:
                for gateway in fleet.gateways:
                    tasks.create_task(until_healthy(session, fleet, gateway, "bc", NOTICED_S))
            urls = [fleet.url(name) for name in fleet.gateways]
            done = await run_load(urls, body, rate=40, seconds=1)
            assert done.failed == []


async def test_a_gateway_that_was_killed_serves_again_with_nothing_remembered(
    fleet: Fleet,
) -> None:
    with fleet.client.inside():
        async with aiohttp.ClientSession() as session:
            await all_healthy(session, fleet)
            fleet.kill("one")
            refused = await ask(session, fleet.url("one"), body(1))
            assert refused.error is not None
            assert (await ask(session, fleet.url("two"), body(2))).error is None
            fleet.start("one")
            await asyncio.to_thread(fleet.await_ready, "one")
            assert (await ask(session, fleet.url("one"), body(3))).error is None
            await until_healthy(session, fleet, "one", "abc", NOTICED_S)
