"""Polling real sockets: nodes appear, change, vanish and come back."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from cortex.core.errors import UpstreamConnectionError, UpstreamMalformedError
from cortex.gateway.fleet import Fleet, NodeView
from cortex.gateway.neuron_client import UnreachableError, open_client
from cortex.gateway.poller import Poller
from tests.support.mock_neuron import MockModel, MockNeuron


@asynccontextmanager
async def polling(neuron: MockNeuron) -> AsyncIterator[tuple[Fleet, Poller]]:
    """A poller of one node `a`, its loop not running."""
    fleet = Fleet([("a", neuron.endpoint)])
    async with open_client(1.0) as client:
        yield fleet, Poller(client, fleet, poll_s=60, timeout_s=0.2)


def node(fleet: Fleet) -> NodeView:
    view = fleet.snapshot().node("a")
    assert view is not None
    return view


async def test_the_first_poll_discovers_devices_and_models() -> None:
    async with MockNeuron(MockModel("m", "loaded"), MockModel("n")) as neuron:
        async with polling(neuron) as (fleet, poller):
            await poller.poll("a")
            view = node(fleet)
            assert view.healthy
            assert {name: view.status(name) for name in view.models} == {
                "m": "loaded",
                "n": "unloaded",
            }
            assert view.devices[0].vram_total_mb == 65536
            assert view.loads["m"].max_in_flight == 8


async def test_a_model_that_is_no_longer_reported_vanishes() -> None:
    async with MockNeuron(MockModel("m", "loaded"), MockModel("n")) as neuron:
        async with polling(neuron) as (fleet, poller):
            await poller.poll("a")
            del neuron.models["n"]
            await poller.poll("a")
            assert list(node(fleet).models) == ["m"]


@pytest.mark.parametrize("fault", ["hang", "malformed", "error"])
async def test_three_bad_answers_make_a_node_unhealthy_and_one_good_one_healthy(fault: str) -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with polling(neuron) as (fleet, poller):
            await poller.poll("a")
            neuron.control_fault = fault  # type: ignore[assignment]
            seen = []
            for _ in range(3):
                await poller.poll("a")
                seen.append(node(fleet).healthy)
            assert seen == [True, True, False]
            neuron.control_fault = None
            await poller.poll("a")
            assert node(fleet).healthy


async def test_an_unreachable_node_never_becomes_healthy_and_says_why() -> None:
    neuron = MockNeuron()
    await neuron.start()
    await neuron.stop()
    async with polling(neuron) as (fleet, poller):
        await poller.poll("a")
        assert not node(fleet).healthy
        assert "node a cannot be reached" in (node(fleet).failure or "")


async def test_the_loop_polls_at_once_when_poked() -> None:
    async with MockNeuron(MockModel("m")) as neuron, polling(neuron) as (fleet, poller):
        async with asyncio.TaskGroup() as tasks:
            loop = tasks.create_task(poller.run())
            await poller.first_round()
            assert node(fleet).healthy
            before = neuron.polls
            poller.poke("a")
            await neuron.until(lambda: neuron.polls == before + 1)
            loop.cancel()


async def test_a_hanging_node_does_not_hold_up_the_others() -> None:
    async with MockNeuron() as slow, MockNeuron(MockModel("m")) as quick:
        slow.control_fault = "hang"
        fleet = Fleet([("a", slow.endpoint), ("b", quick.endpoint)])
        async with open_client(1.0) as client, asyncio.TaskGroup() as tasks:
            poller = Poller(client, fleet, poll_s=0.01, timeout_s=60)
            loop = tasks.create_task(poller.run())
            await quick.until(lambda: quick.polls >= 3)
            assert [each.healthy for each in fleet.snapshot().nodes] == [False, True]
            loop.cancel()


@pytest.mark.parametrize(
    ("fault", "error"),
    [("malformed", UpstreamMalformedError), ("stopped", UnreachableError)],
)
async def test_the_client_maps_faults_to_errors_that_name_the_node(
    fault: str, error: type[Exception]
) -> None:
    async with MockNeuron() as neuron, open_client(1.0) as client:
        if fault == "stopped":
            await neuron.stop()
        else:
            neuron.control_fault = "malformed"
        with pytest.raises(error, match="node box"):
            await client.models("box", neuron.endpoint)


async def test_a_connection_cut_before_the_answer_is_not_called_unreachable() -> None:
    async with MockNeuron(MockModel("m", "loaded", fault="reset")) as neuron:
        async with open_client(1.0) as client:
            with pytest.raises(UpstreamConnectionError) as caught:
                await client.post("box", neuron.endpoint, "/v1/chat/completions", b'{"model":"m"}')
            assert not isinstance(caught.value, UnreachableError)
