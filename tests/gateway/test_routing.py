"""What routing learns from requests, and that conversations go where they are cached."""

import asyncio
from dataclasses import replace

import msgspec
import pytest

from cortex.core.catalogue import Catalogue
from cortex.core.config import GatewayConfig
from cortex.core.neuron_api import ModelInfo
from cortex.gateway.fleet import Fleet
from cortex.gateway.live import Live
from cortex.gateway.metrics import RequestTiming
from cortex.gateway.rates import RateBook
from cortex.gateway.router import Serve
from cortex.gateway.routing import Routing, Trip
from tests.support.gateway import RunningGateway, run_gateway
from tests.support.mock_neuron import MockModel, MockNeuron
from tests.support.pictures import image_part, png

LONG = "All work and no play makes a dull prompt. " * 400


class Clock:
    """Seconds in the test's hands."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Bench:
    """Routing over nodes that hold `m`."""

    def __init__(self, *names: str) -> None:
        self.clock = Clock()
        self.fleet = Fleet([(name, f"http://{name}") for name in names])
        for name in names:
            self.report(name)
        live = Live(GatewayConfig(), Catalogue())
        self.routing = Routing(live, self.fleet, RateBook(), clock=self.clock)

    def report(self, name: str, status: str = "loaded", resident_s: float | None = None) -> None:
        info = ModelInfo(id="m", harness="torch", status=status, resident_s=resident_s)
        self.fleet.record_reading(name, [info], None, stamp=self.fleet.begin_reading())

    def go(self, trip: Trip) -> Serve:
        route = self.routing.choose(trip)
        assert isinstance(route, Serve)
        return route


def trip(text: str = LONG, session: str = "") -> Trip:
    messages = [{"role": "user", "content": text}]
    return Trip("m", msgspec.json.encode({"model": "m", "messages": messages}), session)


def told(prompt: int = 4000, cached: int = 0, **fields: object) -> RequestTiming:
    return RequestTiming(model="m", prompt_tokens=prompt, cached_tokens=cached, **fields)  # type: ignore[arg-type]


def test_nothing_is_hashed_where_there_is_no_choice() -> None:
    bench = Bench("a")
    asked = trip()
    bench.routing.begin(asked, bench.go(asked))
    assert asked.chain is None
    assert len(bench.routing.prefixes) == 0


def test_the_same_prompt_goes_to_the_same_node_once_it_is_idle_again() -> None:
    bench = Bench("a", "b")
    first = trip()
    serve = bench.go(first)
    leg = bench.routing.begin(first, replace(serve, node="b"))
    leg.first_token()
    leg.end(told())
    bench.clock.now_s += 60
    assert bench.go(trip()).node == "b"
    assert bench.go(trip("something else " * 300)).node == "a"


def test_prompts_in_hand_make_a_node_dear_even_for_those_it_has_cached() -> None:
    bench = Bench("a", "b")
    nodes = []
    for _ in range(4):
        asked = trip()
        serve = bench.go(asked)
        nodes.append(serve.node)
        bench.routing.begin(asked, serve)
        bench.fleet.lease(serve.node, "m")
    # The second finds all of the prompt at `a`, but `a` has not worked it off.
    assert set(nodes) == {"a", "b"}


def test_a_restarted_engine_is_expected_to_hold_nothing() -> None:
    bench = Bench("a", "b")
    for name, resident_s in (("a", 50.0), ("b", 50.0)):
        bench.report(name, resident_s=resident_s)
    asyncio.run(bench.routing.refresh())
    asked = trip()
    leg = bench.routing.begin(asked, replace(bench.go(asked), node="b"))
    leg.first_token()
    leg.end(told())
    again = trip()
    bench.routing.choose(again)
    assert again.matches
    bench.report("b", resident_s=1.0)
    asyncio.run(bench.routing.refresh())
    later = trip()
    bench.routing.choose(later)
    assert later.matches == {}


@pytest.mark.parametrize("outcome", [None, told(prompt=0, failed=True)])
def test_a_try_that_came_to_nothing_leaves_no_trace(outcome: RequestTiming | None) -> None:
    bench = Bench("a", "b")
    asked = trip()
    leg = bench.routing.begin(asked, bench.go(asked))
    assert bench.routing.backlog.ahead_s(bench.clock())
    leg.end(outcome)
    assert bench.routing.backlog.ahead_s(bench.clock()) == {}
    later = trip()
    bench.routing.choose(later)
    assert later.matches == {}


def test_rates_and_token_lengths_are_learned_from_an_answer() -> None:
    bench = Bench("a")
    asked = trip()
    leg = bench.routing.begin(asked, bench.go(asked))
    bench.clock.now_s += 2
    leg.first_token()
    bench.clock.now_s += 8
    leg.end(told(prompt=4000, cached=1000))
    leg.end(told(prompt=1, cached=1))  # only once
    (node,) = bench.fleet.snapshot().nodes
    assert bench.routing.rates.prefill_tok_s(node, "m") == 1500
    assert bench.routing.rates.service_s("a", "m") == 10


def test_a_node_that_reports_no_hits_stops_attracting_its_prompts() -> None:
    bench = Bench("a", "b")
    for _ in range(12):
        asked = trip()
        leg = bench.routing.begin(asked, replace(bench.go(asked), node="b"))
        leg.first_token()
        leg.end(told(cached=0))
        bench.clock.now_s += 60
    assert bench.go(trip()).node == "a"


async def _ask(gateway: RunningGateway, *texts: str, **headers: str) -> None:
    messages = [{"role": "user", "content": text} for text in texts]
    body = {"model": "m", "messages": messages}
    response = await gateway.post("/v1/chat/completions", body, **headers)
    assert response.status == 200


def warm() -> MockModel:
    return MockModel("m", "loaded", prompt_tokens=5000, cached_tokens=4000)


async def test_a_conversation_stays_where_its_prefix_is_cached() -> None:
    async with MockNeuron(warm()) as first, MockNeuron(warm()) as second:
        first.models["m"].reported_in_flight = 4
        nodes = {"a": first.endpoint, "b": second.endpoint}
        async with run_gateway(nodes, poll_s=0.02) as gateway:
            await _ask(gateway, LONG)
            assert (len(first.seen), len(second.seen)) == (0, 1)
            first.models["m"].reported_in_flight = 0
            polls = first.polls
            await first.until(lambda: first.polls >= polls + 2)
            await _ask(gateway, LONG, "go on")
            assert (len(first.seen), len(second.seen)) == (0, 2)
            await _ask(gateway, "another matter")
            assert (len(first.seen), len(second.seen)) == (1, 2)


@pytest.mark.parametrize(
    "header", ["x-claude-code-session-id", "x-session-affinity", "x-session-id"]
)
async def test_a_session_header_keeps_a_conversation_whose_prefix_changes(header: str) -> None:
    async with MockNeuron(warm()) as first, MockNeuron(warm()) as second:
        first.models["m"].reported_in_flight = 4
        nodes = {"a": first.endpoint, "b": second.endpoint}
        async with run_gateway(nodes, poll_s=0.02) as gateway:
            await _ask(gateway, "1 " + LONG, **{header: "s1"})
            first.models["m"].reported_in_flight = 0
            polls = first.polls
            await first.until(lambda: first.polls >= polls + 2)
            await _ask(gateway, "2 " + LONG, **{header: "s1"})
            assert (len(first.seen), len(second.seen)) == (0, 2)
            await _ask(gateway, "3 " + LONG, **{header: "s2"})
            assert (len(first.seen), len(second.seen)) == (1, 2)


async def test_prompt_cache_key_names_a_session_too() -> None:
    async with MockNeuron(warm()) as first, MockNeuron(warm()) as second:
        first.models["m"].reported_in_flight = 4
        nodes = {"a": first.endpoint, "b": second.endpoint}
        async with run_gateway(nodes, poll_s=0.02) as gateway:
            for number in (1, 2):
                content = f"{number} {LONG}"
                body = {"model": "m", "messages": [{"role": "user", "content": content}]}
                await gateway.post("/v1/chat/completions", {**body, "prompt_cache_key": "k"})
                first.models["m"].reported_in_flight = 0
                polls = first.polls
                await first.until(lambda polls=polls: first.polls >= polls + 2)
            assert (len(first.seen), len(second.seen)) == (0, 2)


async def test_both_dialects_of_a_conversation_share_one_prefix() -> None:
    async with MockNeuron(warm()) as first, MockNeuron(warm()) as second:
        first.models["m"].reported_in_flight = 4
        nodes = {"a": first.endpoint, "b": second.endpoint}
        async with run_gateway(nodes, poll_s=0.02) as gateway:
            await _ask(gateway, LONG)
            first.models["m"].reported_in_flight = 0
            polls = first.polls
            await first.until(lambda: first.polls >= polls + 2)
            messages = [{"role": "user", "content": LONG}]
            body = {"model": "m", "max_tokens": 5, "messages": messages}
            assert (await gateway.post("/v1/messages", body)).status == 200
            assert (len(first.seen), len(second.seen)) == (0, 2)


def test_what_images_weigh_teaches_nothing_about_the_length_of_texts() -> None:
    bench = Bench("a")
    content = [{"type": "text", "text": "What is this?"}, image_part(png(200, 200))]
    messages = [{"role": "user", "content": content}]
    asked = Trip("m", msgspec.json.encode({"model": "m", "messages": messages}))
    assert len(asked.body) > 100_000
    serve = bench.go(asked)
    # A screenshot's worth of tokens, whatever its bytes.
    assert serve.considered.options[0].cost.prefill_s < 2.5 * prefill_of(bench, 2000)
    before = prefill_of(bench, 4000)
    leg = bench.routing.begin(asked, serve)
    leg.first_token()
    leg.end(told(300))
    assert prefill_of(bench, 4000) == pytest.approx(before, rel=0.5)


def prefill_of(bench: Bench, num_tokens: int) -> float:
    serve = bench.go(trip("word " * (4 * num_tokens // 5)))
    return serve.considered.options[0].cost.prefill_s
