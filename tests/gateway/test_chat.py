"""OpenAI chat through a whole gateway: bytes through, errors in the envelope."""

import asyncio
import time

import msgspec
import pytest

from cortex.core.catalogue import Catalogue
from cortex.core.errors import UpstreamConnectionError
from cortex.core.openai import KEEPALIVE
from cortex.gateway.fleet import Fleet
from cortex.gateway.metrics import RequestTiming
from cortex.gateway.proxy import Exchange, Limits, StreamMeter
from tests.support.gateway import run_gateway
from tests.support.mock_neuron import MockModel, MockNeuron


async def test_a_chat_request_reaches_the_node_and_its_answer_comes_back_unchanged() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            body = b'{"model":"m", "messages":[{"role":"user","content":"Hi"}],  "x_new": [1.0]}'
            response = await gateway.post("/v1/chat/completions", body)
            assert response.status == 200
            answer = await response.json()
            assert answer["choices"][0]["message"]["content"] == "Hello world!"
            assert answer["usage"]["prompt_tokens"] == 7
            assert neuron.seen[0].body == body


async def test_an_alias_changes_the_model_and_nothing_else_in_the_body() -> None:
    aliases = Catalogue(aliases={"fast": "m"})
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, catalogue=aliases) as gateway:
            body = (
                b'{"x":[1.50,{"y":null}],"model":"fast","messages":[{"role":"user","content":"a"}]}'
            )
            response = await gateway.post("/v1/chat/completions", body)
            assert response.status == 200
            assert neuron.seen[0].body == body.replace(b'"fast"', b'"m"')


async def test_the_callers_key_stays_in_the_gateway_and_its_request_id_goes_on() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, keys=("secret",)) as gateway:
            response = await gateway.post(
                "/v1/chat/completions",
                {"model": "m", "messages": [{"role": "user", "content": "Hi"}]},
                authorization="Bearer secret",
                x_request_id="r-1",
            )
            assert response.status == 200
            headers = {name.lower(): value for name, value in neuron.seen[0].headers.items()}
            assert "authorization" not in headers
            assert headers["x-request-id"] == "r-1"


async def test_a_stream_is_relayed_byte_for_byte_up_to_done() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            response = await gateway.chat(stream=True)
            assert response.status == 200
            assert response.content_type == "text/event-stream"
            text = await response.text()
            assert text.endswith("data: [DONE]\n\n")
            async with gateway.session.post(
                neuron.endpoint + "/v1/chat/completions", data=neuron.seen[0].body
            ) as direct:
                assert text == await direct.text()


async def test_the_first_token_arrives_while_the_node_is_still_at_work() -> None:
    gate = asyncio.Event()
    model = MockModel("m", "loaded", token_gate=gate)
    async with MockNeuron(model) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            async with gateway.open_chat() as response:
                received = b""
                while b"Hello" not in received:
                    received += await response.content.readany()
                assert b"world" not in received
                gate.set()
                rest = await response.content.read()
                assert b"world" in rest
                assert rest.endswith(b"data: [DONE]\n\n")


async def test_silence_is_filled_with_comments_while_the_node_prefills() -> None:
    gate = asyncio.Event()
    async with MockNeuron(MockModel("m", "loaded", first_gate=gate)) as neuron:
        async with run_gateway({"a": neuron.endpoint}, keepalive_s=0.02) as gateway:
            async with gateway.open_chat() as response:
                received = b""
                while received.count(KEEPALIVE) < 3:
                    received += await response.content.readany()
                assert received.replace(KEEPALIVE, b"") == b""
                gate.set()
                assert (await response.content.read()).endswith(b"data: [DONE]\n\n")


async def test_a_client_that_leaves_in_mid_stream_ends_the_nodes_work_at_once() -> None:
    model = MockModel("m", "loaded", token_gate=asyncio.Event())
    async with MockNeuron(model) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            async with gateway.open_chat() as response:
                assert await response.content.readany()
                assert dict(gateway.apps.fleet.snapshot().leases) == {("a", "m"): 1}
            response.close()
            await neuron.until(lambda: neuron.cancelled == 1 and model.in_flight == 0)
            assert dict(gateway.apps.fleet.snapshot().leases) == {}


async def test_a_client_that_leaves_before_a_whole_answer_ends_the_nodes_work_too() -> None:
    model = MockModel("m", "loaded", first_gate=asyncio.Event())
    async with MockNeuron(model) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await gateway.chat()
            await neuron.until(lambda: neuron.cancelled == 1 and model.in_flight == 0)
            assert dict(gateway.apps.fleet.snapshot().leases) == {}


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"{", 400, "malformed_json", None),
        (b"", 400, "malformed_json", None),
        (b'{"messages": []}', 400, "missing_model_field", "model"),
        (b'{"model": "", "messages": []}', 400, "missing_model_field", "model"),
        (b'{"model": 7, "messages": []}', 400, "invalid_request", "model"),
        (b'{"model": "m", "stream": "yes"}', 400, "invalid_request", "stream"),
        (b"[]", 400, "invalid_request", None),
    ],
)
async def test_a_bad_body_is_400_in_the_envelope(
    body: bytes, status: int, code: str, param: str | None
) -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            response = await gateway.post("/v1/chat/completions", body)
            error = (await response.json())["error"]
            assert (response.status, error["code"], error["param"]) == (status, code, param)
            assert error["type"] == "invalid_request_error"
            assert neuron.seen == []


@pytest.mark.parametrize("stream", [False, True])
async def test_what_no_model_can_do_is_400_by_name_and_loads_nothing(stream: bool) -> None:
    async with MockNeuron(MockModel("m")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            response = await gateway.chat(web_search_options={}, stream=stream)
            assert response.status == 400
            error = (await response.json())["error"]
            assert (error["code"], error["param"]) == ("unsupported_field", "web_search_options")
            assert (neuron.seen, neuron.loads) == ([], [])


async def test_a_body_over_the_limit_is_413() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, max_body_mb=1) as gateway:
            response = await gateway.post("/v1/chat/completions", b" " * (1 << 20) + b"{}")
            assert response.status == 413
            assert (await response.json())["error"]["code"] == "body_too_large"


async def test_a_body_of_three_megabytes_passes() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            text = "x" * (3 << 20)
            response = await gateway.chat(messages=[{"role": "user", "content": text}])
            assert response.status == 200
            assert neuron.seen[0].json["messages"][0]["content"] == text


async def test_an_unknown_model_is_404_and_lists_what_there_is() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            for stream in (False, True):
                response = await gateway.chat("nope", stream=stream)
                assert response.status == 404
                assert await response.json() == {
                    "error": {
                        "message": "model 'nope' does not exist; available: m",
                        "type": "invalid_request_error",
                        "code": "model_not_found",
                        "param": "model",
                    }
                }


async def test_without_a_healthy_node_the_answer_is_503_with_retry_after() -> None:
    async with run_gateway({"a": "http://127.0.0.1:9"}) as gateway:
        response = await gateway.chat()
        assert response.status == 503
        assert response.headers["retry-after"] == "5"
        assert (await response.json())["error"]["code"] == "service_unavailable"


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1/audio/speech", "/v2"])
async def test_an_unknown_path_is_404_in_the_envelope(path: str) -> None:
    async with run_gateway({}) as gateway:
        response = await gateway.post(path, {})
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "route_not_found"


async def test_a_wrong_method_is_405_and_a_query_string_is_no_matter() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            response = await gateway.get("/v1/chat/completions")
            assert response.status == 405
            assert (await response.json())["error"]["code"] == "method_not_allowed"
            response = await gateway.post(
                "/v1/chat/completions?beta=true",
                {"model": "m", "messages": [{"role": "user", "content": "Hi"}]},
            )
            assert response.status == 200


async def test_the_nodes_own_error_keeps_status_code_and_retry_after() -> None:
    model = MockModel("m", "loaded", refusal=(400, "context_length_exceeded"))
    async with MockNeuron(model) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            for stream in (False, True):
                response = await gateway.chat(stream=stream)
                assert response.status == 400
                assert (await response.json())["error"]["code"] == "context_length_exceeded"
            model.refusal = (503, "queue_full")
            response = await gateway.chat(stream=True)
            assert (response.status, response.headers["retry-after"]) == (503, "7")
            assert (await response.json())["error"]["code"] == "queue_full"


@pytest.mark.parametrize(
    ("fault", "code"),
    [("die", "upstream_connection_error"), ("no_done", "upstream_connection_error")],
)
async def test_a_stream_that_breaks_ends_in_an_error_event_and_not_in_done(
    fault: str, code: str
) -> None:
    model = MockModel("m", "loaded", fault=fault)  # type: ignore[arg-type]
    async with MockNeuron(model) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            response = await gateway.chat(stream=True)
            assert response.status == 200
            text = await response.text()
            assert "Hello" in text
            assert "[DONE]" not in text
            last = text.strip().split("\n\n")[-1]
            assert msgspec.json.decode(last.removeprefix("data: "))["error"]["code"] == code


async def test_an_error_event_of_the_node_is_the_streams_last_word() -> None:
    async with MockNeuron(MockModel("m", "loaded", fault="error_event")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            text = await (await gateway.chat(stream=True)).text()
            events = text.strip().split("\n\n")
            assert '"code":"engine_died"' in events[-1]
            assert sum('"error"' in event for event in events) == 1
            assert "[DONE]" not in text


async def test_a_stream_that_falls_silent_ends_in_an_error_event() -> None:
    model = MockModel("m", "loaded", token_gate=asyncio.Event())
    async with MockNeuron(model) as neuron:
        async with run_gateway({"a": neuron.endpoint}, stall_s=0.05) as gateway:
            text = await (await gateway.chat(stream=True)).text()
            assert "node a sent no token for 0.05 s" in text
            assert "[DONE]" not in text
            await neuron.until(lambda: model.in_flight == 0)


class CommentingReply:
    """A node that says it is there, and nothing else."""

    node = "a"

    async def read_chunk(self) -> bytes:
        await asyncio.sleep(0.005)
        return KEEPALIVE


async def test_a_stream_that_only_gets_comments_after_a_token_is_given_up() -> None:
    meter = StreamMeter(RequestTiming(model="m"), time.monotonic(), time.monotonic)
    meter.feed(b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n')
    lease = Fleet([("a", "http://a")]).lease("a", "m")
    limits = Limits(first_token_s=60, stall_s=0.05)
    exchange = Exchange(lease, CommentingReply(), limits, meter)  # type: ignore[arg-type]

    async def read_on() -> None:
        while True:
            await exchange.next_chunk()

    with pytest.raises(UpstreamConnectionError, match=r"sent no token for 0\.05 s"):
        await read_on()


async def test_a_node_that_never_answers_is_given_up_after_the_first_token_limit() -> None:
    async with MockNeuron(MockModel("m", "loaded", fault="hang")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, first_token_s=0.05) as gateway:
            response = await gateway.chat(stream=True)
            assert response.status == 502
            message = (await response.json())["error"]["message"]
            assert message == "node a produced no token within 0.05 s"


async def test_a_stream_request_answered_with_something_else_is_502() -> None:
    async with MockNeuron(MockModel("m", "loaded", fault="malformed")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            response = await gateway.chat(stream=True)
            assert response.status == 502
            error = (await response.json())["error"]
            assert error["code"] == "upstream_malformed_response"
