"""Watching nodes over real sockets: events, polling where there are none, and what is missed."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from cortex.core.catalogue import Catalogue
from cortex.core.config import GatewayConfig, GatewayListen
from cortex.gateway.fleet import Fleet, NodeView
from cortex.gateway.live import Live
from cortex.gateway.neuron_client import open_client
from cortex.gateway.watch import Watch
from tests.support import virtual_time
from tests.support.mock_neuron import MockModel, MockNeuron


@asynccontextmanager
async def watching(
    *neurons: MockNeuron, poll_s: float = 60, **limits: Any
) -> AsyncIterator[tuple[Fleet, Watch]]:
    """A watch over nodes `a`, `b`, ... on the loop's clock, after its first round."""
    clock = asyncio.get_running_loop().time
    fleet = Fleet(
        ((name, each.endpoint) for name, each in zip("abc", neurons, strict=False)), clock
    )
    live = Live(GatewayConfig(gateway=GatewayListen(poll_s=poll_s)), Catalogue())
    async with open_client(1.0) as client, asyncio.TaskGroup() as tasks:
        watch = Watch(client, fleet, live, tasks=tasks, clock=clock, **limits)
        watch.sync()
        await watch.first_round()
        try:
            yield fleet, watch
        finally:
            watch.cancel()


def node(fleet: Fleet, name: str = "a") -> NodeView:
    view = fleet.snapshot().node(name)
    assert view is not None
    return view


async def seen(test: Callable[[], object], limit_s: float = 10) -> float:
    """Wait until `test()` holds; return how long that took."""
    clock = asyncio.get_running_loop().time
    begun_s = clock()
    async with asyncio.timeout(limit_s):
        while not test():
            await asyncio.sleep(0.002)
    return clock() - begun_s


async def test_what_changes_on_a_node_is_known_without_a_poll() -> None:
    async with MockNeuron(MockModel("m"), MockModel("n"), events=True) as neuron:
        async with watching(neuron) as (fleet, _):
            await seen(lambda: node(fleet).subscribed)
            neuron.set_status("m", "loaded")
            neuron.models["m"].reported_in_flight = 3
            del neuron.models["n"]
            neuron.models["new"] = MockModel("new")
            await neuron.changed()
            await seen(lambda: node(fleet).loads.get("m") is not None)
            await seen(lambda: "new" in node(fleet).models)
            assert sorted(node(fleet).models) == ["m", "new"]
            assert node(fleet).status("m") == "loaded"
            assert node(fleet).foreign["m"] == 3
            neuron.status = "draining"
            await neuron.changed()
            await seen(lambda: not node(fleet).usable)
            assert node(fleet).healthy


async def test_a_node_without_events_is_polled() -> None:
    async with MockNeuron(MockModel("m")) as neuron:
        async with watching(neuron, poll_s=0.01) as (fleet, _):
            assert not node(fleet).subscribed
            neuron.set_status("m", "loaded")
            await seen(lambda: node(fleet).status("m") == "loaded")
            assert node(fleet).failure is None


def test_a_node_with_events_is_only_polled_now_and_then() -> None:
    async def watched() -> int:
        async with MockNeuron(MockModel("m"), events=True) as neuron:
            async with watching(neuron, poll_s=0.5) as (fleet, _):
                await seen(lambda: node(fleet).subscribed)
                before = neuron.polls
                await asyncio.sleep(65)
                return neuron.polls - before

    assert virtual_time.run(watched()) == 6


async def test_events_that_were_cut_off_go_on_where_they_ended() -> None:
    async with MockNeuron(MockModel("m"), events=True) as neuron:
        async with watching(neuron) as (fleet, _):
            await seen(lambda: node(fleet).subscribed)
            neuron.feed.cut()
            neuron.set_status("m", "loaded")
            await seen(lambda: node(fleet).status("m") == "loaded")
            assert node(fleet).healthy
            await seen(lambda: len(neuron.feed.asked) == 2)
            assert [each[:3] for each in neuron.feed.asked] == ["", "e1-"]
            assert neuron.feed.snapshots == 1


async def test_a_node_that_was_restarted_is_read_anew() -> None:
    async with MockNeuron(MockModel("m", "loaded"), events=True) as neuron:
        async with watching(neuron) as (fleet, _):
            await seen(lambda: node(fleet).subscribed)
            await neuron.stop()
            await seen(lambda: not node(fleet).healthy)
            neuron.feed.epoch = "e2"
            neuron.models = {"other": MockModel("other", "loaded")}
            await neuron.start()
            await seen(lambda: node(fleet).healthy and node(fleet).subscribed)
            assert list(node(fleet).models) == ["other"]


async def test_a_dead_nodes_models_leave_the_routing_at_once_and_return_with_it() -> None:
    async with MockNeuron(MockModel("m", "loaded"), events=True) as neuron:
        async with watching(neuron) as (fleet, _):
            await seen(lambda: node(fleet).subscribed)
            await neuron.stop()
            assert await seen(lambda: not node(fleet).usable) < 1
            assert "nobody listens" in (node(fleet).failure or "")
            await neuron.start()
            assert await seen(lambda: node(fleet).usable) < 2


def test_a_cut_cable_is_noticed_within_five_seconds() -> None:
    async def cut() -> tuple[float, bool]:
        async with MockNeuron(MockModel("m", "loaded"), events=True) as neuron:
            async with watching(neuron) as (fleet, _):
                await seen(lambda: node(fleet).subscribed)
                neuron.faults.is_silent = True
                noticed_s = await seen(lambda: not node(fleet).usable)
                neuron.faults.clear()
                await seen(lambda: node(fleet).usable, 30)
                return noticed_s, node(fleet).healthy

    noticed_s, is_back = virtual_time.run(cut())
    assert 2 < noticed_s < 5
    assert is_back


def test_a_silent_link_alone_does_not_lose_a_node_that_answers() -> None:
    async def mute() -> bool:
        async with MockNeuron(MockModel("m", "loaded"), events=True) as neuron:
            async with watching(neuron) as (fleet, _):
                await seen(lambda: node(fleet).subscribed)
                neuron.feed.is_mute = True
                usable = True
                for _ in range(400):
                    await asyncio.sleep(0.025)
                    usable = usable and node(fleet).usable
                return usable and not node(fleet).subscribed

    assert virtual_time.run(mute())


@pytest.mark.parametrize(
    "raw",
    [b"event: model\ndata: not json\n\n", b'event: load\ndata: {"id":1}\n\n'],
)
async def test_events_that_are_not_the_protocol_are_dropped_for_polls(raw: bytes) -> None:
    async with MockNeuron(MockModel("m", "loaded"), events=True) as neuron:
        async with watching(neuron) as (fleet, _):
            await seen(lambda: node(fleet).subscribed)
            polls = neuron.polls
            neuron.feed.raw.append(raw)
            await neuron.changed()
            await neuron.until(lambda: neuron.polls > polls)
            await seen(lambda: len(neuron.feed.asked) >= 2)
            assert node(fleet).usable


async def test_an_event_of_a_later_version_is_passed_over() -> None:
    async with MockNeuron(MockModel("m"), events=True) as neuron:
        async with watching(neuron) as (fleet, _):
            await seen(lambda: node(fleet).subscribed)
            neuron.feed.raw.append(b'id: e1-1\nevent: weather\ndata: {"sky":"blue"}\n\n')
            neuron.set_status("m", "loaded")
            await neuron.changed()
            await seen(lambda: node(fleet).status("m") == "loaded")
            assert neuron.feed.asked == [""]


async def test_a_node_is_asked_at_once_when_poked() -> None:
    async with MockNeuron(MockModel("m")) as neuron, watching(neuron) as (fleet, watch):
        assert node(fleet).healthy
        before = neuron.polls
        watch.poke("a")
        watch.poke("no such node")
        await neuron.until(lambda: neuron.polls == before + 1)


async def test_a_hanging_node_does_not_hold_up_the_others() -> None:
    async with MockNeuron() as slow, MockNeuron(MockModel("m")) as quick:
        slow.control_fault = "hang"
        async with watching(slow, quick, poll_s=0.01) as (fleet, _):
            await quick.until(lambda: quick.polls >= 3)
            assert [each.healthy for each in fleet.snapshot().nodes] == [False, True]


async def test_nodes_that_come_and_go_in_the_fleet_are_watched_and_left() -> None:
    async with MockNeuron(events=True) as first, MockNeuron(MockModel("m"), events=True) as second:
        async with watching(first) as (fleet, watch):
            await first.until(lambda: first.feed.subscribers == 1)
            fleet.set_nodes([("b", second.endpoint)])
            watch.sync()
            await second.until(lambda: second.feed.subscribers == 1)
            await seen(lambda: first.feed.subscribers == 0)
            await seen(lambda: node(fleet, "b").healthy)
            assert [each.name for each in fleet.snapshot().nodes] == ["b"]
