"""Nodes that fail: another one is tried while the caller has seen nothing."""

import asyncio

import pytest

from tests.support.gateway import run_gateway
from tests.support.mock_neuron import MockModel, MockNeuron


def loaded(text: str = "fine", **fields: object) -> MockModel:
    return MockModel("m", "loaded", tokens=[text], **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_node_that_refuses_connections_is_left_for_another(stream: bool) -> None:
    async with MockNeuron(loaded("from a")) as first, MockNeuron(loaded("from b")) as second:
        nodes = {"a": first.endpoint, "b": second.endpoint}
        async with run_gateway(nodes, poll_s=60) as gateway:
            assert "from a" in await (await gateway.chat(stream=stream)).text()
            await first.stop()
            response = await gateway.chat(stream=stream)
            assert response.status == 200
            assert "from b" in await response.text()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", ["reset", "refusal"])
async def test_a_node_that_breaks_or_is_full_is_left_for_another(stream: bool, fault: str) -> None:
    sick = loaded(fault="reset") if fault == "reset" else loaded(refusal=(503, "queue_full"))
    async with MockNeuron(sick) as first, MockNeuron(loaded("from b")) as second:
        async with run_gateway({"a": first.endpoint, "b": second.endpoint}) as gateway:
            response = await gateway.chat(stream=stream)
            assert response.status == 200
            assert "from b" in await response.text()
            assert len(first.seen) == 1


async def test_a_refusal_after_keep_alives_is_still_tried_elsewhere() -> None:
    sick = loaded(fault="late_refusal")
    async with MockNeuron(sick) as first, MockNeuron(loaded("from b")) as second:
        async with run_gateway({"a": first.endpoint, "b": second.endpoint}) as gateway:
            text = await (await gateway.chat(stream=True)).text()
            assert "from b" in text
            assert "queue_full" not in text


async def test_a_refusal_after_keep_alives_has_the_status_of_its_code() -> None:
    async with MockNeuron(loaded(fault="late_refusal")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            response = await gateway.chat(stream=True)
            assert response.status == 503
            error = (await response.json())["error"]
            assert (error["code"], error["message"]) == ("queue_full", "the queue is full")


async def test_the_node_that_failed_is_not_asked_again() -> None:
    async with MockNeuron(loaded(fault="reset")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            response = await gateway.chat()
            assert response.status == 502
            assert (await response.json())["error"]["code"] == "upstream_connection_error"
            assert len(neuron.seen) == 1


async def test_after_the_first_byte_nothing_is_tried_again() -> None:
    async with MockNeuron(loaded(fault="die", die_after=0)) as first:
        async with MockNeuron(loaded("from b")) as second:
            async with run_gateway({"a": first.endpoint, "b": second.endpoint}) as gateway:
                text = await (await gateway.chat(stream=True)).text()
                assert "upstream_connection_error" in text
                assert second.seen == []


async def test_a_full_queue_does_not_make_another_node_load_the_model() -> None:
    full = loaded(refusal=(503, "queue_full"))
    async with MockNeuron(full) as first, MockNeuron(MockModel("m")) as second:
        async with run_gateway({"a": first.endpoint, "b": second.endpoint}) as gateway:
            response = await gateway.chat()
            assert (response.status, response.headers["retry-after"]) == (503, "7")
            assert second.loads == []


async def test_a_dead_nodes_model_is_loaded_on_another_node() -> None:
    async with MockNeuron(loaded()) as first, MockNeuron(MockModel("m")) as second:
        nodes = {"a": first.endpoint, "b": second.endpoint}
        async with run_gateway(nodes, poll_s=60) as gateway:
            await first.stop()
            response = await gateway.chat()
            assert response.status == 200
            assert [each.model_id for each in second.loads] == ["m"]


async def test_a_model_evicted_behind_the_gateways_back_is_loaded_again() -> None:
    model = loaded()
    async with MockNeuron(model) as neuron:
        async with run_gateway({"a": neuron.endpoint}, poll_s=60) as gateway:
            model.status = "unloaded"
            response = await gateway.chat()
            assert response.status == 200
            assert len(neuron.loads) == 1


async def test_requests_spread_over_replicas_by_what_is_in_hand() -> None:
    gate = asyncio.Event()
    models = [loaded(first_gate=gate), loaded(first_gate=gate)]
    async with MockNeuron(models[0]) as first, MockNeuron(models[1]) as second:
        async with run_gateway({"a": first.endpoint, "b": second.endpoint}) as gateway:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(6):
                    tasks.create_task(gateway.chat())
                await first.until(lambda: models[0].in_flight == 3)
                await second.until(lambda: models[1].in_flight == 3)
                gate.set()


async def test_a_whole_answer_is_given_up_when_its_node_becomes_unhealthy() -> None:
    model = loaded(first_gate=asyncio.Event())
    async with MockNeuron(model) as neuron:
        async with run_gateway({"a": neuron.endpoint}, poll_s=0.01) as gateway:
            async with asyncio.TaskGroup() as tasks:
                call = tasks.create_task(gateway.chat())
                await neuron.until(lambda: model.in_flight == 1)
                neuron.control_fault = "error"
                response = await call
            assert response.status == 502
            message = (await response.json())["error"]["message"]
            assert message == "node a became unreachable while it worked on the request"
