"""Anthropic messages through a whole gateway, translated to the node's dialect and back."""

import asyncio
from typing import Any

import anthropic
import msgspec
import pytest

from cortex.core.anthropic import PING
from cortex.core.catalogue import Catalogue
from tests.support.gateway import RunningGateway, run_gateway
from tests.support.mock_neuron import MockModel, MockNeuron

CALL = {"name": "weather", "arguments": '{"city":"Paris"}'}


def message(**fields: object) -> dict[str, object]:
    return {
        "model": "m",
        "max_tokens": 100,
        "messages": [{"role": "user", "content": "Hi"}],
        **fields,
    }


def events(body: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in body.strip().split("\n\n"):
        name, data = block.split("\n", 1)
        decoded = msgspec.json.decode(data.removeprefix("data: "))
        found.append((name.removeprefix("event: "), decoded))
    return found


def client_of(gateway: RunningGateway) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=gateway.url, api_key="any", max_retries=0)


async def test_a_message_goes_round() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            response = await gateway.post("/v1/messages?beta=true", message())
            assert response.status == 200
            answer = await response.json()
            assert (answer["type"], answer["role"], answer["model"]) == (
                "message",
                "assistant",
                "m",
            )
            assert answer["content"] == [{"type": "text", "text": "Hello world!"}]
            assert answer["stop_reason"] == "end_turn"
            assert answer["usage"]["output_tokens"] == 3
            asked = neuron.seen[0].json
            assert asked["max_tokens"] == 100
            assert asked["messages"] == [{"role": "user", "content": "Hi"}]


async def test_system_text_and_blocks_reach_the_node_in_its_dialect() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            response = await gateway.post(
                "/v1/messages",
                message(
                    system=[
                        {"type": "text", "text": "x-anthropic-billing-header: cc=1"},
                        {"type": "text", "text": "Be brief."},
                    ],
                    messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
                ),
            )
            assert response.status == 200
            sent = neuron.seen[0].json["messages"]
            assert sent[0] == {"role": "system", "content": "Be brief."}
            assert sent[1]["role"] == "user"


async def test_the_billing_block_stays_where_the_operator_says_so() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, strip_billing_header=False) as gateway:
            system = [{"type": "text", "text": "x-anthropic-billing-header: cc=1"}]
            assert (await gateway.post("/v1/messages", message(system=system))).status == 200
            assert "x-anthropic-billing-header" in str(neuron.seen[0].json["messages"][0])


async def test_an_alias_is_answered_under_the_name_that_was_asked() -> None:
    aliases = Catalogue(aliases={"claude-opus-4-8": "m"})
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, catalogue=aliases) as gateway:
            response = await gateway.post("/v1/messages", message(model="claude-opus-4-8"))
            assert (await response.json())["model"] == "claude-opus-4-8"
            assert neuron.seen[0].json["model"] == "m"


async def test_an_unknown_model_is_404_in_the_dialect() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            for stream in (False, True):
                response = await gateway.post("/v1/messages", message(model="no", stream=stream))
                assert response.status == 404
                assert await response.json() == {
                    "type": "error",
                    "error": {
                        "type": "not_found_error",
                        "message": "model 'no' does not exist; available: m",
                    },
                }


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b'{"model":"m","messages":[{"role":"user","content":"Hi"}]}',
        b'{"model":"m","max_tokens":5,"messages":[]}',
        b'{"model":"m","max_tokens":5,"messages":"Hi"}',
        b'{"max_tokens":5,"messages":[{"role":"user","content":"Hi"}]}',
    ],
)
async def test_an_invalid_body_is_400_in_the_dialect(body: bytes) -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            response = await gateway.post("/v1/messages", body)
            assert response.status == 400
            answer = await response.json()
            assert answer["type"] == "error"
            assert answer["error"]["type"] == "invalid_request_error"
            assert neuron.seen == []


async def test_a_node_that_talks_nonsense_is_502_in_the_dialect() -> None:
    async with MockNeuron(MockModel("m", "loaded", fault="malformed")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            response = await gateway.post("/v1/messages", message())
            assert response.status == 502
            assert (await response.json())["error"]["type"] == "api_error"


async def test_a_stream_has_its_events_in_order_with_usage() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            response = await gateway.post("/v1/messages", message(stream=True))
            assert response.content_type == "text/event-stream"
            found = events(await response.text())
            assert [name for name, _ in found] == [
                "message_start",
                "content_block_start",
                "content_block_delta",
                "content_block_delta",
                "content_block_delta",
                "content_block_stop",
                "message_delta",
                "message_stop",
            ]
            assert found[0][1]["message"]["model"] == "m"
            assert found[6][1]["delta"]["stop_reason"] == "end_turn"
            assert found[6][1]["usage"]["output_tokens"] == 3


async def test_a_cold_stream_pings_until_the_model_is_loaded() -> None:
    gate = asyncio.Event()
    async with MockNeuron(MockModel("m", load_gate=gate)) as neuron:
        async with run_gateway({"a": neuron.endpoint}, keepalive_s=0.02) as gateway:
            body = message(stream=True)
            async with gateway.session.post(gateway.url + "/v1/messages", json=body) as response:
                assert response.status == 200
                received = b""
                while received.count(PING) < 3:
                    received += await response.content.readany()
                gate.set()
                received += await response.content.read()
            found = [name for name, _ in events(received.replace(PING, b"").decode())]
            assert (found[0], found[-1]) == ("message_start", "message_stop")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mcp_servers": [{"type": "url", "url": "https://x", "name": "s"}]}, "mcp_servers"),
        ({"container": "c1"}, "container"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
    ],
)
async def test_what_only_the_vendor_can_do_is_400_by_name_and_loads_nothing(
    fields: dict[str, Any], words: str, stream: bool
) -> None:
    async with MockNeuron(MockModel("m")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            response = await gateway.post("/v1/messages", message(stream=stream, **fields))
            assert response.status == 400
            error = (await response.json())["error"]
            assert error["type"] == "invalid_request_error"
            assert words in error["message"]
            assert (neuron.seen, neuron.loads) == ([], [])


@pytest.mark.parametrize("fault", ["die", "no_done", "error_event"])
async def test_a_stream_that_breaks_ends_in_the_dialects_error_event(fault: str) -> None:
    model = MockModel("m", "loaded", fault=fault)  # type: ignore[arg-type]
    async with MockNeuron(model) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            response = await gateway.post("/v1/messages", message(stream=True))
            names = [name for name, _ in events(await response.text())]
            assert names[-1] == "error"
            assert names.count("error") == 1
            assert "message_stop" not in names


async def test_tokens_are_counted_by_a_node_without_loading_the_model() -> None:
    async with MockNeuron(MockModel("m")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            body = {
                "model": "m",
                "system": "Be very brief.",
                "messages": [{"role": "user", "content": "How are you?"}],
                "tools": [{"name": "t", "input_schema": {"type": "object"}}],
            }
            response = await gateway.post("/v1/messages/count_tokens", body)
            assert response.status == 200
            assert await response.json() == {"input_tokens": 7}
            assert neuron.seen[0].path == "/v1/tokenize"
            assert neuron.loads == []


async def test_tools_that_a_choice_hides_are_told_to_be_hidden_when_counting() -> None:
    async with MockNeuron(MockModel("m")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            for kind, told in (("none", "none"), ("auto", None), ("any", None)):
                body = {
                    "model": "m",
                    "messages": [{"role": "user", "content": "Hi"}],
                    "tools": [{"name": "t", "input_schema": {"type": "object"}}],
                    "tool_choice": {"type": kind},
                }
                response = await gateway.post("/v1/messages/count_tokens", body)
                assert response.status == 200
                assert neuron.seen[-1].json.get("tool_choice") == told


async def test_counting_for_an_unknown_model_is_404_and_without_nodes_overloaded() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
    async with MockNeuron() as neuron, run_gateway({"a": neuron.endpoint}) as gateway:
        assert (await gateway.post("/v1/messages/count_tokens", body)).status == 404
    async with run_gateway({}) as gateway:
        response = await gateway.post("/v1/messages/count_tokens", body)
        assert (response.status, response.headers["retry-after"]) == (529, "5")
        assert (await response.json())["error"]["type"] == "overloaded_error"


async def test_the_sdk_accumulates_text_and_a_tool_call_from_a_cold_stream() -> None:
    gate = asyncio.Event()
    model = MockModel("m", tokens=["Let me ", "look."], tool_call=CALL, load_gate=gate)
    async with MockNeuron(model) as neuron:
        async with run_gateway({"a": neuron.endpoint}, keepalive_s=0.02) as gateway:
            async with client_of(gateway) as client:
                async with client.messages.stream(
                    model="m",
                    max_tokens=50,
                    messages=[{"role": "user", "content": "Weather in Paris?"}],
                    tools=[{"name": "weather", "input_schema": {"type": "object"}}],
                ) as stream:
                    gate.set()
                    final = await stream.get_final_message()
            assert final.stop_reason == "tool_use"
            text, call = final.content
            assert text.type == "text"
            assert text.text == "Let me look."
            assert call.type == "tool_use"
            assert (call.name, call.input) == ("weather", {"city": "Paris"})
            assert final.usage.output_tokens == 2


async def test_the_sdk_raises_its_own_errors() -> None:
    async with run_gateway({}, keys=("secret",)) as gateway, client_of(gateway) as client:
        with pytest.raises(anthropic.AuthenticationError):
            await client.messages.create(
                model="m", max_tokens=5, messages=[{"role": "user", "content": "Hi"}]
            )
