"""Policies of models.toml and cortex.toml at work: aliases, virtual models, groups, residency."""

import asyncio

from cortex.core.catalogue import Catalogue, CatalogueModel
from cortex.core.neuron_api import LoadRequest
from tests.support.gateway import run_gateway
from tests.support.mock_neuron import GIB, MockModel, MockNeuron

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


async def test_a_pattern_serves_every_name_an_agent_may_ask_for() -> None:
    listed = Catalogue(aliases={"claude-*": "m"})
    async with MockNeuron(MockModel("m", "loaded"), MockModel("claude-own", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, catalogue=listed) as gateway:
            for name in ("claude-sonnet-5", "claude-own"):
                assert (await gateway.chat(name)).status == 200
            assert [each.json["model"] for each in neuron.seen] == ["m", "claude-own"]
            listing = await (await gateway.get("/v1/models")).json()
            assert [each["id"] for each in listing["data"]] == ["claude-own", "m"]
            card = await (await gateway.get("/v1/models/claude-opus-5")).json()
            assert (card["id"], card["loaded"]) == ("claude-opus-5", True)


async def test_a_virtual_model_goes_to_its_first_loaded_member_and_loads_the_first_otherwise() -> (
    None
):
    listed = Catalogue(virtual={"coder": ["big", "small"]})
    big, small = MockModel("big"), MockModel("small", "loaded")
    async with MockNeuron(big, small) as neuron:
        async with run_gateway({"a": neuron.endpoint}, catalogue=listed, poll_s=0.02) as gateway:
            assert (await gateway.chat("coder")).status == 200
            assert neuron.loads == []
            small.status = "unloaded"
            polls = neuron.polls
            await neuron.until(lambda: neuron.polls >= polls + 2)
            assert (await gateway.chat("coder")).status == 200
            assert [each.json["model"] for each in neuron.seen] == ["small", "big"]
            assert [each.model_id for each in neuron.loads] == ["big"]
            listing = await (await gateway.get("/v1/models")).json()
            assert [each["id"] for each in listing["data"]] == ["big", "coder", "small"]


async def test_members_of_a_group_take_turns_on_a_node() -> None:
    listed = Catalogue(groups={"g": ["m", "n"]})
    models = [MockModel(name, memory_bytes=GIB) for name in ("m", "n")]
    async with MockNeuron(*models) as neuron:
        async with run_gateway({"a": neuron.endpoint}, catalogue=listed) as gateway:
            assert (await gateway.chat("m")).status == 200
            assert (await gateway.chat("n")).status == 200
            assert [each.evict for each in neuron.loads] == [[], ["m"]]
            assert [each.status for each in models] == ["unloaded", "loaded"]


async def test_members_of_a_group_that_are_asked_for_together_are_never_resident_together() -> None:
    listed = Catalogue(groups={"g": ["m", "n"]})
    models = [MockModel(name, memory_bytes=GIB) for name in ("m", "n")]
    together = False

    def both() -> bool:
        nonlocal together
        together = together or all(each.holds_memory for each in models)
        return len(neuron.seen) == 2

    async with MockNeuron(*models) as neuron:
        async with run_gateway({"a": neuron.endpoint}, catalogue=listed) as gateway:
            gateway.apps.loads.room_retry_s = 0.01
            async with asyncio.TaskGroup() as tasks:
                calls = [tasks.create_task(gateway.chat(name)) for name in ("m", "n")]
                await neuron.until(both)
            assert [call.result().status for call in calls] == [200, 200]
            assert not together


async def test_a_member_of_a_group_waits_for_another_at_work_and_gives_up_in_the_end() -> None:
    gate = asyncio.Event()
    listed = Catalogue(groups={"g": ["m", "n"]})
    models = [MockModel("m", "loaded", first_gate=gate), MockModel("n")]
    async with MockNeuron(*models) as neuron:
        async with run_gateway({"a": neuron.endpoint}, catalogue=listed) as gateway:
            gateway.apps.loads.room_retry_s = 0.01
            gateway.apps.loads.room_wait_s = 0.05
            async with asyncio.TaskGroup() as tasks:
                at_work = tasks.create_task(gateway.chat("m"))
                await neuron.until(lambda: models[0].in_flight == 1)
                response = await gateway.chat("n")
                assert response.status == 503
                message = (await response.json())["error"]["message"]
                assert message == (
                    "model 'n' may not be on a beside others of its group, and they cannot leave: "
                    "m has 1 requests in hand; try again later"
                )
                assert neuron.loads == []
                gate.set()
            assert at_work.result().status == 200
            assert (await gateway.chat("n")).status == 200


async def test_a_model_inside_its_minimum_residency_is_not_evicted() -> None:
    models = MockModel("young", memory_bytes=20 * GIB), MockModel("m", memory_bytes=8 * GIB)
    async with MockNeuron(*models, total_bytes=24 * GIB) as neuron:
        residency = {"min_resident_s": 300.0, "ttl_s": 900.0}
        async with run_gateway({"a": neuron.endpoint}, eviction=residency) as gateway:
            gateway.apps.loads.room_wait_s = 0.0
            assert (await gateway.chat("young")).status == 200
            assert (neuron.loads[0].min_resident_s, neuron.loads[0].ttl_s) == (300, 900)
            assert (await gateway.chat("m")).status == 503
            assert models[0].status == "loaded"


async def test_what_the_catalogue_says_of_residency_goes_to_the_neuron_with_the_load() -> None:
    listed = Catalogue(
        models=[CatalogueModel(id="m", pinned_on=["a"], ttl_s=60, residency_priority=7)]
    )
    async with MockNeuron(MockModel("m")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, catalogue=listed) as gateway:
            assert (await gateway.chat()).status == 200
            (wish,) = neuron.loads
            assert wish == LoadRequest(model_id="m", ttl_s=60, pinned=True, priority=7)


async def test_a_long_queue_has_a_further_replica_loaded_while_nobody_waits_for_it() -> None:
    crowded = MockModel("m", "loaded", reported_in_flight=500)
    async with MockNeuron(crowded) as first, MockNeuron(MockModel("m")) as second:
        nodes = {"a": first.endpoint, "b": second.endpoint}
        async with run_gateway(nodes, poll_s=0.02) as gateway:
            response = await gateway.post("/v1/chat/completions", CHAT, **{"x-request-id": "r"})
            assert response.status == 200
            assert len(first.seen) == 1
            await second.until(lambda: second.models["m"].status == "loaded")
            why = await (await gateway.get("/why/r")).json()
            assert why["steps"][0]["further"] == "b"
            polls = second.polls
            await second.until(lambda: second.polls >= polls + 2)
            assert (await gateway.chat()).status == 200
            assert len(second.seen) == 1
