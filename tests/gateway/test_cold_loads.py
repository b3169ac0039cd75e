"""Cold models: one load for all, keep-alives meanwhile, room made by eviction."""

import asyncio

import msgspec
import pytest

from cortex.core.catalogue import Catalogue, CatalogueModel
from cortex.core.neuron_api import LoadProgress, LoadRequest
from cortex.core.openai import KEEPALIVE
from cortex.gateway.loads import load_deadline_s
from tests.support.gateway import run_gateway
from tests.support.mock_neuron import GIB, MockModel, MockNeuron


async def test_a_cold_model_is_loaded_by_its_first_request() -> None:
    async with MockNeuron(MockModel("m")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, poll_s=60) as gateway:
            response = await gateway.chat()
            assert response.status == 200
            assert neuron.loads == [LoadRequest(model_id="m")]
            response = await gateway.chat()
            assert response.status == 200
            assert len(neuron.loads) == 1


async def test_a_catalogue_model_is_loaded_with_what_the_catalogue_says() -> None:
    listed = Catalogue(models=[CatalogueModel(id="m", source="hf:org/m")], aliases={"x": "m"})
    async with MockNeuron() as neuron:
        async with run_gateway({"a": neuron.endpoint}, catalogue=listed) as gateway:
            neuron.models["m"] = MockModel("m")
            response = await gateway.chat("x")
            assert response.status == 200
            expected = LoadRequest(model_id="m", source="hf:org/m")
            assert neuron.loads == [expected]


async def test_fifty_requests_for_one_cold_model_cause_one_load() -> None:
    gate = asyncio.Event()
    async with MockNeuron(MockModel("m", load_gate=gate)) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            async with asyncio.TaskGroup() as tasks:
                calls = [
                    tasks.create_task(gateway.chat(stream=number % 2 == 0)) for number in range(50)
                ]
                await neuron.until(lambda: len(neuron.loads) == 1)
                gate.set()
            assert {call.result().status for call in calls} == {200}
            assert len(neuron.loads) == 1


async def test_two_models_load_at_the_same_time() -> None:
    gate = asyncio.Event()
    models = MockModel("m", load_gate=gate), MockModel("n", load_gate=gate)
    async with MockNeuron(*models) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            async with asyncio.TaskGroup() as tasks:
                calls = [tasks.create_task(gateway.chat(name)) for name in ("m", "n")]
                await neuron.until(lambda: len(neuron.loads) == 2)
                gate.set()
            assert [call.result().status for call in calls] == [200, 200]


async def test_a_cold_stream_has_its_first_byte_before_the_load_ends() -> None:
    gate = asyncio.Event()
    async with MockNeuron(MockModel("m", load_gate=gate)) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            async with gateway.open_chat() as response:
                assert response.status == 200
                assert await response.content.readany() == KEEPALIVE
                gate.set()
                assert (await response.content.read()).endswith(b"data: [DONE]\n\n")


async def test_a_caller_that_leaves_does_not_stop_the_load() -> None:
    gate = asyncio.Event()
    model = MockModel("m", load_gate=gate)
    async with MockNeuron(model) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            async with gateway.open_chat() as response:
                assert await response.content.readany() == KEEPALIVE
            response.close()
            gate.set()
            await neuron.until(lambda: model.status == "loaded")
            assert (await gateway.chat()).status == 200
            assert len(neuron.loads) == 1


async def test_a_caller_who_does_not_stream_gets_503_with_the_progress_and_the_load_goes_on() -> (
    None
):
    gate = asyncio.Event()
    progress = LoadProgress(phase="weights", bytes_done=1, bytes_total=4, seconds_left=12)
    model = MockModel("m", load_gate=gate, progress=progress)
    async with MockNeuron(model) as neuron:
        async with run_gateway({"a": neuron.endpoint}, cold_wait_s=0.3, poll_s=0.02) as gateway:
            response = await gateway.chat()
            assert response.status == 503
            assert response.headers["retry-after"] == "12"
            error = (await response.json())["error"]
            assert error["code"] == "model_loading"
            assert error["node"] == "a"
            assert error["progress"] == {
                "phase": "weights",
                "bytes_done": 1,
                "bytes_total": 4,
                "seconds_left": 12.0,
            }
            gate.set()
            assert (await gateway.chat()).status == 200
            assert len(neuron.loads) == 1


async def test_a_load_that_fails_reaches_every_waiter_with_its_cause() -> None:
    model = MockModel("m", load_refusal=(503, "load_failed"))
    async with MockNeuron(model) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            async with asyncio.TaskGroup() as tasks:
                calls = [tasks.create_task(gateway.chat(stream=True)) for _ in range(3)]
            for call in calls:
                response = call.result()
                assert response.status == 503
                assert (await response.json())["error"]["message"] == (
                    "model 'm' could not be loaded on a: the mock refuses"
                )


async def test_a_load_that_fails_on_one_node_is_tried_on_the_next() -> None:
    broken = MockModel("m", load_refusal=(422, "unreadable_checkpoint"))
    async with MockNeuron(broken) as first, MockNeuron(MockModel("m")) as second:
        async with run_gateway({"a": first.endpoint, "b": second.endpoint}) as gateway:
            assert (await gateway.chat()).status == 200
            assert (len(first.loads), len(second.loads)) == (1, 1)


async def test_a_load_that_fails_after_the_first_byte_is_an_error_event() -> None:
    gate = asyncio.Event()
    async with MockNeuron(MockModel("m", load_gate=gate)) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            async with gateway.open_chat() as response:
                assert await response.content.readany() == KEEPALIVE
                await neuron.stop()
                events = (await response.content.read()).strip().split(b"\n\n")
            error = msgspec.json.decode(events[-1].removeprefix(b"data: "))["error"]
            assert error["code"] == "upstream_connection_error"


async def test_a_request_that_would_be_refused_does_not_load_anything() -> None:
    async with MockNeuron(MockModel("m")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            for stream in (False, True):
                response = await gateway.chat(messages=[], stream=stream)
                assert response.status == 400
                assert (await response.json())["error"]["type"] == "invalid_request_error"
            assert neuron.loads == []


async def test_the_least_recently_used_model_makes_room() -> None:
    models = [MockModel(name, "loaded", 10 * GIB) for name in ("old", "new")]
    async with MockNeuron(
        *models, MockModel("m", memory_bytes=8 * GIB), total_bytes=24 * GIB
    ) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            assert (await gateway.chat("old")).status == 200
            assert (await gateway.chat("new")).status == 200
            assert (await gateway.chat()).status == 200
            assert [each.evict for each in neuron.loads] == [[], ["old"]]
            assert [models[0].status, models[1].status] == ["unloaded", "loaded"]
            assert (await gateway.metrics())["cortex_evictions_total"] == 1


async def test_a_use_keeps_the_older_model_from_being_the_victim() -> None:
    models = [MockModel(name, "loaded", 10 * GIB) for name in ("old", "new")]
    async with MockNeuron(
        *models, MockModel("m", memory_bytes=8 * GIB), total_bytes=24 * GIB
    ) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            for name in ("old", "new", "old", "m"):
                assert (await gateway.chat(name)).status == 200
            assert neuron.loads[-1].evict == ["new"]


async def test_priority_strategy_takes_the_lowest_priority_first() -> None:
    listed = Catalogue(models=[CatalogueModel(id="low", residency_priority=1)])
    models = [MockModel(name, "loaded", 10 * GIB) for name in ("other", "low")]
    async with MockNeuron(
        *models, MockModel("m", memory_bytes=8 * GIB), total_bytes=24 * GIB
    ) as neuron:
        async with run_gateway(
            {"a": neuron.endpoint}, catalogue=listed, strategy="priority"
        ) as gateway:
            for name in ("other", "low", "m"):
                assert (await gateway.chat(name)).status == 200
            assert neuron.loads[-1].evict == ["low"]


async def test_a_pinned_model_is_never_evicted_and_the_caller_learns_what_is_missing() -> None:
    listed = Catalogue(models=[CatalogueModel(id="pinned", pinned_on=["a"])])
    models = MockModel("pinned", "loaded", 20 * GIB), MockModel("m", memory_bytes=8 * GIB)
    async with MockNeuron(*models, total_bytes=24 * GIB) as neuron:
        async with run_gateway({"a": neuron.endpoint}, catalogue=listed) as gateway:
            response = await gateway.chat()
            assert response.status == 503
            error = (await response.json())["error"]
            assert error["code"] == "load_failed"
            assert error["message"].startswith("model 'm' needs 8.0 GiB on a, 4.0 free")
            assert models[0].status == "loaded"


async def test_nothing_to_evict_on_a_node_that_is_too_small() -> None:
    async with MockNeuron(MockModel("m", memory_bytes=80 * GIB), total_bytes=24 * GIB) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            response = await gateway.chat()
            assert response.status == 503
            assert len(neuron.loads) == 1


async def test_a_node_too_full_is_left_for_one_with_room() -> None:
    listed = Catalogue(models=[CatalogueModel(id="pinned", pinned_on=["a"])])
    full = [MockModel("pinned", "loaded", 20 * GIB), MockModel("m", memory_bytes=8 * GIB)]
    async with MockNeuron(*full, total_bytes=24 * GIB) as first:
        async with MockNeuron(MockModel("m", memory_bytes=8 * GIB)) as second:
            nodes = {"a": first.endpoint, "b": second.endpoint}
            async with run_gateway(nodes, catalogue=listed) as gateway:
                assert (await gateway.chat()).status == 200
                assert (len(first.loads), len(second.loads)) == (0, 1)


async def test_a_load_waits_for_a_busy_resident_instead_of_cutting_it_off() -> None:
    gate = asyncio.Event()
    busy = MockModel("busy", "loaded", 20 * GIB, first_gate=gate)
    async with MockNeuron(
        busy, MockModel("m", memory_bytes=8 * GIB), total_bytes=24 * GIB
    ) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            gateway.apps.loads.room_retry_s = 0.01
            async with asyncio.TaskGroup() as tasks:
                first = tasks.create_task(gateway.chat("busy"))
                await neuron.until(lambda: busy.in_flight == 1)
                second = tasks.create_task(gateway.chat())
                await neuron.until(lambda: len(neuron.loads) >= 3)
                assert busy.status == "loaded"
                gate.set()
            assert (first.result().status, second.result().status) == (200, 200)
            assert busy.status == "unloaded"


async def test_models_come_and_go_for_many_cycles() -> None:
    models = [MockModel(name, memory_bytes=20 * GIB) for name in ("m", "n")]
    async with MockNeuron(*models, total_bytes=24 * GIB) as neuron:
        async with run_gateway({"a": neuron.endpoint}, poll_s=60) as gateway:
            for _ in range(5):
                assert (await gateway.chat("m")).status == 200
                assert (await gateway.chat("n")).status == 200
            assert len([each for each in neuron.loads if each.evict]) == 9
            assert (await gateway.metrics())["cortex_evictions_total"] == 9
            assert [model.status for model in models] == ["unloaded", "loaded"]


async def test_a_load_that_no_retry_can_mend_keeps_the_nodes_status_and_code() -> None:
    model = MockModel("m", load_refusal=(422, "unreadable_checkpoint"))
    async with MockNeuron(model) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            response = await gateway.chat()
            assert response.status == 422
            assert "retry-after" not in response.headers
            assert (await response.json())["error"]["code"] == "unreadable_checkpoint"


async def test_a_model_that_is_loading_is_not_evicted() -> None:
    gate = asyncio.Event()
    first = MockModel("first", memory_bytes=20 * GIB, load_gate=gate)
    async with MockNeuron(
        first, MockModel("m", memory_bytes=8 * GIB), total_bytes=24 * GIB
    ) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            gateway.apps.loads.room_retry_s = 0.01
            async with asyncio.TaskGroup() as tasks:
                earlier = tasks.create_task(gateway.chat("first"))
                await neuron.until(lambda: first.status == "loading")
                later = tasks.create_task(gateway.chat())
                await neuron.until(lambda: len(neuron.loads) >= 4)
                assert [each.evict for each in neuron.loads] == [[]] * len(neuron.loads)
                gate.set()
                assert (await earlier).status == 200
            assert later.result().status == 200


@pytest.mark.parametrize(
    ("weight_bytes", "measured", "limit_s"),
    [
        (None, 1e9, 3600.0),
        (0, None, 300.0),
        (1000 << 20, None, 400.0),
        (1000 << 20, 50 << 20, 400.0),
        (1000 << 20, 500 << 20, 320.0),
        (1000 << 20, 1 << 40, 310.0),
    ],
)
def test_a_loads_deadline_grows_with_its_weights_and_shrinks_with_the_measured_rate(
    weight_bytes: int | None, measured: float | None, limit_s: float
) -> None:
    assert load_deadline_s(weight_bytes, measured) == limit_s
