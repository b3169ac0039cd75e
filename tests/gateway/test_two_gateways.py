"""Two gateways over the same neurons, in virtual time: they agree without talking to each other."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from tests.support import virtual_time
from tests.support.gateway import RunningGateway, run_gateway
from tests.support.mock_neuron import GIB, MockModel, MockNeuron

LOAD_S = 20.0


def model(name: str, status: str = "unloaded", gib: int = 20) -> MockModel:
    """A model that takes LOAD_S to load and answers at once."""
    size = gib * GIB
    return MockModel(name, status, size, load_bytes_s=size / LOAD_S)


@asynccontextmanager
async def two_gateways(
    *nodes: list[MockModel], **settings: object
) -> AsyncIterator[tuple[list[RunningGateway], list[MockNeuron]]]:
    """Two gateways over neurons a, b, ... of 24 GiB each that hold these models."""
    async with AsyncExitStack() as stack:
        neurons = [MockNeuron(*models, events=True, total_bytes=24 * GIB) for models in nodes]
        for neuron in neurons:
            await stack.enter_async_context(neuron)
        named = {name: each.endpoint for name, each in zip("abc", neurons, strict=False)}
        gateways = [
            await stack.enter_async_context(
                run_gateway(named, clock=virtual_time.now_s, **settings)  # type: ignore[arg-type]
            )
            for _ in range(2)
        ]
        for neuron in neurons:
            await neuron.until(lambda each=neuron: each.feed.subscribers == 2)
        yield gateways, neurons


def starts(neurons: list[MockNeuron]) -> list[list[str]]:
    return [neuron.starts for neuron in neurons]


def test_a_hundred_requests_at_both_for_a_cold_model_cause_one_load() -> None:
    async def run() -> None:
        nodes = [model("m")], [model("m")], [model("m")]
        async with two_gateways(*nodes) as (gateways, neurons):
            async with asyncio.TaskGroup() as tasks:
                calls = [
                    tasks.create_task(gateway.chat("m", stream=number % 2 == 0))
                    for number in range(50)
                    for gateway in gateways
                ]
            assert {call.result().status for call in calls} == {200}
            assert starts(neurons) == [["m"], [], []]

    virtual_time.run(run())


def test_a_load_that_one_began_is_joined_by_the_other_later() -> None:
    async def run() -> None:
        async with two_gateways([model("m")], [model("m")]) as (gateways, neurons):
            async with asyncio.TaskGroup() as tasks:
                calls = [tasks.create_task(gateways[0].chat("m"))]
                await asyncio.sleep(LOAD_S / 2)
                begun_s = virtual_time.now_s()
                calls.append(tasks.create_task(gateways[1].chat("m")))
            assert {call.result().status for call in calls} == {200}
            assert virtual_time.now_s() - begun_s < LOAD_S
            assert starts(neurons) == [["m"], []]

    virtual_time.run(run())


def test_what_one_had_loaded_serves_the_other_at_once() -> None:
    async def run() -> None:
        async with two_gateways([model("m")], [model("m")]) as (gateways, neurons):
            assert (await gateways[0].chat("m")).status == 200
            begun_s = virtual_time.now_s()
            assert (await gateways[1].chat("m")).status == 200
            assert virtual_time.now_s() - begun_s < 2
            assert starts(neurons) == [["m"], []]

    virtual_time.run(run())


def test_two_models_wanted_by_both_find_a_place_of_their_own_and_stay_there() -> None:
    async def run() -> None:
        names = ["m", "n"]
        nodes = [model(name) for name in names], [model(name) for name in names]
        async with two_gateways(*nodes) as (gateways, neurons):
            for _ in range(20):
                async with asyncio.TaskGroup() as tasks:
                    calls = [
                        tasks.create_task(gateway.chat(name))
                        for gateway in gateways
                        for name in names
                    ]
                assert {call.result().status for call in calls} == {200}
            assert sorted(name for begun in starts(neurons) for name in begun) == ["m", "n"]

    virtual_time.run(run())


def test_two_models_that_exclude_each_other_do_not_thrash_between_two_gateways() -> None:
    """Each gateway has one of them asked for all the time; only one fits."""

    async def run() -> None:
        served = {"m": 0, "n": 0}
        residency = {"min_resident_s": 60.0}

        async def ask(gateway: RunningGateway, name: str, end_s: float) -> None:
            while virtual_time.now_s() < end_s:
                response = await gateway.chat(name)
                if response.status == 200:
                    served[name] += 1
                    await asyncio.sleep(2)
                else:
                    assert response.status == 503
                    await asyncio.sleep(float(response.headers["retry-after"]))

        nodes = [model("m"), model("n")]
        async with two_gateways(nodes, eviction=residency) as (gateways, (neuron,)):
            end_s = virtual_time.now_s() + 240
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(ask(gateways[0], "m", end_s))
                tasks.create_task(ask(gateways[1], "n", end_s))
            # Each stay lasts a minute at least, after a load of twenty seconds.
            assert len(neuron.starts) <= 4
            assert min(served.values()) > 20, served

    virtual_time.run(run())


def test_both_leave_a_node_that_died_and_use_it_again() -> None:
    async def run() -> None:
        nodes = [model("m", "loaded")], [model("m", "loaded")]
        async with two_gateways(*nodes) as (gateways, (first, second)):
            await first.stop()
            async with asyncio.TaskGroup() as tasks:
                calls = [
                    tasks.create_task(gateway.chat("m")) for gateway in gateways for _ in range(10)
                ]
            assert {call.result().status for call in calls} == {200}
            views = [gateway.apps.fleet.snapshot().nodes for gateway in gateways]
            assert [[node.healthy for node in view] for view in views] == [[False, True]] * 2
            await first.start()
            await asyncio.sleep(2)
            views = [gateway.apps.fleet.snapshot().nodes for gateway in gateways]
            assert [[node.healthy for node in view] for view in views] == [[True, True]] * 2
            assert starts([first, second]) == [[], []]

    virtual_time.run(run())
