"""Cables that are cut, wholly or one way, and nodes that fall silent: nothing is refused, nothing
comes back."""

import asyncio

import aiohttp

from tests.hosts.conftest import Fleet
from tests.hosts.test_failures import BACK_S, NOTICED_S, body
from tests.hosts.views import all_healthy, inflict, until_healthy
from tests.support.load import Outcomes, ask, run_load
from tests.support.mock_neuron.faults import FaultCommand


async def cut_off(fleet: Fleet, cut: object, gateway: str = "one") -> tuple[float, Outcomes]:
    """Cut while requests come in; return how long it took to be noticed, and what became of all."""
    noticed_s = 0.0
    async with aiohttp.ClientSession() as session:
        await all_healthy(session, fleet)

        async def watch() -> None:
            nonlocal noticed_s
            await asyncio.sleep(0.5)
            cut()  # type: ignore[operator]
            noticed_s = await until_healthy(session, fleet, gateway, "bc", 30)

        done = await run_load([fleet.url(gateway)], body, rate=20, seconds=6, meanwhile=watch)
        # From here on nobody waits for the node that is gone.
        after = [await ask(session, fleet.url(gateway), body(number)) for number in range(10)]
    assert [each.error for each in after] == [None] * 10
    assert max(each.took_s for each in after) < 2
    return noticed_s, done


async def test_a_cut_cable_is_noticed_within_five_seconds(fleet: Fleet) -> None:
    with fleet.client.inside():
        noticed_s, done = await cut_off(fleet, fleet.neurons["a"].cut)
        assert noticed_s < NOTICED_S
        assert done.failed_before_the_start == []
        fleet.neurons["a"].mend()
        async with aiohttp.ClientSession() as session:
            await until_healthy(session, fleet, "one", "abc", BACK_S)


async def test_answers_that_vanish_are_noticed_by_the_gateway_that_does_not_get_them(
    fleet: Fleet,
) -> None:
    node, gateway = fleet.neurons["a"], fleet.gateways["one"]
    with fleet.client.inside():
        noticed_s, done = await cut_off(fleet, lambda: node.swallow(gateway))
        assert noticed_s < NOTICED_S
        assert done.failed_before_the_start == []
        async with aiohttp.ClientSession() as session:
            # The other gateway hears the node as before.
            await until_healthy(session, fleet, "two", "abc", 1)
            node.mend()
            await until_healthy(session, fleet, "one", "abc", BACK_S)


async def test_a_node_that_accepts_and_never_answers_is_left(fleet: Fleet) -> None:
    with fleet.client.inside():
        async with aiohttp.ClientSession() as session:
            await all_healthy(session, fleet)

            async def hush() -> None:
                await asyncio.sleep(0.5)
                await inflict(session, fleet, "a", FaultCommand(kind="silent"))
                assert await until_healthy(session, fleet, "one", "bc", 30) < NOTICED_S

            done = await run_load([fleet.url("one")], body, rate=20, seconds=5, meanwhile=hush)
        assert done.failed_before_the_start == []
        fleet.kill("a")
