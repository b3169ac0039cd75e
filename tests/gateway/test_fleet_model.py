"""Whole gateways over a fleet that everything happens to, in orders that nobody thought of.

Two gateways share three nodes without sockets, in virtual time. Whatever order requests, loads,
evictions, losses, returns, drains and leaving callers come in: no gateway loads a model twice at
once, nobody is evicted who is pinned or at work, memory is never overbooked, everybody gets an
answer, and afterwards the fleet serves every model again.
"""

import asyncio
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cortex.core.catalogue import Catalogue, CatalogueModel
from cortex.core.neuron_api import LoadRequest
from cortex.gateway.app import GatewayApps
from tests.support.memory_fleet import Call, MemoryHost, memory_gateway
from tests.support.mock_neuron import GIB, MockModel
from tests.support.mock_neuron.faults import FaultCommand
from tests.support.mock_neuron.node import Node
from tests.support.virtual_time import NO_SETTLE_S, VirtualTimeLoop

SIZES_GIB = {"pin": 6, "big": 14, "mid": 11, "small": 5}
ROOM_GIB = 16
NODES = "abc"
# Only its pin keeps the pinned model from making room for the others.
CATALOGUE = Catalogue(
    models=[
        CatalogueModel(id="pin", pinned_on=["a"]),
        CatalogueModel(id="mid", residency_priority=1000),
        CatalogueModel(id="big", residency_priority=1000),
        CatalogueModel(id="small", ttl_s=10),
    ]
)
# Longer than every hold, breaker, cool-down and wait for room.
SETTLED_S = 90
LIMIT_S = 2000

nodes = st.sampled_from(NODES)
models = st.sampled_from(list(SIZES_GIB))
gateways = st.integers(0, 1)


def make_node() -> Node:
    """A node with every model on its disk; loads run at 2 GiB/s."""
    return Node(
        *(
            MockModel(name, memory_bytes=size * GIB, load_bytes_s=2.0 * GIB)
            for name, size in SIZES_GIB.items()
        ),
        total_bytes=ROOM_GIB * GIB,
    )


class FleetMachine(RuleBasedStateMachine):
    """What can happen to a fleet."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualTimeLoop(NO_SETTLE_S)
        self.wrong: list[str] = []
        self.calls: list[tuple[Call, asyncio.Task[None]]] = []
        self.loading: dict[tuple[int, str], int] = {}
        self.apps: list[GatewayApps] = []
        self.ends: list[asyncio.Event] = []
        self.running: list[asyncio.Task[None]] = []
        self.hosts: dict[str, MemoryHost] = {}

    @initialize()
    def start(self) -> None:
        self._do(self._start())

    async def _start(self) -> None:
        self.hosts = {name: MemoryHost(name, make_node) for name in NODES}
        for number in range(2):
            ready: asyncio.Future[GatewayApps] = self.loop.create_future()
            end = asyncio.Event()
            self.ends.append(end)
            self.running.append(self.loop.create_task(self._gateway(number, ready, end)))
            self.apps.append(await ready)

    async def _gateway(
        self, number: int, ready: "asyncio.Future[GatewayApps]", end: asyncio.Event
    ) -> None:
        def on_load(node: str, wish: LoadRequest, change: int) -> None:
            self._note_load(number, node, wish, change)

        async with memory_gateway(self.hosts, CATALOGUE, on_load) as apps:
            ready.set_result(apps)
            await end.wait()

    def _note_load(self, number: int, node: str, wish: LoadRequest, change: int) -> None:
        key = (number, wish.model_id)
        self.loading[key] = self.loading.get(key, 0) + change
        if self.loading[key] > 1:
            self.wrong.append(f"gateway {number} loads {wish.model_id} twice at once")
        if change < 0:
            return
        leases = self.apps[number].fleet.snapshot().leases if number < len(self.apps) else {}
        for victim in wish.evict:
            if leases.get((node, victim)):
                self.wrong.append(f"gateway {number} evicts {victim}, which it is using on {node}")
            if (node, victim) == ("a", "pin"):
                self.wrong.append("the pinned model is to be evicted")

    def _do(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def _ask(self, gateway: int, model: str, tenths: int, *, stream: bool, path: str) -> Call:
        body = {
            "model": model,
            "stream": stream,
            "max_tokens": tenths,
            "messages": [{"role": "user", "content": f"{model} {tenths}"}],
        }
        call = Call(self.apps[gateway].api, path, body)
        self.calls.append((call, self.loop.create_task(call.run())))
        return call

    @rule(
        gateway=gateways,
        model=models,
        tenths=st.sampled_from([1, 20, 300]),
        stream=st.booleans(),
        path=st.sampled_from(["/v1/chat/completions", "/v1/messages"]),
        number=st.sampled_from([1, 1, 3]),
    )
    def ask(
        self, gateway: int, model: str, tenths: int, stream: bool, path: str, number: int
    ) -> None:
        for _ in range(number):
            self._ask(gateway, model, tenths, stream=stream, path=path)
        self._do(asyncio.sleep(0.01))

    @rule(which=st.integers(0, 1 << 16))
    def leave(self, which: int) -> None:
        waiting = [call for call, _ in self.calls if not call.is_done]
        if waiting:
            waiting[which % len(waiting)].left.set()
            self._do(asyncio.sleep(0.01))

    @rule(seconds=st.sampled_from([0.05, 1.0, 4.0, 15.0]))
    def wait(self, seconds: float) -> None:
        self._do(asyncio.sleep(seconds))

    @rule(name=nodes)
    def kill(self, name: str) -> None:
        if self.hosts[name].is_up:
            self._do(self.hosts[name].kill())

    @rule(name=nodes)
    def revive(self, name: str) -> None:
        if not self.hosts[name].is_up:
            self.hosts[name].revive()

    @rule(name=nodes)
    def cut(self, name: str) -> None:
        self.hosts[name].gate.clear()

    @rule(name=nodes)
    def mend(self, name: str) -> None:
        self.hosts[name].gate.set()

    @rule(name=nodes, model=models)
    def unload(self, name: str, model: str) -> None:
        node = self.hosts[name].node
        if self.hosts[name].is_up and node.models[model].status == "loaded":
            self._do(self._begin_unload(node, model))

    async def _begin_unload(self, node: Node, model: str) -> None:
        node.spawn(node.unload(model))
        await asyncio.sleep(0.01)

    @rule(name=nodes, kind=st.sampled_from(["out_of_memory", "corrupt_checkpoint"]))
    def break_loads(self, name: str, kind: Any) -> None:
        self.hosts[name].node.apply(FaultCommand(kind=kind))

    @rule(name=nodes)
    def mend_loads(self, name: str) -> None:
        self.hosts[name].node.faults.clear()

    @rule(name=nodes, model=models)
    def crash(self, name: str, model: str) -> None:
        self._do(self._crash(self.hosts[name].node, model))

    async def _crash(self, node: Node, model: str) -> None:
        node.apply(FaultCommand(kind="crash_engine", model_id=model))
        await asyncio.sleep(0.01)

    @rule(gateway=gateways, name=nodes, drained=st.booleans())
    def operator_drains(self, gateway: int, name: str, drained: bool) -> None:
        self.apps[gateway].fleet.record_drained(name, drained)

    @rule(name=nodes)
    def drain(self, name: str) -> None:
        self.hosts[name].node.status = "draining"
        self._do(self.hosts[name].node.changed())

    @rule(name=nodes)
    def undrain(self, name: str) -> None:
        self.hosts[name].node.status = "ok"
        self._do(self.hosts[name].node.changed())

    @rule(name=nodes, tries=st.integers(1, 4))
    def flap(self, name: str, tries: int) -> None:
        for _ in range(tries):
            self.hosts[name].gate.clear()
            self._do(asyncio.sleep(4))
            self.hosts[name].gate.set()
            self._do(asyncio.sleep(1))

    @invariant()
    def nothing_went_wrong(self) -> None:
        assert self.wrong == []
        for host in self.hosts.values():
            for device in host.node.devices:
                assert host.node.free_on(device.index) >= 0
            for model in host.node.models.values():
                assert model.in_flight == 0 or model.holds_memory or not host.is_up

    def teardown(self) -> None:
        try:
            if self.apps:
                self._do(self._settle())
        finally:
            self._close()

    async def _settle(self) -> None:
        """Mend everything: whoever waits is answered, and every model is served again."""
        for host in self.hosts.values():
            host.gate.set()
            if not host.is_up:
                host.revive()
            host.node.faults.clear()
            host.node.status = "ok"
            await host.node.changed()
        for apps in self.apps:
            for name in NODES:
                apps.fleet.record_drained(name, False)
        async with asyncio.timeout(LIMIT_S):
            for _, task in self.calls:
                await task
        for call, _ in self.calls:
            if not call.left.is_set():
                assert call.status in (200, 422, 502, 503, 529), (call.status, call.body)
                assert call.status != 200 or _is_proper(call.body), call.body
        await asyncio.sleep(SETTLED_S)
        for apps in self.apps:
            assert dict(apps.fleet.snapshot().leases) == {}
            assert all(node.usable for node in apps.fleet.snapshot().nodes)
        for gateway in range(2):
            for model in SIZES_GIB:
                async with asyncio.timeout(LIMIT_S):
                    call = self._ask(gateway, model, 1, stream=False, path="/v1/chat/completions")
                    await self.calls[-1][1]
                assert call.status == 200, (model, call.body)
        self.nothing_went_wrong()

    def _close(self) -> None:
        async def end() -> None:
            for each in self.ends:
                each.set()
            for task in self.running:
                await task
            for host in self.hosts.values():
                await host.close()

        self._do(end())
        self._do(self.loop.shutdown_asyncgens())
        self.loop.close()


def _is_proper(body: bytes) -> bool:
    """Whether an answer is whole, or a stream ends in its own end or in an error."""
    last = body.strip().split(b"\n\n")[-1]
    return (
        body.endswith(b"}")
        or last == b"data: [DONE]"
        or b'"message_stop"' in last
        or b'"error"' in last
    )


FleetMachine.TestCase.settings = settings(
    max_examples=50,
    stateful_step_count=40,
    deadline=None,
    # The same orders on every run; more of them are tried by hand, with more examples.
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestFleet = FleetMachine.TestCase
