"""Models that are kept loaded: which are missing, and that gateways do not fight over them."""

import asyncio

from cortex.core.catalogue import Catalogue, CatalogueModel
from cortex.core.config import GatewayConfig
from cortex.core.neuron_api import ModelInfo
from cortex.gateway.fleet import Fleet
from cortex.gateway.keeping import MAX_TRIES, Keeper, gentle, missing
from cortex.gateway.live import Live
from cortex.gateway.rates import RateBook
from cortex.gateway.router import ColdLoad, choose_route
from cortex.gateway.routing import Routing
from tests.support.fleet_views import fleet_of, model, view
from tests.support.gateway import run_gateway
from tests.support.mock_neuron import GIB, MockModel, MockNeuron

KEPT = Catalogue(models=[CatalogueModel(id="m", preload=True), CatalogueModel(id="n")])


def test_what_is_loaded_or_on_its_way_anywhere_is_not_missing() -> None:
    assert missing(fleet_of(view("a")), KEPT) == ["m"]
    for status, is_missing in {
        "loaded": False,
        "loading": False,
        "recovering": False,
        "draining": True,
        "failed": True,
        "unloaded": True,
    }.items():
        snapshot = fleet_of(view("a"), view("b", model("m", status)))
        assert bool(missing(snapshot, KEPT)) is is_missing, status


def test_what_is_kept_displaces_only_lower_priorities() -> None:
    listed = Catalogue(
        models=[
            CatalogueModel(id="m", vram_mb=8192, preload=True),
            CatalogueModel(id="low", residency_priority=1),
        ]
    )
    snapshot = fleet_of(
        view("a", model("equal", gib=20), devices={0: (24, 1)}),
        view("b", model("low", gib=20), devices={0: (24, 1)}),
    )
    cold = choose_route(snapshot, listed, "m")
    assert isinstance(cold, ColdLoad)
    assert {plan.node for plan in cold.plans} == {"a", "b"}
    kept = gentle(snapshot, listed, cold)
    assert kept is not None
    assert [(plan.node, plan.displaces, plan.is_asked_for) for plan in kept.plans] == [
        ("b", 99, False)
    ]


class FakeLoads:
    """Notes what is begun; nothing ever comes of it."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.under_way: set[str] = set()

    def begin(self, cold: ColdLoad) -> None:
        self.begun.append(cold.plans[0].node)

    def is_loading(self, model_id: str) -> bool:
        return model_id in self.under_way


class Bench:
    """A keeper over nodes that list `m`, and a clock that goes on by the look."""

    def __init__(self, jitter: float = 0.5) -> None:
        self.now_s = 0.0
        self.fleet = Fleet([("a", "http://a"), ("b", "http://b")])
        self.report("a", "unloaded")
        live = Live(GatewayConfig(), KEPT)
        self.loads = FakeLoads()
        routing = Routing(live, self.fleet, RateBook(), clock=lambda: self.now_s)
        self.keeper = Keeper(
            live,
            self.fleet,
            routing,
            self.loads,  # type: ignore[arg-type]
            clock=lambda: self.now_s,
            jitter=lambda: jitter,
        )

    def report(self, node: str, status: str) -> None:
        info = ModelInfo(id="m", harness="torch", status=status)
        self.fleet.record_reading(node, [info], None, stamp=self.fleet.begin_reading())

    async def look_at(self, now_s: float) -> int:
        self.now_s = now_s
        await self.keeper.look()
        return len(self.loads.begun)


async def test_a_missing_model_is_loaded_after_a_while_unless_another_gateway_was_first() -> None:
    bench = Bench(jitter=0.5)
    assert await bench.look_at(0.0) == 0
    assert await bench.look_at(1.4) == 0
    assert await bench.look_at(1.6) == 1
    other = Bench(jitter=0.9)
    await other.look_at(0.0)
    other.report("a", "loading")
    assert await other.look_at(3.0) == 0


async def test_loads_that_do_not_last_are_tried_ever_later_and_not_for_ever() -> None:
    bench = Bench(jitter=0.0)
    begun_s = []
    for second in range(4000):
        if await bench.look_at(float(second)) > len(begun_s):
            begun_s.append(second)
    assert begun_s == [1, 6, 16, 36, 76, 156, 316, 616]
    assert len(begun_s) == MAX_TRIES
    # A node that joins is a reason to try again, and so is another configuration.
    bench.report("b", "unloaded")
    await bench.look_at(4000.0)
    assert await bench.look_at(4001.0) == MAX_TRIES + 1
    bench.keeper.start_over()
    await bench.look_at(4002.0)
    assert await bench.look_at(4003.0) == MAX_TRIES + 2


async def test_a_load_under_way_is_not_begun_again() -> None:
    bench = Bench(jitter=0.0)
    await bench.look_at(0.0)
    bench.loads.under_way.add("m")
    assert await bench.look_at(1.0) == 0


async def test_a_model_is_loaded_without_a_request_and_again_when_it_is_lost() -> None:
    kept = MockModel("m")
    async with MockNeuron(kept) as neuron:
        nodes = {"a": neuron.endpoint}
        async with run_gateway(nodes, catalogue=KEPT, poll_s=0.02) as gateway:
            await neuron.until(lambda: kept.status == "loaded")
            assert "cortex_cold_starts_total" not in "".join(await gateway.metrics())
            neuron.set_status("m", "unloaded")
            await neuron.changed()
            await neuron.until(lambda: kept.status == "loaded")
            assert neuron.starts == ["m", "m"]


async def test_two_gateways_load_what_both_keep_once() -> None:
    gate = asyncio.Event()
    models = [MockModel("m", load_gate=gate), MockModel("m", load_gate=gate)]
    async with MockNeuron(models[0]) as first, MockNeuron(models[1]) as second:
        nodes = {"a": first.endpoint, "b": second.endpoint}
        async with (
            run_gateway(nodes, catalogue=KEPT, poll_s=0.02),
            run_gateway(nodes, catalogue=KEPT, poll_s=0.02),
        ):
            await first.until(lambda: first.starts)
            gate.set()
            await first.until(lambda: models[0].status == "loaded")
            polls = first.polls
            await first.until(lambda: first.polls >= polls + 6)
            assert (first.starts, second.starts) == (["m"], [])


async def test_what_is_kept_does_not_take_turns_with_a_model_of_its_priority() -> None:
    models = MockModel("m", memory_bytes=20 * GIB), MockModel("n", memory_bytes=20 * GIB)
    async with MockNeuron(*models, total_bytes=24 * GIB) as neuron:
        nodes = {"a": neuron.endpoint}
        async with run_gateway(nodes, catalogue=KEPT, poll_s=0.02) as gateway:
            await neuron.until(lambda: models[0].status == "loaded")
            assert (await gateway.chat("n")).status == 200
            polls = neuron.polls
            await neuron.until(lambda: neuron.polls >= polls + 10)
            assert neuron.starts == ["m", "n"]
