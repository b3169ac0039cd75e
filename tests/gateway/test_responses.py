"""The Responses API through a whole gateway, over mock nodes."""

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import openai
import pytest

from cortex.core.catalogue import Catalogue
from cortex.core.config import ResponsesConfig
from cortex.core.entitlements import ApiKey, Entitlements
from tests.support.gateway import RunningGateway, run_gateway
from tests.support.mock_neuron import MockModel, MockNeuron
from tests.support.response_events import accumulate, check_grammar, read_events

CALL = {"name": "weather", "arguments": '{"city":"Paris"}'}
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}


def client_of(gateway: RunningGateway, key: str = "any") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0)


async def post(gateway: RunningGateway, **fields: Any) -> Any:
    response = await gateway.post("/v1/responses", {"model": "m", "input": "Hi", **fields})
    assert response.status == 200, await response.text()
    return await response.json()


def two_keys() -> Entitlements:
    keys = [
        ApiKey(key="one-key-that-is-long-enough", account_id="a", key_id="1"),
        ApiKey(key="other-key-that-is-long-enough", account_id="a", key_id="2", models=["m"]),
    ]
    return Entitlements(require_auth=True, keys=keys)


async def test_a_response_goes_round() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            answer = await post(gateway, instructions="Be brief.", max_output_tokens=9)
            assert (answer["object"], answer["status"], answer["model"]) == (
                "response",
                "completed",
                "m",
            )
            assert answer["output"][0]["content"][0]["text"] == "Hello world!"
            assert answer["usage"]["input_tokens_details"]["cached_tokens"] == 2
            asked = neuron.seen[0]
            assert asked.path == "/v1/chat/completions"
            assert asked.json["max_completion_tokens"] == 9
            assert [each["role"] for each in asked.json["messages"]] == ["system", "user"]


async def test_a_stream_is_valid_and_its_response_can_be_fetched_afterwards() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            body = {"model": "m", "input": "Hi", "stream": True}
            response = await gateway.post("/v1/responses", body)
            assert response.content_type == "text/event-stream"
            events = read_events((await response.text()).encode())
            check_grammar(events)
            final = events[-1]["response"]
            assert final["store"] is True
            assert accumulate(events).output_text == "Hello world!"
            fetched = await gateway.get(f"/v1/responses/{final['id']}")
            assert await fetched.json() == final


async def test_a_conversation_is_gone_on_from_and_branched() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            first = await post(gateway, input="One", instructions="Be brief.")
            second = await post(gateway, input="Two", previous_response_id=first["id"])
            assert second["previous_response_id"] == first["id"]
            await post(gateway, input="Three", previous_response_id=second["id"])
            await post(gateway, input="Else", previous_response_id=first["id"], store=False)
            said = [[m["content"] for m in seen.json["messages"]] for seen in neuron.seen]
            assert said == [
                ["Be brief.", "One"],
                ["One", "Hello world!", "Two"],
                ["One", "Hello world!", "Two", "Hello world!", "Three"],
                ["One", "Hello world!", "Else"],
            ]


async def test_a_response_that_is_not_to_be_kept_is_not() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            answer = await post(gateway, store=False)
            assert answer["store"] is False
            fetched = await gateway.get(f"/v1/responses/{answer['id']}")
            assert fetched.status == 404
            body = {"model": "m", "input": "x", "previous_response_id": answer["id"]}
            refused = await gateway.post("/v1/responses", body)
            assert refused.status == 400
            error = (await refused.json())["error"]
            assert (error["code"], error["param"]) == (
                "previous_response_not_found",
                "previous_response_id",
            )


async def test_a_response_is_deleted_and_its_input_is_paged() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            items = [
                {"role": "user", "content": "One"},
                {"role": "assistant", "content": "Two"},
                {"role": "user", "content": [{"type": "input_text", "text": "Three"}], "id": "x"},
            ]
            answer = await post(gateway, input=items)
            path = f"/v1/responses/{answer['id']}"
            page = await (await gateway.get(f"{path}/input_items?limit=2")).json()
            assert [each["content"][0]["text"] for each in page["data"]] == ["Three", "Two"]
            assert [each["content"][0]["type"] for each in page["data"]] == [
                "input_text",
                "output_text",
            ]
            assert (page["first_id"], page["has_more"]) == ("x", True)
            rest = f"{path}/input_items?limit=2&after={page['last_id']}"
            page = await (await gateway.get(rest)).json()
            assert [each["content"][0]["text"] for each in page["data"]] == ["One"]
            deleted = await gateway.session.delete(gateway.url + path)
            assert await deleted.json() == {
                "id": answer["id"],
                "object": "response",
                "deleted": True,
            }
            for gone in (path, f"{path}/input_items"):
                assert (await gateway.get(gone)).status == 404


async def test_a_reference_stands_for_an_item_that_is_kept() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            answer = await post(gateway)
            reference = {"type": "item_reference", "id": answer["output"][0]["id"]}
            second = await post(gateway, input=[reference, {"role": "user", "content": "So?"}])
            said = [each["content"] for each in neuron.seen[-1].json["messages"]]
            assert said == ["Hello world!", "So?"]
            items = await (await gateway.get(f"/v1/responses/{second['id']}/input_items")).json()
            assert items["data"][1] == answer["output"][0]
            body = {"model": "m", "input": [{"type": "item_reference", "id": "msg_no"}]}
            refused = await gateway.post("/v1/responses", body)
            assert refused.status == 404
            assert (await refused.json())["error"]["code"] == "item_not_found"


async def test_a_response_belongs_to_the_key_that_made_it() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, entitlements=two_keys()) as gateway:
            one = client_of(gateway, "one-key-that-is-long-enough")
            other = client_of(gateway, "other-key-that-is-long-enough")
            async with one, other:
                made = await one.responses.create(model="m", input="Hi")
                assert (await one.responses.retrieve(made.id)).id == made.id
                with pytest.raises(openai.NotFoundError):
                    await other.responses.retrieve(made.id)
                with pytest.raises(openai.NotFoundError):
                    await other.responses.delete(made.id)
                with pytest.raises(openai.NotFoundError):
                    await other.responses.cancel(made.id)
                with pytest.raises(openai.NotFoundError):
                    await other.responses.input_items.list(made.id)
                with pytest.raises(openai.BadRequestError):
                    await other.responses.create(model="m", input="x", previous_response_id=made.id)


async def test_keys_and_their_lists_of_models_hold() -> None:
    async with MockNeuron(MockModel("m", "loaded"), MockModel("n", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, entitlements=two_keys()) as gateway:
            async with client_of(gateway, "no") as client:
                with pytest.raises(openai.AuthenticationError):
                    await client.responses.create(model="m", input="Hi")
                with pytest.raises(openai.AuthenticationError):
                    await client.responses.retrieve("resp_1")
            async with client_of(gateway, "other-key-that-is-long-enough") as client:
                with pytest.raises(openai.NotFoundError, match="'n' does not exist"):
                    await client.responses.create(model="n", input="Hi")


async def test_limits_of_a_key_hold_and_its_usage_is_counted() -> None:
    key = ApiKey(key="one-key-that-is-long-enough", account_id="a", requests_per_minute=1)
    entitlements = Entitlements(require_auth=True, keys=[key])
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, entitlements=entitlements) as gateway:
            async with client_of(gateway, "one-key-that-is-long-enough") as client:
                await client.responses.create(model="m", input="Hi")
                with pytest.raises(openai.RateLimitError):
                    await client.responses.create(model="m", input="Hi", stream=True)
            usage = await gateway.get(
                "/v1/usage", authorization="Bearer one-key-that-is-long-enough"
            )
            (model,) = (await usage.json())["models"]
            assert (model["requests"], model["prompt_tokens"]) == (1, 7)
            assert model["completion_tokens"] == 3


async def test_an_alias_is_answered_under_the_name_that_was_asked() -> None:
    aliases = Catalogue(aliases={"gpt-5": "m"})
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, catalogue=aliases) as gateway:
            assert (await post(gateway, model="gpt-5"))["model"] == "gpt-5"
            assert neuron.seen[0].json["model"] == "m"


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"{", 400, "malformed_json", None),
        (b'{"input":"Hi"}', 400, "missing_model_field", "model"),
        (b'{"model":"no","input":"Hi"}', 404, "model_not_found", "model"),
        (b'{"model":"m"}', 400, "invalid_request", "input"),
        (b'{"model":"m","input":[3]}', 400, "invalid_request", "input[0]"),
        (b'{"model":"m","input":[{}]}', 400, "invalid_request", "input[0]"),
        (b'{"model":"m","input":"Hi","background":true}', 400, "unsupported_field", "background"),
        (
            b'{"model":"m","input":"Hi","tools":[{"type":"file_search"}]}',
            400,
            "unsupported_field",
            "tools[0].type",
        ),
    ],
)
async def test_a_request_that_cannot_be_answered_says_why(
    body: bytes, status: int, code: str, param: str | None
) -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            response = await gateway.post("/v1/responses", body)
            assert response.status == status
            error = (await response.json())["error"]
            assert (error["code"], error["param"]) == (code, param)
            assert neuron.seen == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/responses/resp_no", 404),
        ("DELETE", "/v1/responses/resp_no", 404),
        ("POST", "/v1/responses/resp_no/cancel", 404),
        ("GET", "/v1/responses/resp_no/input_items", 404),
        ("GET", "/v1/responses/resp_no/input_items?limit=0", 400),
        ("GET", "/v1/responses/resp_no?stream=true", 400),
        ("GET", "/v1/responses", 405),
    ],
)
async def test_what_is_not_there_is_told_in_the_envelope(
    method: str, path: str, status: int
) -> None:
    async with run_gateway({}) as gateway:
        async with gateway.session.request(method, gateway.url + path) as response:
            assert response.status == status
            assert (await response.json())["error"]["message"]


@pytest.mark.parametrize("fault", ["die", "no_done", "error_event"])
async def test_a_stream_that_breaks_ends_in_an_error_and_a_failed_response(fault: Any) -> None:
    async with MockNeuron(MockModel("m", "loaded", fault=fault)) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            body = {"model": "m", "input": "Hi", "stream": True}
            response = await gateway.post("/v1/responses", body)
            events = read_events((await response.text()).encode())
            check_grammar(events)
            assert events[-1]["type"] == "response.failed"
            found = await gateway.get(f"/v1/responses/{events[-1]['response']['id']}")
            assert found.status == 404


async def test_the_sdk_raises_what_breaks_a_stream() -> None:
    async with MockNeuron(MockModel("m", "loaded", fault="error_event")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            async with client_of(gateway) as client:
                with pytest.raises(openai.APIError):
                    async for _ in await client.responses.create(
                        model="m", input="Hi", stream=True
                    ):
                        pass


async def test_a_refusal_after_the_first_byte_of_a_cold_stream_is_a_whole_stream() -> None:
    gate = asyncio.Event()
    model = MockModel("m", load_gate=gate, refusal=(400, "context_length_exceeded"))
    async with MockNeuron(model) as neuron:
        async with run_gateway({"a": neuron.endpoint}, keepalive_s=0.02) as gateway:
            body = {"model": "m", "input": "Hi", "stream": True}
            async with gateway.session.post(gateway.url + "/v1/responses", json=body) as response:
                received = await response.content.readany()
                gate.set()
                received += await response.content.read()
            events = read_events(received)
            check_grammar(events)
            assert events[-1]["response"]["error"]["code"] == "context_length_exceeded"


async def test_a_cold_stream_has_signs_of_life_until_the_model_is_loaded() -> None:
    gate = asyncio.Event()
    async with MockNeuron(MockModel("m", load_gate=gate)) as neuron:
        async with run_gateway({"a": neuron.endpoint}, keepalive_s=0.02) as gateway:
            body = {"model": "m", "input": "Hi", "stream": True}
            async with gateway.session.post(gateway.url + "/v1/responses", json=body) as response:
                received = b""
                while received.count(b": keep-alive") < 3:
                    received += await response.content.readany()
                gate.set()
                received += await response.content.read()
            check_grammar(read_events(received))


async def test_another_node_is_tried_before_the_first_byte() -> None:
    bad = MockModel("m", "loaded", fault="reset")
    async with MockNeuron(bad) as broken, MockNeuron(MockModel("m", "loaded")) as sound:
        nodes = {"a": broken.endpoint, "b": sound.endpoint}
        async with run_gateway(nodes) as gateway:
            for stream in (False, True):
                body = {"model": "m", "input": "Hi", "stream": stream}
                response = await gateway.post("/v1/responses", body)
                assert response.status == 200
                assert "Hello world!" in await response.text()


async def test_tokens_of_a_whole_conversation_are_counted_without_loading() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            first = await post(gateway, input="One")
            neuron.models["m"].status = "unloaded"
            body = {
                "model": "m",
                "input": "Two",
                "previous_response_id": first["id"],
                "tools": [WEATHER],
                "reasoning": {"effort": "none"},
                "text": {"verbosity": "low"},
            }
            response = await gateway.post("/v1/responses/input_tokens", body)
            assert response.status == 200
            assert (await response.json())["object"] == "response.input_tokens"
            asked = neuron.seen[-1]
            assert asked.path == "/v1/tokenize"
            assert [each["content"] for each in asked.json["messages"]] == [
                "One",
                "Hello world!",
                "Two",
            ]
            assert asked.json["chat_template_kwargs"] == {
                "verbosity": "low",
                "reasoning_effort": "none",
                "enable_thinking": False,
            }
            assert len(asked.json["tools"]) == 1
            assert neuron.loads == []


async def test_what_is_kept_is_a_metric() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            await post(gateway)
            await post(gateway, store=False)
            told = await gateway.metrics()
            assert told["cortex_responses_kept"] == 1
            assert told["cortex_responses_kept_bytes"] > 500


# The shape of what Codex CLI 0.169.0 sends, in words of our own.
CODEX: dict[str, Any] = {
    "model": "m",
    "input": [
        {
            "type": "message",
            "role": "developer",
            "id": "msg_1",
            "content": [{"type": "input_text", "text": "You write code."}],
        },
        {
            "type": "message",
            "role": "developer",
            "content": [
                {"type": "input_text", "text": "Skills."},
                {"type": "input_text", "text": "Rules."},
            ],
        },
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "Run it."}],
        },
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": None,
            "encrypted_content": "cortex:SG0u",
        },
        {
            "type": "function_call",
            "id": "fc_1",
            "call_id": "call_1",
            "name": "exec_command",
            "arguments": '{"cmd":"ls"}',
            "status": "completed",
        },
        {"type": "function_call_output", "call_id": "call_1", "output": "a\nb"},
        {
            "type": "function_call",
            "call_id": "call_2",
            "namespace": "multi_agent_v1",
            "name": "spawn_agent",
            "arguments": "{}",
        },
        {"type": "function_call_output", "call_id": "call_2", "output": "started"},
    ],
    "tools": [
        {
            "type": "function",
            "name": "exec_command",
            "description": "Run a command.",
            "strict": False,
            "parameters": {"type": "object", "properties": {"cmd": {"type": "string"}}},
        },
        {
            "type": "namespace",
            "name": "multi_agent_v1",
            "description": "Other agents.",
            "tools": [
                {
                    "type": "function",
                    "name": "spawn_agent",
                    "strict": False,
                    "parameters": {"type": "object", "properties": {}},
                }
            ],
        },
        {"type": "web_search", "external_web_access": False},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "session-1",
    "client_metadata": {"x": "y"},
}


async def test_a_turn_of_codex_is_taken_and_its_next_call_is_in_its_namespace() -> None:
    call = {"name": "multi_agent_v1__spawn_agent", "arguments": "{}"}
    async with MockNeuron(MockModel("m", "loaded", tokens=[], tool_call=call)) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            response = await gateway.post("/v1/responses", CODEX)
            events = read_events((await response.text()).encode())
            check_grammar(events)
            (item,) = events[-1]["response"]["output"]
            assert (item["namespace"], item["name"]) == ("multi_agent_v1", "spawn_agent")
            asked = neuron.seen[0].json
            said = [(each["role"], each.get("reasoning_content")) for each in asked["messages"]]
            assert said == [
                ("developer", None),
                ("developer", None),
                ("user", None),
                ("assistant", "Hm."),
                ("tool", None),
                ("assistant", None),
                ("tool", None),
            ]
            assert [each["function"]["name"] for each in asked["tools"]] == [
                "exec_command",
                "multi_agent_v1__spawn_agent",
            ]
            called = asked["messages"][5]["tool_calls"][0]["function"]["name"]
            assert called == "multi_agent_v1__spawn_agent"


async def test_a_stream_is_cancelled_by_its_id() -> None:
    gate = asyncio.Event()
    async with MockNeuron(MockModel("m", "loaded", token_gate=gate)) as neuron:
        async with run_gateway({"a": neuron.endpoint}, keepalive_s=0.02) as gateway:
            async with client_of(gateway) as client:
                stream = await client.responses.create(model="m", input="Hi", stream=True)
                events: list[Any] = []
                async for event in stream:
                    events.append(event)
                    if event.type == "response.output_text.delta" and len(events) < 6:
                        response_id = events[0].response.id
                        found = await client.responses.retrieve(response_id)
                        assert found.status == "in_progress"
                        cancelled = await client.responses.cancel(response_id)
                        assert cancelled.status == "cancelled"
                        assert cancelled.output_text == "Hello"
                        gate.set()
                assert events[-1].type == "response.incomplete"
                assert events[-1].response.status == "cancelled"
                with pytest.raises(openai.NotFoundError):
                    await client.responses.cancel(response_id)


async def test_a_response_that_is_complete_cannot_be_cancelled() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway, client_of(gateway) as client:
            made = await client.responses.create(model="m", input="Hi")
            with pytest.raises(openai.BadRequestError, match="is complete"):
                await client.responses.cancel(made.id)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_the_work(stream: bool) -> None:
    gate = asyncio.Event()
    model = MockModel("m", "loaded", first_gate=gate)
    async with MockNeuron(model) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            body = {"model": "m", "input": "Hi", "stream": stream}
            call = asyncio.ensure_future(gateway.post("/v1/responses", body))
            await neuron.until(lambda: model.in_flight == 1)
            call.cancel()
            await neuron.until(lambda: model.in_flight == 0)


async def test_responses_outlive_a_restart_where_a_file_is_configured(tmp_path: Path) -> None:
    kept = ResponsesConfig(store_file=str(tmp_path / "responses.sqlite"))
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        nodes = {"a": neuron.endpoint}
        async with run_gateway(nodes, responses=kept) as gateway:
            first = await post(gateway, input="One")
        async with run_gateway(nodes, responses=kept) as gateway:
            await post(gateway, input="Two", previous_response_id=first["id"])
            said = [each["content"] for each in neuron.seen[-1].json["messages"]]
            assert said == ["One", "Hello world!", "Two"]
        async with run_gateway(nodes) as gateway:
            assert (await gateway.get(f"/v1/responses/{first['id']}")).status == 404


async def test_a_response_that_is_too_large_to_keep_is_answered_and_says_so() -> None:
    async with MockNeuron(MockModel("m", "loaded", tokens=["x" * (1 << 20)])) as neuron:
        kept = ResponsesConfig(max_mb=1)
        async with run_gateway({"a": neuron.endpoint}, responses=kept) as gateway:
            assert (await post(gateway))["store"] is False
            body = {"model": "m", "input": "Hi", "stream": True}
            response = await gateway.post("/v1/responses", body)
            events = read_events((await response.text()).encode())
            assert events[-1]["response"]["store"] is False


async def test_a_store_that_breaks_is_told_and_keeps_nobody_from_answers(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        kept = ResponsesConfig(store_file=str(path))
        async with run_gateway({"a": neuron.endpoint}, responses=kept) as gateway:
            first = await post(gateway)
            database = sqlite3.connect(path)
            database.execute("DROP TABLE responses")
            database.close()
            assert (await post(gateway))["store"] is False
            body = {"model": "m", "input": "Hi", "previous_response_id": first["id"]}
            refused = await gateway.post("/v1/responses", body)
            assert refused.status == 503
            assert (await refused.json())["error"]["code"] == "response_store_unavailable"


async def test_a_conversation_named_by_its_cache_key_goes_to_one_node() -> None:
    models = [MockModel("m", "loaded"), MockModel("m", "loaded")]
    async with MockNeuron(models[0]) as one, MockNeuron(models[1]) as other:
        async with run_gateway({"a": one.endpoint, "b": other.endpoint}) as gateway:
            for turn in range(4):
                text = f"{turn} " + "word " * 2000
                await post(gateway, input=text, prompt_cache_key="conversation", store=False)
            assert sorted([len(one.seen), len(other.seen)]) == [0, 4]


async def test_the_sdk_streams_text_and_a_call() -> None:
    model = MockModel("m", "loaded", tokens=["Let me ", "look."], tool_call=CALL)
    async with MockNeuron(model) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway, client_of(gateway) as client:
            async with client.responses.stream(
                model="m", input="Weather in Paris?", tools=[WEATHER]
            ) as stream:
                async for _ in stream:
                    pass
                final = await stream.get_final_response()
            text, call = final.output
            assert final.output_text == "Let me look."
            assert text.type == "message"
            assert call.type == "function_call"
            assert (call.name, call.arguments) == ("weather", '{"city":"Paris"}')
            whole = await client.responses.create(model="m", input="Hi", tools=[WEATHER])
            assert [item.type for item in whole.output] == ["message", "function_call"]
