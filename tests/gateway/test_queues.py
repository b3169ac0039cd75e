"""How many callers may wait for a model, at the gateway."""

import asyncio

import pytest

from cortex.core.errors import QueueFullError
from cortex.core.neuron_api import LoadProgress, ModelInfo, ModelLoad, NeuronHealth
from cortex.gateway.fleet import Fleet, FleetSnapshot
from cortex.gateway.queues import Queues, seats
from tests.support.gateway import run_gateway
from tests.support.mock_neuron import MockModel, MockNeuron


def holding(*places: int | None, status: str = "loaded") -> FleetSnapshot:
    """Nodes that hold model `m` with so many seats, None where they do not say."""
    fleet = Fleet((str(number), "http://x") for number in range(len(places)))
    for number, each in enumerate(places):
        loads = [] if each is None else [ModelLoad(id="m", max_in_flight=each)]
        health = NeuronHealth(uptime_secs=1, models=loads)
        info = ModelInfo(id="m", harness="torch", status=status)
        fleet.record_reading(str(number), [info], health, stamp=0)
    return fleet.snapshot()


def test_seats_are_those_of_all_loaded_replicas_and_unknown_if_one_does_not_say():
    assert seats(holding(4, 8), "m") == 12
    assert seats(holding(4, None), "m") is None
    assert seats(holding(4, status="loading"), "m") == 0


def test_callers_beyond_the_seats_wait_up_to_the_bound():
    queues = Queues()
    for _ in range(7):
        queues.enter("m", lambda: holding(4), 3)
    with pytest.raises(QueueFullError) as caught:
        queues.enter("m", lambda: holding(4), 3)
    assert caught.value.retry_after_s == 2
    queues.enter("other", lambda: holding(4), 3)
    queues.leave("m")
    queues.enter("m", lambda: holding(4), 3)


def test_a_replica_that_does_not_say_how_much_it_takes_is_left_to_its_own_bound():
    queues = Queues()
    for _ in range(100):
        queues.enter("m", lambda: holding(None), 1)


def test_who_finds_a_cold_models_queue_full_is_told_when_it_will_be_loaded():
    fleet = Fleet([("a", "http://a")])
    progress = LoadProgress(phase="weights", seconds_left=17)
    loading = ModelInfo(id="m", harness="torch", status="loading", progress=progress)
    fleet.record_reading("a", [loading], None, stamp=0)
    queues = Queues()
    queues.enter("m", fleet.snapshot, 1)
    with pytest.raises(QueueFullError, match="1 callers wait for model 'm' to be loaded") as caught:
        queues.enter("m", fleet.snapshot, 1)
    assert caught.value.retry_after_s == 17


@pytest.mark.parametrize(("path", "status"), [("/v1/chat/completions", 503), ("/v1/messages", 529)])
@pytest.mark.parametrize("stream", [False, True])
async def test_one_caller_too_many_for_a_cold_model_is_sent_away_in_its_dialect(
    path: str, status: int, stream: bool
) -> None:
    gate = asyncio.Event()
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
    async with MockNeuron(MockModel("m", load_gate=gate)) as neuron:
        async with run_gateway({"a": neuron.endpoint}, max_waiting=2) as gateway:
            async with asyncio.TaskGroup() as tasks:
                first = [tasks.create_task(gateway.chat(stream=each)) for each in (False, True)]
                await neuron.until(lambda: len(neuron.loads) == 1)
                response = await gateway.post(path, {**body, "stream": stream})
                assert (response.status, response.headers["retry-after"]) == (status, "5")
                answer = await response.json()
                assert "2 callers wait for model 'm'" in answer["error"]["message"]
                assert ("type" in answer) == (path == "/v1/messages")
                gate.set()
            assert [call.result().status for call in first] == [200, 200]
            assert (await gateway.chat()).status == 200
            assert (await gateway.metrics())['cortex_gateway_rejections_total{model="m"}'] == 1


async def test_a_caller_who_leaves_a_busy_models_queue_makes_room_for_another() -> None:
    gate = asyncio.Event()
    model = MockModel("m", "loaded", first_gate=gate)
    async with MockNeuron(model) as neuron:
        async with run_gateway({"a": neuron.endpoint}, max_waiting=1) as gateway:
            async with asyncio.TaskGroup() as tasks:
                calls = [tasks.create_task(gateway.chat()) for _ in range(9)]
                await neuron.until(lambda: model.in_flight == 9)
                response = await gateway.chat()
                assert response.status == 503
                assert (await response.json())["error"]["code"] == "queue_full"
                calls[0].cancel()
                await neuron.until(lambda: model.in_flight == 8)
                calls.append(tasks.create_task(gateway.chat()))
                await neuron.until(lambda: model.in_flight == 9)
                gate.set()
            assert {call.result().status for call in calls[1:]} == {200}


async def test_the_wait_for_a_cold_model_is_counted_from_the_callers_arrival() -> None:
    sick = MockModel("m", "loaded", fault="reset")
    gate = asyncio.Event()
    async with MockNeuron(sick) as first, MockNeuron(MockModel("m", load_gate=gate)) as second:
        nodes = {"a": first.endpoint, "b": second.endpoint}
        async with run_gateway(nodes, cold_wait_s=0.1) as gateway:
            response = await gateway.chat()
            assert response.status == 503
            assert (await response.json())["error"]["code"] == "model_loading"
            gate.set()
