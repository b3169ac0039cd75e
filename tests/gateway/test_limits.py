"""Rates and budgets over HTTP: reserved before a request, settled after it."""

import asyncio
import logging
from typing import Any

import anthropic
import msgspec
import openai
import pytest

from cortex.core.entitlements import ApiKey, Entitlements, LimitsConfig, Window
from tests.support.budgets import COST, Wall, chat, chat_body, one_key, until_used, used
from tests.support.gateway import run_gateway
from tests.support.mock_neuron import MockModel, MockNeuron


async def test_a_request_over_the_rate_gets_429_with_the_time_to_wait_in_openais_words() -> None:
    wall = Wall()
    async with (
        MockNeuron(MockModel("m", "loaded")) as neuron,
        run_gateway(
            {"a": neuron.endpoint}, entitlements=one_key(requests_per_minute=2), wall_clock=wall
        ) as gateway,
    ):
        wall.now_s += 10
        first = await chat(gateway)
        assert first.status == 200
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert first.headers["x-ratelimit-reset-requests"] == "50s"
        assert (await chat(gateway)).status == 200
        refused = await chat(gateway)
        assert refused.status == 429
        assert refused.headers["retry-after"] == "51"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert (await refused.json())["error"] == {
            "message": "key laptop: 2 of 2 requests of requests_per_minute are used; "
            "try again in 51 s",
            "type": "rate_limit_error",
            "code": "rate_limit_exceeded",
            "param": None,
        }
        assert len(neuron.seen) == 2
        wall.now_s += 51
        assert (await chat(gateway)).status == 200


async def test_a_request_over_the_rate_gets_429_in_anthropics_words() -> None:
    async with (
        MockNeuron(MockModel("m", "loaded")) as neuron,
        run_gateway(
            {"a": neuron.endpoint}, entitlements=one_key(requests_per_minute=1), wall_clock=Wall()
        ) as gateway,
    ):
        first = await gateway.post("/v1/messages", chat_body(), x_api_key="k")
        assert first.status == 200
        assert first.headers["anthropic-ratelimit-requests-remaining"] == "0"
        assert first.headers["anthropic-ratelimit-requests-reset"] == "2024-10-04T00:01:00Z"
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            refused = await gateway.post(path, chat_body(), x_api_key="k")
            assert refused.status == 429
            assert int(refused.headers["retry-after"]) > 0
            body = await refused.json()
            assert (body["type"], body["error"]["type"]) == ("error", "rate_limit_error")


async def test_tokens_are_reserved_by_an_estimate_and_settled_with_the_usage() -> None:
    gate = asyncio.Event()
    model = MockModel("m", "loaded", token_gate=gate)
    async with (
        MockNeuron(model) as neuron,
        run_gateway(
            {"a": neuron.endpoint}, entitlements=one_key(tokens_per_minute=70), wall_clock=Wall()
        ) as gateway,
    ):
        body = chat_body(stream=True, stream_options={"include_usage": True})
        async with gateway.session.post(
            gateway.url + "/v1/chat/completions", json=body, headers={"x-api-key": "k"}
        ) as stream:
            assert stream.status == 200
            reserved = (await used(gateway))["tokens_per_minute"]
            assert reserved > 20 + COST
            assert stream.headers["x-ratelimit-remaining-tokens"] == str(70 - reserved)
            # Beside what is set aside for the first, a second of its size has no room.
            refused = await chat(gateway)
            assert refused.status == 429
            assert "and this request may need" in (await refused.json())["error"]["message"]
            gate.set()
            await stream.read()
        await until_used(gateway, "tokens_per_minute", COST)
        assert (await chat(gateway)).status == 200
        await until_used(gateway, "tokens_per_minute", 2 * COST)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {}),
        ("/v1/chat/completions", {"stream": True, "stream_options": {"include_usage": True}}),
        ("/v1/messages", {}),
        ("/v1/messages", {"stream": True}),
    ],
)
async def test_every_way_to_answer_is_settled(path: str, fields: dict[str, Any]) -> None:
    async with (
        MockNeuron(MockModel("m", "loaded")) as neuron,
        run_gateway(
            {"a": neuron.endpoint}, entitlements=one_key(tokens_per_day=500), wall_clock=Wall()
        ) as gateway,
    ):
        response = await gateway.post(path, chat_body(**fields), x_api_key="k")
        assert response.status == 200
        await until_used(gateway, "tokens_per_day", COST)


async def test_a_client_that_leaves_is_charged_for_what_went_by() -> None:
    model = MockModel("m", "loaded", token_gate=asyncio.Event(), free_tokens=2)
    async with (
        MockNeuron(model) as neuron,
        run_gateway(
            {"a": neuron.endpoint},
            entitlements=one_key(tokens_per_day=5000, max_concurrent=1),
            wall_clock=Wall(),
        ) as gateway,
    ):
        body = chat_body(stream=True)
        async with gateway.session.post(
            gateway.url + "/v1/chat/completions",
            data=msgspec.json.encode(body),
            headers={"x-api-key": "k"},
        ) as stream:
            async for line in stream.content:
                if b"world" in line:
                    break
            assert (await chat(gateway)).status == 429
            stream.close()
        # The node told no usage: the prompt by its estimate, and two tokens of answer.
        prompt = len(msgspec.json.encode(body)) // 4
        await until_used(gateway, "tokens_per_day", prompt + 2)


@pytest.mark.parametrize(
    ("model", "status"),
    [
        (MockModel("m", "loaded", refusal=(400, "context_length_exceeded")), 400),
        (MockModel("m", "loaded", refusal=(503, "queue_full")), 503),
        (MockModel("m", "loaded", fault="reset"), 502),
        (MockModel("other", "loaded"), 404),
    ],
)
async def test_a_request_that_fails_gives_its_tokens_back(model: MockModel, status: int) -> None:
    async with (
        MockNeuron(model) as neuron,
        run_gateway(
            {"a": neuron.endpoint},
            entitlements=one_key(tokens_per_day=500, requests_per_minute=9, max_concurrent=1),
            wall_clock=Wall(),
        ) as gateway,
    ):
        for _ in range(2):
            assert (await chat(gateway)).status == status
        await until_used(gateway, "tokens_per_day", 0)
        # It was a request all the same.
        assert (await used(gateway))["requests_per_minute"] == 2


async def test_a_request_that_is_refused_counts_against_no_other_limit() -> None:
    async with (
        MockNeuron(MockModel("m", "loaded")) as neuron,
        run_gateway(
            {"a": neuron.endpoint},
            entitlements=one_key(requests_per_minute=9, tokens_per_minute=50, tokens_per_day=55),
            wall_clock=Wall(),
        ) as gateway,
    ):
        while (await chat(gateway)).status == 200:
            pass
        await until_used(gateway, "tokens_per_day", 2 * COST)
        await until_used(gateway, "requests_per_minute", 2)
        assert (await used(gateway))["tokens_per_minute"] == 2 * COST


async def test_a_spent_balance_is_a_quota_error_that_no_sdk_tries_again() -> None:
    wall = Wall()
    async with (
        MockNeuron(MockModel("m", "loaded")) as neuron,
        run_gateway(
            {"a": neuron.endpoint}, entitlements=one_key(hard_cap=COST), wall_clock=wall
        ) as gateway,
    ):
        # An untouched budget lets one request through, whatever it may need.
        assert (await chat(gateway)).status == 200
        await until_used(gateway, "hard_cap", COST)
        wall.now_s += 400 * 86400
        refused = await chat(gateway)
        assert refused.status == 429
        assert "retry-after" not in refused.headers
        assert refused.headers["x-should-retry"] == "false"
        error = (await refused.json())["error"]
        assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")
        body = await (await gateway.post("/v1/messages", chat_body(), x_api_key="k")).json()
        assert body["error"]["type"] == "rate_limit_error"


async def test_a_rolling_cap_comes_back() -> None:
    wall = Wall()
    window = Window(kind="rolling", seconds=3600)
    async with (
        MockNeuron(MockModel("m", "loaded")) as neuron,
        run_gateway(
            {"a": neuron.endpoint},
            entitlements=one_key(hard_cap=COST, window=window),
            wall_clock=wall,
        ) as gateway,
    ):
        assert (await chat(gateway)).status == 200
        await until_used(gateway, "hard_cap", COST)
        refused = await chat(gateway)
        assert (refused.status, refused.headers["x-should-retry"]) == (429, "false")
        wall.now_s += int(refused.headers["retry-after"])
        assert (await chat(gateway)).status == 200


async def test_max_concurrent_bounds_the_requests_in_hand_of_one_key_only() -> None:
    gate = asyncio.Event()
    keys = [
        ApiKey(key="k", account_id="a", max_concurrent=2),
        ApiKey(key="l", account_id="a", max_concurrent=2),
    ]
    model = MockModel("m", "loaded", first_gate=gate)
    async with (
        MockNeuron(model) as neuron,
        run_gateway({"a": neuron.endpoint}, entitlements=Entitlements(keys=keys)) as gateway,
        asyncio.TaskGroup() as tasks,
    ):
        running = [tasks.create_task(chat(gateway)) for _ in range(2)]
        async with asyncio.timeout(10):
            while len(neuron.seen) < 2:
                await asyncio.sleep(0.01)
        refused = await chat(gateway)
        assert refused.status == 429
        assert "2 requests in hand" in (await refused.json())["error"]["message"]
        other = tasks.create_task(gateway.post("/v1/chat/completions", chat_body(), x_api_key="l"))
        gate.set()
        assert [(await each).status for each in (*running, other)] == [200, 200, 200]
        assert (await chat(gateway)).status == 200


async def test_keys_without_limits_and_callers_without_a_key_hear_nothing_of_limits() -> None:
    entitlements = Entitlements(keys=[ApiKey(key="k", account_id="a")])
    async with (
        MockNeuron(MockModel("m", "loaded")) as neuron,
        run_gateway({"a": neuron.endpoint}, entitlements=entitlements) as gateway,
    ):
        for response in (await chat(gateway), await gateway.chat()):
            assert response.status == 200
            assert not any("ratelimit" in name.lower() for name in response.headers)
        assert (await gateway.get("/v1/usage")).status == 401


async def test_usage_is_told_by_key_and_model_to_its_owner_the_metrics_and_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "cortex.usage")
    async with (
        MockNeuron(MockModel("m", "loaded")) as neuron,
        run_gateway(
            {"a": neuron.endpoint},
            entitlements=one_key(tokens_per_day=1000, requests_per_minute=1),
            limits=LimitsConfig(usage_log=True),
            wall_clock=Wall(),
        ) as gateway,
    ):
        assert (await chat(gateway)).status == 200
        assert (await chat(gateway)).status == 429
        await until_used(gateway, "tokens_per_day", COST)
        report = await (await gateway.get("/v1/usage", authorization="Bearer k")).json()
        assert report == {
            "account_id": "alice",
            "key_id": "laptop",
            "limits": [
                {
                    "name": "requests_per_minute",
                    "unit": "requests",
                    "limit": 1,
                    "used": 1,
                    "remaining": 0,
                    "window_s": 60,
                    "reset_s": 60.0,
                },
                {
                    "name": "tokens_per_day",
                    "unit": "tokens",
                    "limit": 1000,
                    "used": 10,
                    "remaining": 990,
                    "window_s": 86400,
                    "reset_s": 86400.0,
                },
            ],
            "models": [
                {
                    "model": "m",
                    "requests": 1,
                    "prompt_tokens": 7,
                    "completion_tokens": 3,
                    "cached_tokens": 2,
                }
            ],
        }
        metrics = await gateway.metrics()
        labels = 'account="alice",key="laptop"'
        assert metrics[f'cortex_key_requests_total{{{labels},model="m"}}'] == 1
        prompt = 'cortex_key_tokens_total{account="alice",key="laptop",kind="prompt",model="m"}'
        assert metrics[prompt] == 7
        refusals = f'cortex_limit_refusals_total{{{labels},limit="requests_per_minute"}}'
        assert metrics[refusals] == 1
    (record,) = [each for each in caplog.records if each.name == "cortex.usage"]
    fields = vars(record)
    assert (fields["account"], fields["key"], fields["model"]) == ("alice", "laptop", "m")
    assert (fields["prompt_tokens"], fields["completion_tokens"]) == (7, 3)


async def test_the_sdks_raise_their_own_error_and_do_not_try_a_spent_quota_again() -> None:
    async with (
        MockNeuron(MockModel("m", "loaded")) as neuron,
        run_gateway(
            {"a": neuron.endpoint}, entitlements=one_key(hard_cap=COST), wall_clock=Wall()
        ) as gateway,
    ):
        body: Any = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="k") as client:
            answer = await client.chat.completions.create(**body)
            assert answer.choices[0].message.content == "Hello world!"
            await until_used(gateway, "hard_cap", COST)
            with pytest.raises(openai.RateLimitError) as caught:
                await client.chat.completions.create(**body)
            assert caught.value.code == "insufficient_quota"
        async with anthropic.AsyncAnthropic(base_url=gateway.url, api_key="k") as other:
            with pytest.raises(anthropic.RateLimitError):
                await other.messages.create(max_tokens=5, **body)
        refusals = 'cortex_limit_refusals_total{account="alice",key="laptop",limit="hard_cap"}'
        assert (await gateway.metrics())[refusals] == 2
