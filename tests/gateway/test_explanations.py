"""Why a request went where it went, what would happen to one, and the id of each."""

import asyncio
from typing import Any

import pytest

from cortex.core.catalogue import Catalogue, CatalogueModel
from cortex.core.entitlements import ApiKey, Entitlements
from cortex.gateway.decisions import MAX_STEPS, Decisions
from cortex.gateway.router import Serve
from tests.support.gateway import RunningGateway, run_gateway
from tests.support.mock_neuron import GIB, MockModel, MockNeuron

CHAT = "/v1/chat/completions"


def chat_body(model: str = "m", **fields: object) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": "Hi"}], **fields}


async def ask(gateway: RunningGateway, request_id: str, model: str = "m", **fields: object) -> int:
    body = chat_body(model, **fields)
    return (await gateway.post(CHAT, body, **{"x-request-id": request_id})).status


async def why(gateway: RunningGateway, request_id: str) -> dict[str, Any]:
    response = await gateway.get(f"/why/{request_id}")
    assert response.status == 200, await response.text()
    report: dict[str, Any] = await response.json()
    return report


async def plan(gateway: RunningGateway, model: str) -> dict[str, Any]:
    response = await gateway.get(f"/plan?model={model}")
    assert response.status == 200, await response.text()
    report: dict[str, Any] = await response.json()
    return report


async def test_every_answer_carries_an_id_ok_or_not() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            responses = [
                await gateway.chat(),
                await gateway.chat(stream=True),
                await gateway.chat("nope"),
                await gateway.get("/nope"),
                await gateway.get("/health"),
                await gateway.post(CHAT, b"junk"),
            ]
            ids = [each.headers["x-request-id"] for each in responses]
            assert all(each.startswith("req_") and len(each) == 28 for each in ids)
            assert len(set(ids)) == 6
            seen = {name.lower(): value for name, value in neuron.seen[0].headers.items()}
            assert seen["x-request-id"] == ids[0]


async def test_a_callers_own_id_is_kept_if_it_is_usable() -> None:
    async with run_gateway({}) as gateway:
        for given, kept in (("my-id.7", True), ("a b", False), ("x" * 129, False), ("", False)):
            response = await gateway.get("/health", **{"x-request-id": given})
            assert (response.headers["x-request-id"] == given) is kept


async def test_anthropic_clients_find_the_id_where_they_look_for_it() -> None:
    async with run_gateway({}, keys=("secret",)) as gateway:
        response = await gateway.post("/v1/messages", {})
        assert response.status == 401
        assert response.headers["request-id"] == response.headers["x-request-id"]


async def test_a_warm_request_is_explained_by_costs_and_rejections() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as first, MockNeuron() as second:
        nodes = {"a": first.endpoint, "b": second.endpoint}
        async with run_gateway(nodes) as gateway:
            assert await ask(gateway, "one") == 200
            report = await why(gateway, "one")
            assert report["state"] == "ok"
            assert (report["name"], report["model"], report["node"]) == ("m", "m", "a")
            assert (report["prompt_tokens"], report["cached_tokens"]) == (7, 2)
            (step,) = report["steps"]
            assert (step["action"], step["node"], step["outcome"]) == ("serve", "a", "answered")
            (option,) = step["options"]
            assert option["cost"]["total_s"] > 0
            assert option["cost"]["load_s"] == 0
            assert step["rejected"] == [{"node": "b", "model": "m", "reason": "does not list it"}]


async def test_a_cold_request_tells_of_its_load_and_others_that_they_joined_it() -> None:
    gate = asyncio.Event()
    async with MockNeuron(MockModel("m", load_gate=gate)) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            async with asyncio.TaskGroup() as tasks:
                first = tasks.create_task(ask(gateway, "first"))
                await neuron.until(lambda: neuron.loads)
                second = tasks.create_task(ask(gateway, "second", stream=True))
                while (await gateway.get("/why/second")).status != 200:
                    await asyncio.sleep(0)
                assert (await why(gateway, "second"))["state"] == "in progress"
                gate.set()
            assert (first.result(), second.result()) == (200, 200)
            for request_id, how in (("first", "begun"), ("second", "joined")):
                report = await why(gateway, request_id)
                load, serve = report["steps"]
                assert (load["action"], load["load"], load["outcome"]) == ("load", how, "loaded")
                assert load["options"][0]["cost"]["load_s"] > 0
                assert serve["action"] == "serve"
                assert report["load_ms"] > 0
                assert report["queue_ms"] >= 0


async def test_a_retry_is_told_with_what_went_wrong() -> None:
    sick = MockModel("m", "loaded", refusal=(503, "queue_full"))
    async with MockNeuron(sick) as first, MockNeuron(MockModel("m", "loaded")) as second:
        nodes = {"a": first.endpoint, "b": second.endpoint}
        async with run_gateway(nodes) as gateway:
            assert await ask(gateway, "one") == 200
            report = await why(gateway, "one")
            assert (report["retries"], report["node"]) == (1, "b")
            first_try, second_try = report["steps"]
            assert (first_try["node"], first_try["outcome"]) == ("a", "the mock refuses")
            assert second_try["rejected"][0] == {
                "node": "a",
                "model": "m",
                "reason": "failed this request already",
            }


async def test_a_request_that_failed_says_why() -> None:
    async with MockNeuron(MockModel("m", "recovering")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            assert await ask(gateway, "one") == 503
            report = await why(gateway, "one")
            assert report["state"] == "failed"
            assert report["error"] == "model 'm' is being restarted on a; try again shortly"
            (step,) = report["steps"]
            assert (step["action"], step["outcome"]) == ("refuse", report["error"])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_caller_that_left_is_told_from_one_that_was_failed(stream: bool) -> None:
    gate = asyncio.Event()
    held = MockModel("m", "loaded", first_gate=gate)
    async with MockNeuron(held) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            call = asyncio.ensure_future(ask(gateway, "one", stream=stream))
            await neuron.until(lambda: held.in_flight == 1)
            call.cancel()
            await neuron.until(lambda: held.in_flight == 0)
            while (report := await why(gateway, "one"))["state"] == "in progress":
                await asyncio.sleep(0)
            assert (report["state"], report["error"]) == ("left", "the caller left")


async def test_an_unknown_request_id_is_404_in_words() -> None:
    async with run_gateway({}) as gateway:
        response = await gateway.get("/why/nobody")
        assert response.status == 404
        error = (await response.json())["error"]
        assert error["code"] == "unknown_request"
        assert error["message"].startswith("request 'nobody' is not among the last 512")


async def test_a_key_sees_the_decisions_of_its_own_account_only() -> None:
    keys = [ApiKey(account_id=name, key=f"key of {name}") for name in ("alice", "bob")]
    entitlements = Entitlements(require_auth=True, keys=keys)
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, entitlements=entitlements) as gateway:
            headers = {"x-api-key": "key of alice", "x-request-id": "one"}
            assert (await gateway.post(CHAT, chat_body(), **headers)).status == 200
            for name, status in (("alice", 200), ("bob", 404)):
                response = await gateway.get("/why/one", **{"x-api-key": f"key of {name}"})
                assert response.status == status


async def test_a_plan_for_a_cold_model_names_node_victims_and_rejections_and_does_nothing() -> None:
    listed = Catalogue(models=[CatalogueModel(id="m", vram_mb=8192, pinned_on=["a", "b"])])
    held = MockModel("old", "loaded", 20 * GIB)
    async with (
        MockNeuron(held, MockModel("m", memory_bytes=8 * GIB), total_bytes=24 * GIB) as first,
        MockNeuron(MockModel("m", memory_bytes=8 * GIB), total_bytes=4 * GIB) as second,
        MockNeuron() as third,
    ):
        nodes = {"a": first.endpoint, "b": second.endpoint, "c": third.endpoint}
        async with run_gateway(nodes, catalogue=listed) as gateway:
            report = await plan(gateway, "m")
            assert (report["action"], report["node"]) == ("load", "a")
            best, doubtful = report["options"]
            assert best["victims"] == ["old"]
            assert best["cost"]["victims_s"] > 0
            assert best["cost"]["load_s"] > 0
            assert doubtful["doubt"] == "needs 8.0 GiB, 4.0 free and not enough can leave"
            assert report["rejected"] == [
                {"node": "c", "model": "m", "reason": "not among its pinned_on (a, b)"}
            ]
            assert report["load"]["pinned"] is True
            assert (first.loads, second.loads) == ([], [])
            assert held.status == "loaded"


async def test_a_plan_for_a_loaded_model_also_says_where_else_it_could_be() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as first, MockNeuron(MockModel("m")) as second:
        nodes = {"a": first.endpoint, "b": second.endpoint}
        async with run_gateway(nodes) as gateway:
            report = await plan(gateway, "m")
            assert (report["action"], report["node"]) == ("serve", "a")
            assert [each["node"] for each in report["placements"]] == ["b"]
            assert report["not_placed"] == [
                {"node": "a", "model": "m", "reason": "loaded there already"}
            ]


async def test_a_plan_for_a_virtual_model_tells_what_it_stands_for() -> None:
    listed = Catalogue(virtual={"v": ["m", "n"]})
    async with MockNeuron(MockModel("m"), MockModel("n", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, catalogue=listed) as gateway:
            report = await plan(gateway, "v")
            assert (report["models"], report["model"]) == (["m", "n"], "n")


async def test_a_plan_that_would_refuse_says_so_and_an_unknown_model_is_404() -> None:
    async with MockNeuron(MockModel("m", "recovering")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            report = await plan(gateway, "m")
            assert report["action"] == "refuse"
            assert report["error"] == "model 'm' is being restarted on a; try again shortly"
            response = await gateway.get("/plan?model=nope")
            assert response.status == 404
            assert (await response.json())["error"]["code"] == "model_not_found"
            assert (await gateway.get("/plan")).status == 400


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_tell_node_queue_and_load_when_asked_to(stream: bool) -> None:
    async with MockNeuron(MockModel("m")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, expose_headers=True) as gateway:
            response = await gateway.chat(stream=stream)
            assert response.headers["x-cortex-node"] == "a"
            assert float(response.headers["x-cortex-load-ms"]) > 0
            assert float(response.headers["x-cortex-queue-ms"]) >= 0
            body = {**chat_body(), "max_tokens": 5, "stream": stream}
            response = await gateway.post("/v1/messages", body)
            assert response.headers["x-cortex-node"] == "a"
            assert response.headers["x-cortex-load-ms"] == "0.0"


async def test_answers_tell_nothing_of_nodes_by_default() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            response = await gateway.chat()
            assert not [name for name in response.headers if name.lower().startswith("x-cortex")]


def test_decisions_are_bounded_in_number_and_in_steps() -> None:
    store = Decisions(max_decisions=2)
    for number in range(3):
        decision = store.begin(str(number), "m", "", 0.0)
        for at in range(MAX_STEPS + 5):
            decision.chose(Serve(node="a", endpoint="", model_id="m"), float(at))
        assert len(decision.report().steps) == MAX_STEPS
    assert store.find("2", "").request_id == "2"
    with pytest.raises(Exception, match="not among the last 2"):
        store.find("0", "")
