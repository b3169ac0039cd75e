"""Polling real sockets: nodes appear, change, vanish and come back."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from cortex.core.errors import UpstreamConnectionError, UpstreamMalformedError
from cortex.gateway.fleet import Fleet, NodeView
from cortex.gateway.neuron_client import UnreachableError, open_client
from cortex.gateway.poller import poll
from tests.support.mock_neuron import MockModel, MockNeuron


@asynccontextmanager
async def polling(
    neuron: MockNeuron,
) -> AsyncIterator[tuple[Fleet, Callable[[], Awaitable[bool]]]]:
    """A fleet of one node `a`, and what polls it once."""
    fleet = Fleet([("a", neuron.endpoint)])
    async with open_client(1.0) as client:
        yield fleet, lambda: poll(client, fleet, "a", timeout_s=0.2)


def node(fleet: Fleet) -> NodeView:
    view = fleet.snapshot().node("a")
    assert view is not None
    return view


async def test_the_first_poll_discovers_devices_and_models() -> None:
    async with MockNeuron(MockModel("m", "loaded"), MockModel("n")) as neuron:
        async with polling(neuron) as (fleet, ask):
            await ask()
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
        async with polling(neuron) as (fleet, ask):
            await ask()
            del neuron.models["n"]
            await ask()
            assert list(node(fleet).models) == ["m"]


@pytest.mark.parametrize("fault", ["hang", "malformed", "error"])
async def test_three_bad_answers_make_a_node_unhealthy_and_one_good_one_healthy(fault: str) -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with polling(neuron) as (fleet, ask):
            await ask()
            neuron.control_fault = fault  # type: ignore[assignment]
            seen = []
            for _ in range(3):
                await ask()
                seen.append(node(fleet).healthy)
            assert seen == [True, True, False]
            neuron.control_fault = None
            await ask()
            assert node(fleet).healthy


async def test_a_node_that_refuses_connections_is_unhealthy_at_once() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with polling(neuron) as (fleet, ask):
            await ask()
            await neuron.stop()
            assert not await ask()
            assert not node(fleet).healthy
            await neuron.start()
            assert await ask()
            assert node(fleet).healthy


async def test_a_node_whose_events_come_in_is_not_lost_by_a_refused_connection() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with polling(neuron) as (fleet, ask):
            await ask()
            fleet.record_subscribed("a", True)
            await neuron.stop()
            await ask()
            assert (node(fleet).healthy, node(fleet).failures) == (True, 1)


async def test_an_unreachable_node_never_becomes_healthy_and_says_why() -> None:
    neuron = MockNeuron()
    await neuron.start()
    await neuron.stop()
    async with polling(neuron) as (fleet, ask):
        await ask()
        assert not node(fleet).healthy
        assert "node a cannot be reached" in (node(fleet).failure or "")


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
