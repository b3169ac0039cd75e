"""Engines that have lived through many loads and unloads are started again, one by one."""

import asyncio
import logging

import pytest

from cortex.core.neuron_api import HostMemory, LoadProgress, NeuronHealth
from cortex.gateway.defrag import due, free_mb
from tests.support.fleet_views import fleet_of, model, view
from tests.support.gateway import run_gateway
from tests.support.mock_neuron import GIB, MockModel, MockNeuron


def names(*models: object, after: int = 10) -> list[str]:
    return [each.model_id for each in due(fleet_of(view("a", *models)), after)]  # type: ignore[arg-type]


def test_the_longest_lived_engine_over_the_limit_is_due() -> None:
    assert names(
        model("short", engine_cycles=10, resident_s=50.0),
        model("long", engine_cycles=12, resident_s=90.0),
        model("young", engine_cycles=9, resident_s=99.0),
    ) == ["long"]


def test_nothing_is_due_by_default() -> None:
    assert names(model("m", engine_cycles=1000), after=0) == []


def test_an_engine_at_work_is_left_alone() -> None:
    assert names(model("m", engine_cycles=99, in_flight=1)) == []
    node = view("a", model("m", engine_cycles=99))
    assert due(fleet_of(node, leases={("a", "m"): 1}), 10) == []


@pytest.mark.parametrize(
    "other",
    [
        model("x", "loading"),
        model("x", "draining"),
        model("x", "recovering"),
        model("x", "loaded", progress=LoadProgress()),  # being recycled
    ],
)
def test_one_at_a_time_on_a_node(other: object) -> None:
    assert names(model("m", engine_cycles=99), other) == []


def test_free_memory_is_that_of_all_devices_or_of_the_host() -> None:
    health = view("a", devices={0: (24, 1), 1: (24, 2)}).health
    assert health is not None
    assert free_mb(health) == 3072
    host = HostMemory(free_bytes=GIB, total_bytes=2 * GIB)
    assert free_mb(NeuronHealth(uptime_secs=1, host=host)) == 1024
    assert free_mb(NeuronHealth(uptime_secs=1)) is None


async def test_an_engine_is_recycled_after_so_many_loads_and_unloads(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "cortex.gateway.defrag")
    stays = MockModel("stays", "loaded", GIB)
    models = [MockModel(name, memory_bytes=20 * GIB) for name in ("m", "n")]
    async with MockNeuron(stays, *models, total_bytes=24 * GIB) as neuron:
        eviction = {"defrag_after_cycles": 4}
        async with run_gateway({"a": neuron.endpoint}, eviction=eviction, poll_s=0.02) as gateway:
            for name in ("m", "n"):
                assert (await gateway.chat(name)).status == 200
            assert neuron.recycled == []  # three so far: m in, m out, n in
            assert (await gateway.chat("m")).status == 200
            await neuron.until(lambda: neuron.recycled)
            assert neuron.recycled == ["stays"]
            while "cortex_model_recycles_total" not in "".join(await gateway.metrics()):
                await asyncio.sleep(0)
    (record,) = [each for each in caplog.records if each.message == "recycled stays on a"]
    assert record.free_before_mb == record.free_after_mb == 3072  # type: ignore[attr-defined]


async def test_two_gateways_recycle_an_engine_once() -> None:
    model = MockModel("m", "loaded")
    async with MockNeuron(model, MockModel("n")) as neuron:
        neuron.cycles = 50
        eviction = {"defrag_after_cycles": 50}
        nodes = {"a": neuron.endpoint}
        async with (
            run_gateway(nodes, eviction=eviction, poll_s=0.02),
            run_gateway(nodes, eviction=eviction, poll_s=0.02),
        ):
            await neuron.until(lambda: neuron.recycled)
            polls = neuron.polls
            await neuron.until(lambda: neuron.polls >= polls + 10)
            assert 1 <= len(neuron.recycled) <= 2
