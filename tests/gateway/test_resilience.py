"""Nodes that fail or fall silent under requests, in virtual time: breaker, retries, lost nodes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.support import virtual_time
from tests.support.gateway import RunningGateway, run_gateway
from tests.support.mock_neuron import MockModel, MockNeuron
from tests.support.mock_neuron.engine import EngineSpec


def loaded(text: str, **fields: object) -> MockModel:
    return MockModel("m", "loaded", tokens=[text], **fields)  # type: ignore[arg-type]


@asynccontextmanager
async def fleet(
    *models: MockModel, events: bool = True
) -> AsyncIterator[tuple[RunningGateway, list[MockNeuron]]]:
    """A gateway over one neuron per model, called a, b, ..."""
    neurons = [MockNeuron(model, events=events) for model in models]
    for neuron in neurons:
        await neuron.start()
    try:
        nodes = {name: each.endpoint for name, each in zip("abc", neurons, strict=False)}
        async with run_gateway(nodes, clock=virtual_time.now_s) as gateway:
            for neuron in neurons:
                if events:
                    await neuron.until(lambda each=neuron: each.feed.subscribers == 1)
            yield gateway, neurons
    finally:
        for neuron in neurons:
            await neuron.stop()


async def texts(gateway: RunningGateway, count: int) -> list[str]:
    """The answers to so many requests, one after another."""
    found = []
    for _ in range(count):
        response = await gateway.chat()
        assert response.status == 200, await response.text()
        found.append((await response.json())["choices"][0]["message"]["content"])
    return found


def test_a_node_that_fails_three_times_in_a_row_is_spared_until_a_trial_succeeds() -> None:
    async def run() -> None:
        async with fleet(loaded("a", fault="reset"), loaded("b")) as (gateway, (first, _)):
            assert await texts(gateway, 5) == ["b"] * 5
            # Three times it was asked first, then its breaker was open.
            assert len(first.seen) == 3
            values = await gateway.metrics()
            assert values['cortex_node_breaker_open{node="a"}'] == 1
            assert values['cortex_request_retries_total{model="m",node="a"}'] == 3
            report = await (await gateway.get("/health")).json()
            assert [each["breaker"] for each in report["details"]] == ["open", "closed"]
            await asyncio.sleep(2.1)
            assert await texts(gateway, 3) == ["b"] * 3
            assert len(first.seen) == 4, "one trial, which failed"
            first.models["m"].fault = None
            await asyncio.sleep(4.1)
            assert await texts(gateway, 3) == ["a"] * 3
            assert (await gateway.metrics())['cortex_node_breaker_open{node="a"}'] == 0

    virtual_time.run(run())


def test_one_trial_at_a_time_reaches_a_node_that_failed() -> None:
    async def run() -> None:
        gate = asyncio.Event()
        sick = loaded("a", fault="reset")
        async with fleet(sick, loaded("b")) as (gateway, (first, _)):
            await texts(gateway, 3)
            sick.fault, sick.first_gate = None, gate
            await asyncio.sleep(2.1)
            async with asyncio.TaskGroup() as tasks:
                for _ in range(10):
                    tasks.create_task(gateway.chat())
                await first.until(lambda: sick.in_flight == 1)
                gate.set()
            assert len(first.seen) == 4

    virtual_time.run(run())


def test_errors_that_are_the_requests_own_fault_leave_the_breaker_closed() -> None:
    async def run() -> None:
        refusing = loaded("a", refusal=(400, "context_length_exceeded"))
        async with fleet(refusing) as (gateway, (neuron,)):
            for _ in range(6):
                assert (await gateway.chat()).status == 400
            assert len(neuron.seen) == 6

    virtual_time.run(run())


def test_when_all_nodes_fail_the_answer_is_503_with_a_time_to_retry() -> None:
    async def run() -> None:
        sick = loaded("a", fault="reset"), loaded("b", fault="reset")
        async with fleet(*sick) as (gateway, neurons):
            for _ in range(3):
                assert (await gateway.chat()).status == 502
            response = await gateway.chat()
            assert (response.status, response.headers["retry-after"]) == (503, "2")
            assert (await response.json())["error"]["code"] == "service_unavailable"
            assert [len(each.seen) for each in neurons] == [3, 3]

    virtual_time.run(run())


def test_a_request_is_seen_by_three_nodes_at_most_and_by_none_twice() -> None:
    async def run() -> None:
        sick = [loaded(name, fault="reset") for name in "abc"]
        async with fleet(*sick) as (gateway, neurons):
            assert (await gateway.chat()).status == 502
            assert [len(each.seen) for each in neurons] == [1, 1, 1]

    virtual_time.run(run())


def test_whole_answers_of_a_node_that_fell_silent_are_asked_of_another_within_five_seconds() -> (
    None
):
    async def run() -> None:
        slow = loaded("a", first_gate=asyncio.Event())
        async with fleet(slow, loaded("b")) as (gateway, (first, _)):
            async with asyncio.TaskGroup() as tasks:
                asked_s = virtual_time.now_s()
                calls = [tasks.create_task(gateway.chat(stream=each)) for each in (False, True)]
                await first.until(lambda: slow.in_flight >= 1)
                first.faults.is_silent = True
            for call in calls:
                assert call.result().status == 200
                assert '"b"' in await call.result().text()
            assert virtual_time.now_s() - asked_s < 5

    virtual_time.run(run())


def test_a_stream_of_a_node_that_fell_silent_ends_in_an_error_event_within_eight_seconds() -> None:
    async def run() -> None:
        endless = MockModel("m", "loaded", engine=EngineSpec(max_tokens=10_000))
        async with fleet(endless) as (gateway, (neuron,)):
            async with gateway.open_chat() as response:
                await response.content.readuntil(b'"content":')
                neuron.faults.is_silent = True
                begun_s = virtual_time.now_s()
                text = (await response.content.read()).decode()
            assert "node a became unreachable in the middle of the answer" in text
            assert "[DONE]" not in text
            assert virtual_time.now_s() - begun_s < 8

    virtual_time.run(run())


def test_a_stream_that_goes_on_is_not_cut_when_its_node_seems_lost() -> None:
    async def run() -> None:
        steady = MockModel("m", "loaded", engine=EngineSpec(max_tokens=1000))
        async with fleet(steady) as (gateway, (neuron,)):
            async with gateway.open_chat() as response:
                await response.content.readuntil(b'"content":')
                neuron.feed.is_mute = True
                neuron.control_fault = "hang"
                text = (await response.content.read()).decode()
            assert text.endswith("data: [DONE]\n\n")

    virtual_time.run(run())


def test_a_node_that_comes_and_goes_is_used_again_only_once_it_has_stayed() -> None:
    async def run() -> None:
        async with fleet(loaded("a"), loaded("b")) as (gateway, (first, second)):
            for _ in range(3):
                await first.stop()
                await asyncio.sleep(1)
                await first.start()
                await asyncio.sleep(3)
            assert await texts(gateway, 4) == ["b"] * 4
            report = (await (await gateway.get("/health")).json())["details"][0]
            assert (report["healthy"], report["error"]) == (
                False,
                "it comes and goes, and is used again once it has stayed for a while",
            )
            await asyncio.sleep(4)
            await second.stop()
            assert await texts(gateway, 2) == ["a"] * 2

    virtual_time.run(run())
