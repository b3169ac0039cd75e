"""Embeddings through a whole gateway: what holds for chats holds for them."""

import asyncio
from typing import Any

import openai
import pytest

from cortex.core.catalogue import Catalogue
from cortex.core.entitlements import ApiKey, Entitlements
from tests.support.budgets import Wall, one_key, until_used
from tests.support.gateway import run_gateway
from tests.support.mock_neuron import MockModel, MockNeuron

PATH = "/v1/embeddings"
# What the mock says that a request read.
COST = 7


def embedder(model_id: str = "e", status: str = "loaded", **fields: Any) -> MockModel:
    return MockModel(model_id, status, capabilities=["embeddings"], **fields)


def ask(model: str = "e", given: Any = "Once", **fields: Any) -> dict[str, Any]:
    return {"model": model, "input": given, **fields}


async def test_a_request_reaches_the_node_and_its_answer_comes_back_unchanged() -> None:
    async with MockNeuron(embedder()) as neuron:
        async with run_gateway({"a": neuron.endpoint}, expose_headers=True) as gateway:
            body = b'{"model":"e", "input":["Once", "up"],  "x_new": [1.0], "stream": true}'
            response = await gateway.post(PATH, body, x_request_id="r-1")
            assert response.status == 200
            assert response.content_type == "application/json"
            answer = await response.json()
            assert [each["embedding"] for each in answer["data"]] == [[4.0, 2.0], [2.0, 2.0]]
            assert response.headers["x-cortex-node"] == "a"
            assert (neuron.seen[0].path, neuron.seen[0].body) == (PATH, body)
            why = await (await gateway.get("/why/r-1")).json()
            assert why["model"] == "e"
            samples = await gateway.metrics()
            labels = '{model="e",node="a"}'
            assert samples[f"cortex_prompt_tokens_total{labels}"] == COST
            assert samples[f"cortex_requests_total{labels}"] == 1


async def test_an_alias_changes_the_model_and_nothing_else_in_the_body() -> None:
    aliases = Catalogue(aliases={"text-embedding-*": "e"})
    async with MockNeuron(embedder()) as neuron:
        async with run_gateway({"a": neuron.endpoint}, catalogue=aliases) as gateway:
            body = b'{"input":[[1,2,30]],"model":"text-embedding-3-small","x":1.50}'
            assert (await gateway.post(PATH, body)).status == 200
            assert neuron.seen[0].body == body.replace(b'"text-embedding-3-small"', b'"e"')


async def test_a_cold_model_is_loaded_by_its_first_request() -> None:
    async with MockNeuron(embedder(status="unloaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            assert (await gateway.post(PATH, ask())).status == 200
            assert [wish.model_id for wish in neuron.loads] == ["e"]


async def test_a_request_that_would_be_refused_does_not_load_anything() -> None:
    async with MockNeuron(embedder(status="unloaded"), MockModel("chatty")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            message = {"role": "user", "content": "Hi"}
            chat = {"model": "e", "messages": [message]}
            for path, body, code, param in (
                (PATH, ask(given=[]), "invalid_request", "input"),
                (PATH, ask(given=["a", ""]), "invalid_request", "input[1]"),
                (PATH, ask(encoding_format="x"), "invalid_request", "encoding_format"),
                (PATH, {"input": "a"}, "missing_model_field", "model"),
                (PATH, ask("chatty"), "model_capability", "model"),
                ("/v1/chat/completions", chat, "model_capability", "model"),
                ("/v1/chat/completions", {**chat, "stream": True}, "model_capability", "model"),
                ("/v1/completions", {"model": "e", "prompt": "a"}, "model_capability", "model"),
            ):
                response = await gateway.post(path, body)
                error = (await response.json())["error"]
                assert (response.status, error["code"], error["param"]) == (400, code, param)
            response = await gateway.post("/v1/messages", {**chat, "max_tokens": 5})
            assert response.status == 400
            refusal = await response.json()
            assert refusal["type"] == "error"
            assert refusal["error"]["type"] == "invalid_request_error"
            assert "writes no text" in refusal["error"]["message"]
            assert neuron.loads == []


async def test_a_node_that_does_not_say_what_a_model_is_for_is_asked() -> None:
    silent = MockModel("e", capabilities=[])
    async with MockNeuron(silent) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            assert (await gateway.post(PATH, ask())).status == 200
            assert len(neuron.loads) == 1


@pytest.mark.parametrize("fault", ["reset", "refusal"])
async def test_a_node_that_breaks_or_is_full_is_left_for_another(fault: str) -> None:
    sick = embedder()
    if fault == "reset":
        sick.fault = "reset"
    else:
        sick.refusal = (503, "queue_full")
    async with MockNeuron(sick) as first, MockNeuron(embedder()) as second:
        async with run_gateway({"a": first.endpoint, "b": second.endpoint}) as gateway:
            assert (await gateway.post(PATH, ask())).status == 200
            assert [seen.path for seen in first.seen] == [PATH]
            assert [seen.path for seen in second.seen] == [PATH]


async def test_a_caller_who_leaves_takes_the_request_off_the_node() -> None:
    gate = asyncio.Event()
    async with MockNeuron(embedder(first_gate=gate)) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            call = asyncio.get_running_loop().create_task(gateway.post(PATH, ask()))
            async with asyncio.timeout(10):
                while not neuron.seen:
                    await asyncio.sleep(0.01)
                call.cancel()
                while not neuron.cancelled:
                    await asyncio.sleep(0.01)


async def test_a_key_pays_for_what_is_read_and_reserves_nothing_for_an_answer() -> None:
    async with (
        MockNeuron(embedder()) as neuron,
        run_gateway(
            {"a": neuron.endpoint}, entitlements=one_key(tokens_per_day=100), wall_clock=Wall()
        ) as gateway,
    ):
        assert (await gateway.post(PATH, ask(), x_api_key="k")).status == 200
        await until_used(gateway, "tokens_per_day", COST)
        # A chat would reserve hundreds of tokens for its answer and be turned away.
        assert (await gateway.post(PATH, ask(), x_api_key="k")).status == 200
        await until_used(gateway, "tokens_per_day", 2 * COST)
        large = await gateway.post(PATH, ask(given="word " * 400), x_api_key="k")
        assert large.status == 429
        report = await (await gateway.get("/v1/usage", x_api_key="k")).json()
        (spent,) = report["models"]
        assert (spent["model"], spent["prompt_tokens"]) == ("e", 2 * COST)


async def test_a_key_reaches_the_models_of_its_list_only() -> None:
    entitlements = Entitlements(
        require_auth=True, keys=[ApiKey(key="k", account_id="a", models=["e"])]
    )
    async with MockNeuron(embedder(), embedder("other")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, entitlements=entitlements) as gateway:
            assert (await gateway.post(PATH, ask(), x_api_key="k")).status == 200
            refused = await gateway.post(PATH, ask("other"), x_api_key="k")
            assert refused.status == 404
            assert (await refused.json())["error"]["code"] == "model_not_found"
            assert (await gateway.post(PATH, ask())).status == 401
            assert len(neuron.seen) == 1


async def test_capabilities_are_listed() -> None:
    async with MockNeuron(embedder(), MockModel("m")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            listed = (await (await gateway.get("/v1/models")).json())["data"]
            assert {each["id"]: each["capabilities"] for each in listed} == {
                "e": ["embeddings"],
                "m": ["text"],
            }


async def test_the_sdk_reads_the_answer_and_raises_its_own_errors() -> None:
    async with MockNeuron(embedder(), MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            async with openai.AsyncOpenAI(
                base_url=f"{gateway.url}/v1", api_key="none", max_retries=0
            ) as client:
                found = await client.embeddings.create(
                    model="e", input=["Once", "up"], encoding_format="float"
                )
                assert [each.embedding for each in found.data] == [[4.0, 2.0], [2.0, 2.0]]
                assert found.usage.total_tokens == COST
                with pytest.raises(openai.NotFoundError):
                    await client.embeddings.create(model="none", input="a")
