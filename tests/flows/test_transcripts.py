"""What real clients were seen to send, replayed against the bundled model."""

import itertools
from typing import Any

import aiohttp
import msgspec
import pytest

from tests.support import transcripts
from tests.support.processes import Cortex
from tests.support.replay import continued, forced, read_stream, read_whole
from tests.support.transcripts import Exchange

# What an answer of the bundled model may take here: its words are of no matter.
MAX_TOKENS = 250
TIMEOUT = aiohttp.ClientTimeout(total=120)
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")

NAMES = transcripts.names()
POSTS = {
    name: [exchange for exchange in transcripts.load(name).requests if exchange.method == "POST"]
    for name in NAMES
}


def round_trip(name: str) -> tuple[Exchange, Exchange] | None:
    """Return a request and the one in which the client goes on after a tool call."""
    for first, second in itertools.pairwise(POSTS[name]):
        if transcripts.called_tools(second.body or {}):
            return first, second
    return None


ROUND_TRIPS = {name: pair for name in NAMES if (pair := round_trip(name)) is not None}


async def ask(
    up: Cortex, exchange: Exchange, body: dict[str, Any] | None
) -> tuple[aiohttp.ClientResponse, bytes]:
    """Send a recorded request with the headers that came with it."""
    data = None if body is None else msgspec.json.encode(_limited(exchange, body))
    async with (
        aiohttp.ClientSession(timeout=TIMEOUT) as session,
        session.request(
            exchange.method, up.url + exchange.path, data=data, headers=exchange.headers
        ) as reply,
    ):
        return reply, await reply.read()


def _limited(exchange: Exchange, body: dict[str, Any]) -> dict[str, Any]:
    key = next((name for name in LIMITS if name in body), None)
    if key is None:
        key = "max_output_tokens" if "responses" in exchange.path else "max_tokens"
    return {**body, key: MAX_TOKENS}


@pytest.mark.parametrize("name", NAMES)
async def test_every_request_of_a_client_gets_a_whole_stream_of_its_dialect(up: Cortex, name: str):
    for exchange in transcripts.load(name).requests:
        reply, answer = await ask(up, exchange, exchange.body)
        assert reply.status == 200, answer
        if exchange.body is not None:
            assert exchange.body["stream"] is True
            assert reply.content_type == "text/event-stream"
            assert "content-encoding" not in reply.headers
            read_stream(exchange.path, exchange.body, answer)


@pytest.mark.parametrize("name", ROUND_TRIPS)
async def test_a_client_goes_on_with_the_calls_that_it_got(up: Cortex, name: str):
    first, second = ROUND_TRIPS[name]
    assert first.body is not None
    assert second.body is not None
    called = transcripts.called_tools(second.body)[-1]
    body = forced(first.path, first.body, called)
    reply, stream = await ask(up, first, body)
    assert reply.status == 200, stream
    answer = read_stream(first.path, body, stream)
    assert {name for _, name, _ in answer.calls} == {called}
    for _, _, arguments in answer.calls:
        assert isinstance(msgspec.json.decode(arguments), dict)
    reply, stream = await ask(up, second, continued(second.path, second.body, answer))
    assert reply.status == 200, stream
    read_stream(second.path, second.body, stream)


@pytest.mark.parametrize("name", NAMES)
async def test_the_same_request_is_answered_without_streaming(up: Cortex, name: str):
    # Claude Code asks so again after a stream that broke off.
    exchange = POSTS[name][0]
    assert exchange.body is not None
    body = {key: value for key, value in exchange.body.items() if key != "stream_options"}
    reply, answer = await ask(up, exchange, {**body, "stream": False})
    assert reply.status == 200, answer
    assert reply.content_type == "application/json"
    read_whole(exchange.path, answer)


def test_the_transcripts_cover_the_clients_that_the_guide_names():
    assert {transcripts.load(name).client for name in NAMES} == {
        "Claude Code",
        "Codex",
        "Continue",
        "aider",
        "cline",
        "opencode",
        "pi",
        "qwen-code",
    }
