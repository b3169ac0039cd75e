"""Metrics: what a scrape says after requests, loads and losses."""

import asyncio

import pytest

from cortex.core.neuron_api import DeviceHealth, ModelInfo, ModelLoad, NeuronHealth
from cortex.core.openai import SSE_DONE, PromptTokensDetails, Usage, usage_comment
from cortex.gateway.fleet import Fleet
from cortex.gateway.metrics import Metrics, RequestTiming
from cortex.gateway.proxy import StreamMeter
from tests.support.gateway import RunningGateway, run_gateway
from tests.support.mock_neuron import MockModel, MockNeuron

AT = '{model="m",node="a"}'


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def chunk(delta: str) -> bytes:
    return b'data: {"choices":[{"index":0,"delta":' + delta.encode() + b"}]}\n\n"


async def settled(gateway: RunningGateway, name: str, value: float) -> dict[str, float]:
    """Scrape until a sample has its value: a stream is counted just after its last byte."""
    async with asyncio.timeout(5):
        while (samples := await gateway.metrics()).get(name) != value:
            continue
    return samples


async def test_a_request_is_counted_with_its_tokens() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            await gateway.chat()
            samples = await gateway.metrics()
            assert samples["cortex_requests_total" + AT] == 1
            assert samples["cortex_prompt_tokens_total" + AT] == 7
            assert samples["cortex_completion_tokens_total" + AT] == 3
            assert samples["cortex_cached_prompt_tokens_total" + AT] == 2
            assert samples["cortex_request_duration_seconds_count" + AT] == 1
            assert "cortex_request_errors_total" + AT not in samples
            assert "cortex_time_to_first_token_seconds_count" + AT not in samples


async def test_a_stream_is_counted_with_its_usage_first_token_and_rate() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            await gateway.chat(stream=True, stream_options={"include_usage": True})
            samples = await settled(gateway, "cortex_requests_total" + AT, 1)
            assert samples["cortex_prompt_tokens_total" + AT] == 7
            assert samples["cortex_completion_tokens_total" + AT] == 3
            assert samples["cortex_time_to_first_token_seconds_count" + AT] == 1


async def test_a_stream_without_usage_is_counted_by_its_chunks() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            await gateway.chat(stream=True)
            samples = await settled(gateway, "cortex_requests_total" + AT, 1)
            assert samples["cortex_completion_tokens_total" + AT] == 3


async def test_tokens_are_counted_for_the_account_of_the_key() -> None:
    async with MockNeuron(MockModel("m", "loaded")) as neuron:
        async with run_gateway({"a": neuron.endpoint}, keys=("secret",)) as gateway:
            body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
            await gateway.post("/v1/chat/completions", body, x_api_key="secret")
            samples = await gateway.metrics()
            labels = '{account="test",key="2bb80d53"}'
            assert samples["cortex_spend_tokens_total" + labels] == 10
            assert samples["cortex_spend_prompt_tokens_total" + labels] == 7
            assert samples["cortex_spend_completion_tokens_total" + labels] == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_of_the_node_counts_as_an_error_of_that_node(stream: bool) -> None:
    model = MockModel("m", "loaded", refusal=(500, "internal_server_error"))
    async with MockNeuron(model) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            await gateway.chat(stream=stream)
            samples = await gateway.metrics()
            assert samples["cortex_requests_total" + AT] == 1
            assert samples["cortex_request_errors_total" + AT] == 1


async def test_a_stream_that_breaks_counts_as_an_error() -> None:
    for fault in ("die", "error_event"):
        model = MockModel("m", "loaded", fault=fault)  # type: ignore[arg-type]
        async with MockNeuron(model) as neuron:
            async with run_gateway({"a": neuron.endpoint}) as gateway:
                await gateway.chat(stream=True)
                await settled(gateway, "cortex_request_errors_total" + AT, 1)


async def test_routing_failures_count_without_a_node_and_unknown_names_without_a_model() -> None:
    model = MockModel("m", "recovering")
    async with MockNeuron(model) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            await gateway.chat()
            await gateway.chat("made-up")
            samples = await gateway.metrics()
            assert samples['cortex_request_errors_total{model="m",node=""}'] == 1
            assert samples['cortex_request_errors_total{model="",node=""}'] == 1


async def test_a_cold_start_is_counted_once_with_its_load() -> None:
    async with MockNeuron(MockModel("m")) as neuron:
        async with run_gateway({"a": neuron.endpoint}) as gateway:
            await gateway.chat()
            await gateway.chat()
            samples = await gateway.metrics()
            assert samples["cortex_cold_starts_total" + AT] == 1
            assert samples['cortex_model_loads_total{model="m",node="a",outcome="loaded"}'] == 1
            assert samples["cortex_model_load_seconds_count" + AT] == 1
            assert samples["cortex_evictions_total"] == 0


async def test_metrics_are_on_their_own_listener_only() -> None:
    async with run_gateway({}) as gateway:
        assert (await gateway.get("/metrics")).status == 404
        async with gateway.session.get(gateway.metrics_url + "/metrics") as response:
            assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        async with gateway.session.get(gateway.metrics_url + "/v1/models") as response:
            assert response.status == 404


def scrape(metrics: Metrics) -> list[str]:
    return [line for line in metrics.render().decode().splitlines() if not line.startswith("#")]


def test_gauges_follow_the_fleet_and_leave_nothing_behind() -> None:
    fleet = Fleet([("a", "http://a")])
    metrics = Metrics(fleet)
    health = NeuronHealth(
        uptime_secs=1,
        devices=[DeviceHealth(index=0, vram_used_mb=10, vram_free_mb=90, temp_c=50)],
        models=[ModelLoad(id="m", in_flight=2, queue_depth=1, tok_s_decode=33.0)],
    )
    info = ModelInfo(id="m", harness="torch", status="loaded")
    fleet.record_reading("a", [info], health, stamp=0)
    lines = scrape(metrics)
    assert 'cortex_node_up{node="a"} 1.0' in lines
    assert 'cortex_model_in_flight{model="m",node="a"} 2.0' in lines
    assert 'cortex_model_queue_depth{model="m",node="a"} 1.0' in lines
    assert 'cortex_model_tok_s_decode{model="m",node="a"} 33.0' in lines
    assert 'cortex_device_vram_free_mb{device="0",node="a"} 90.0' in lines
    fleet.record_reading("a", [], NeuronHealth(uptime_secs=2), stamp=0)
    assert not [line for line in scrape(metrics) if "cortex_model_" in line or "device" in line]
    for _ in range(3):
        fleet.record_failure("a", "gone")
    assert 'cortex_node_up{node="a"} 0.0' in scrape(metrics)


@pytest.mark.parametrize(
    ("name", "edges"),
    [
        (
            "cortex_request_duration_seconds",
            "0.1 0.5 1.0 2.5 5.0 10.0 30.0 60.0 120.0 300.0 600.0 1200.0",
        ),
        (
            "cortex_time_to_first_token_seconds",
            "0.05 0.1 0.25 0.5 1.0 2.0 5.0 10.0 20.0 30.0 60.0 120.0",
        ),
        ("cortex_tokens_per_second", "1.0 2.5 5.0 10.0 15.0 20.0 30.0 40.0 60.0 80.0 120.0 200.0"),
    ],
)
def test_histograms_have_the_documented_buckets(name: str, edges: str) -> None:
    metrics = Metrics(Fleet([]))
    metrics.record(
        RequestTiming(model="m", node="a", ttft_s=0.2, decode_s=1.0, completion_tokens=5)
    )
    buckets = [line for line in scrape(metrics) if line.startswith(f"{name}_bucket")]
    found = [line.partition('le="')[2].partition('"')[0] for line in buckets]
    assert found == [*edges.split(), "+Inf"]


def test_first_token_is_the_first_content_and_not_the_role_chunk() -> None:
    clock, timing = Clock(), RequestTiming(model="m")
    meter = StreamMeter(timing, 0.0, clock)
    for now_s, piece in [
        (1.0, chunk('{"role":"assistant","content":""}')),
        (3.0, b": keep-alive\n\n"),
        (4.0, chunk('{"content":"a"}')),
        (5.0, chunk('{"content":"b"}')),
        (6.0, chunk('{"content":"c"}')),
    ]:
        clock.now_s = now_s
        meter.feed(piece)
    meter.close()
    assert (timing.ttft_s, timing.decode_s, timing.completion_tokens) == (4.0, 2.0, 3)


@pytest.mark.parametrize(
    "delta",
    [
        '{"content": "a"}',
        '{"reasoning_content":"a"}',
        '{"content":"\\\\n"}',
        '{"tool_calls":[{"index":0,"id":"c"}]}',
    ],
)
def test_text_reasoning_and_tool_calls_are_content(delta: str) -> None:
    clock, timing = Clock(), RequestTiming(model="m")
    clock.now_s = 2.0
    StreamMeter(timing, 0.0, clock).feed(chunk(delta))
    assert timing.ttft_s == 2.0


def test_a_text_completions_tokens_are_seen_as_well() -> None:
    clock, timing = Clock(), RequestTiming(model="m")
    meter = StreamMeter(timing, 0.0, clock)
    for now_s, text in ((1.0, ""), (4.0, "a"), (5.0, "b"), (6.0, '\\"text\\":\\"c'), (7.0, "")):
        clock.now_s = now_s
        meter.feed(b'data: {"choices":[{"index":0,"text":"%b"}]}\n\n' % text.encode())
    meter.close()
    assert (timing.ttft_s, timing.decode_s, timing.completion_tokens) == (4.0, 3.0, 3)


@pytest.mark.parametrize("cut", range(1, 55))
def test_a_first_token_that_two_chunks_share_is_seen(cut: int) -> None:
    whole = chunk('{"content":"a"}')
    clock, timing = Clock(), RequestTiming(model="m")
    meter = StreamMeter(timing, 0.0, clock)
    meter.feed(chunk('{"content":""}') + whole[:cut])
    clock.now_s = 1.0
    meter.feed(whole[cut:])
    assert timing.ttft_s == (1.0 if b'"a' not in whole[:cut] else 0.0)


def test_usage_is_read_from_the_last_frames_even_when_they_come_in_pieces() -> None:
    timing = RequestTiming(model="m")
    meter = StreamMeter(timing, 0.0, Clock())
    usage = (
        b'data: {"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":5,'
        b'"prompt_tokens_details":{"cached_tokens":4}}}\n\ndata: [DONE]\n\n'
    )
    for _ in range(100):
        meter.feed(chunk('{"content":"a"}'))
    meter.feed(usage[:40])
    meter.feed(usage[40:])
    assert meter.has_ended
    meter.close()
    assert (timing.prompt_tokens, timing.completion_tokens, timing.cached_tokens) == (11, 5, 4)


def test_usage_that_the_caller_did_not_ask_for_is_read_from_the_nodes_comment() -> None:
    timing = RequestTiming(model="m")
    meter = StreamMeter(timing, 0.0, Clock())
    meter.feed(b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n')
    meter.feed(usage_comment(Usage(prompt_tokens=7, completion_tokens=3)) + SSE_DONE)
    assert meter.has_ended
    meter.close()
    assert (timing.prompt_tokens, timing.completion_tokens) == (7, 3)


def test_of_a_stream_that_is_left_the_prompt_is_known_from_its_first_chunk() -> None:
    timing = RequestTiming(model="m")
    meter = StreamMeter(timing, 0.0, Clock())
    told = Usage(
        prompt_tokens=7,
        completion_tokens=0,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=2),
    )
    meter.feed(usage_comment(told) + chunk('{"role":"assistant","content":""}'))
    for _ in range(100):
        meter.feed(chunk('{"content":"a"}'))
    meter.close()
    assert (timing.prompt_tokens, timing.completion_tokens, timing.cached_tokens) == (7, 100, 2)


def test_an_answer_that_quotes_the_end_mark_has_not_ended() -> None:
    meter = StreamMeter(RequestTiming(model="m"), 0.0, Clock())
    meter.feed(chunk('{"content":"ends with data: [DONE]"}'))
    assert not meter.has_ended
    meter.feed(b"data: [DONE]\n\n")
    assert meter.has_ended
