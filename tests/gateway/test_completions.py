"""Text completions through a whole gateway: what holds for chats holds for them."""

from typing import Any

import openai
import pytest

from cortex.core.catalogue import Catalogue
from cortex.core.entitlements import ApiKey, Entitlements
from tests.support.budgets import COST, Wall, one_key, until_used
from tests.support.gateway import run_gateway
from tests.support.mock_neuron import MockModel, MockNeuron

PATH = "/v1/completions"


def ask(model: str = "m", prompt: Any = "Once", **fields: Any) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "max_tokens": 20, **fields}


async def test_a_request_reaches_the_node_and_its_answer_comes_back_unchanged() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, expose_headers=True) as gateway:
            body = b'{"model":"m", "prompt":"Once",  "x_new": [1.0]}'
            response = await gateway.post(PATH, body, x_request_id="r-1")
            assert response.status == 200
            answer = await response.json()
            assert answer["object"] == "text_completion"
            assert answer["choices"][0]["text"] == "Hello world!"
            assert response.headers["x-cortex-node"] == "a"
            assert neuron.seen[0].path == PATH
            assert neuron.seen[0].body == body
            why = await (await gateway.get("/why/r-1")).json()
            assert why["model"] == "m"


async def test_an_alias_changes_the_model_and_nothing_else_in_the_body() -> None:
    aliases = Catalogue(aliases={"fast": "m"})
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, catalogue=aliases) as gateway:
            body = b'{"prompt":[1,2,30],"model":"fast","x":1.50}'
            assert (await gateway.post(PATH, body)).status == 200
            assert neuron.seen[0].body == body.replace(b'"fast"', b'"m"')


async def test_a_stream_is_relayed_byte_for_byte_and_metered() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            response = await gateway.post(PATH, ask(stream=True))
            assert response.content_type == "text/event-stream"
            text = await response.text()
            assert text.endswith("data: [DONE]\n\n")
            async with gateway.session.post(
                neuron.endpoint + PATH, data=neuron.seen[0].body
            ) as direct:
                assert text == await direct.text()
            samples = await gateway.metrics()
            labels = '{model="m",node="a"}'
            assert samples[f"cortex_completion_tokens_total{labels}"] == 3
            assert samples[f"cortex_time_to_first_token_seconds_count{labels}"] == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_cold_model_is_loaded_by_its_first_request(stream: bool) -> None:
    async with MockNeuron(MockModel("m")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            response = await gateway.post(PATH, ask(stream=stream))
            assert response.status == 200
            assert "world" in await response.text()
            assert [wish.model_id for wish in neuron.loads] == ["m"]


async def test_a_request_that_would_be_refused_does_not_load_anything() -> None:
    async with MockNeuron(MockModel("m")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            for fields, param in (
                ({"prompt": []}, "prompt"),
                ({"suffix": "x"}, "suffix"),
                ({"n": 4, "best_of": 2}, "best_of"),
            ):
                for stream in (False, True):
                    response = await gateway.post(PATH, {**ask(stream=stream), **fields})
                    assert response.status == 400
                    error = (await response.json())["error"]
                    assert (error["type"], error["param"]) == ("invalid_request_error", param)
            assert (await gateway.post(PATH, {"prompt": "a"})).status == 400
            assert neuron.loads == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", ["reset", "refusal"])
async def test_a_node_that_breaks_or_is_full_is_left_for_another(stream: bool, fault: str) -> None:
    sick = MockModel("m", "loaded")
    if fault == "reset":
        sick.fault = "reset"
    else:
        sick.refusal = (503, "queue_full")
    well = MockModel("m", "loaded", tokens=["from b"])
    async with MockNeuron(sick) as first, MockNeuron(well) as second:
        async with run_gateway({"a": first.endpoint, "b": second.endpoint}) as gateway:
            response = await gateway.post(PATH, ask(stream=stream))
            assert response.status == 200
            assert "from b" in await response.text()
            assert [seen.path for seen in first.seen] == [PATH]


async def test_a_stream_that_breaks_ends_in_an_error_event_and_without_done() -> None:
    async with MockNeuron(MockModel("m", "loaded", fault="die", die_after=2)) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            text = await (await gateway.post(PATH, ask(stream=True))).text()
            assert '"code":"upstream_connection_error"' in text.split("\n\n")[-2]
            assert "[DONE]" not in text


@pytest.mark.parametrize(
    "fields", [{}, {"stream": True, "stream_options": {"include_usage": True}}]
)
async def test_a_keys_limits_are_reserved_and_settled(fields: dict[str, Any]) -> None:
    async with (
        MockNeuron(MockModel("m", "loaded")) as neuron,
        run_gateway(
            {"a": neuron.endpoint}, entitlements=one_key(tokens_per_day=500), wall_clock=Wall()
        ) as gateway,
    ):
        several = ask(prompt=["Once"] * 10, max_tokens=60)
        response = await gateway.post(PATH, several, x_api_key="k")
        # All ten answers are reserved at once; the whole budget is let through while it is free.
        assert response.status == 200
        await until_used(gateway, "tokens_per_day", COST)
        assert (await gateway.post(PATH, several, x_api_key="k")).status == 429
        response = await gateway.post(PATH, ask(**fields), x_api_key="k")
        assert response.status == 200
        await until_used(gateway, "tokens_per_day", 2 * COST)


async def test_a_key_reaches_the_models_of_its_list_only() -> None:
    entitlements = Entitlements(
        require_auth=True, keys=[ApiKey(key="k", account_id="a", models=["m"])]
    )
    async with MockNeuron(MockModel("m", "loaded"), MockModel("other", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, entitlements=entitlements) as gateway:
            assert (await gateway.post(PATH, ask(), x_api_key="k")).status == 200
            refused = await gateway.post(PATH, ask("other"), x_api_key="k")
            assert refused.status == 404
            assert (await refused.json())["error"]["code"] == "model_not_found"
            assert (await gateway.post(PATH, ask())).status == 401
            assert len(neuron.seen) == 1


async def test_the_sdk_reads_both_forms_and_raises_its_own_errors() -> None:
    async with MockNeuron(MockModel("org/m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            async with openai.AsyncOpenAI(
                base_url=f"{gateway.url}/v1", api_key="none", max_retries=0
            ) as client:
                whole = await client.completions.create(model="org/m", prompt="Once")
                assert whole.choices[0].text == "Hello world!"
                stream = await client.completions.create(
                    model="org/m",
                    prompt="Once",
                    stream=True,
                    stream_options={"include_usage": True},
                )
                chunks = [chunk async for chunk in stream]
                text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
                assert text == "Hello world!"
                assert chunks[-1].usage is not None
                assert chunks[-1].usage.completion_tokens == 3
                with pytest.raises(openai.NotFoundError):
                    await client.completions.create(model="none", prompt="Once")
                assert (await client.models.retrieve("org/m")).id == "org/m"
                with pytest.raises(openai.NotFoundError):
                    await client.models.retrieve("org/none")
