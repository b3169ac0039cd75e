"""What made real clients hang, retry without end or take half an answer for a whole one.

Once headers are out, no fault may show as a bare close: a client took that for a reason to ask
again, dozens of times a second. Reading a body to its end fails here where a connection is cut.
"""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import openai
import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from tests.support.client_streams import STREAMS, message_of_failure
from tests.support.gateway import run_gateway
from tests.support.mock_neuron import MockModel, MockNeuron
from tests.support.processes import Cortex, cortex_up
from tests.support.replay import read_stream, read_whole

MODEL = "cortex-tiny"
TIMEOUT = aiohttp.ClientTimeout(total=60)
RESTART_S = 60


@pytest.fixture(scope="module")
def doomed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cortex]:
    """A `cortex up` whose engine may be killed."""
    tmp: Path = tmp_path_factory.mktemp("cache")
    with cortex_up(tmp) as running:
        yield running


async def follow(up: Cortex, dialect: str, all_begun: asyncio.Barrier) -> bytes:
    """Ask for a stream, and read it to its end once all others have begun too."""
    asked = STREAMS[dialect]
    body = {**asked.body_for(MODEL), **asked.endless}
    async with (
        aiohttp.ClientSession(timeout=TIMEOUT) as session,
        session.post(up.url + asked.route, json=body) as reply,
    ):
        received = b""
        while asked.begun not in received:
            chunk = await reply.content.readany()
            assert chunk, received
            received += chunk
        await all_begun.wait()
        return received + await reply.content.read()


async def until_answering(up: Cortex) -> None:
    """Wait for an engine, after the last one was killed too."""
    body = STREAMS["chat"].body_for(MODEL, stream=False)
    async with asyncio.timeout(RESTART_S):
        while not up.engine_pids() or (await post(up.url + STREAMS["chat"].route, body))[0] != 200:
            await asyncio.sleep(0.1)


def kill_engine(up: Cortex) -> None:
    for pid in up.engine_pids():
        os.kill(pid, signal.SIGKILL)


async def post(url: str, body: object, **headers: str) -> tuple[int, bytes]:
    async with (
        aiohttp.ClientSession(timeout=TIMEOUT) as session,
        session.post(url, json=body, headers=headers) as reply,
    ):
        return reply.status, await reply.read()


async def test_an_engine_that_is_killed_in_mid_stream_is_an_error_event_in_each_dialect(
    doomed: Cortex,
):
    await until_answering(doomed)
    all_begun = asyncio.Barrier(len(STREAMS) + 1)
    async with asyncio.TaskGroup() as tasks:
        streams = {
            dialect: tasks.create_task(follow(doomed, dialect, all_begun), name=dialect)
            for dialect in STREAMS
        }
        await all_begun.wait()
        kill_engine(doomed)
    for dialect, stream in streams.items():
        assert "engine" in message_of_failure(dialect, stream.result())


@pytest.mark.parametrize("dialect", STREAMS)
@pytest.mark.parametrize("fault", ["die", "no_done", "error_event"])
async def test_a_node_that_breaks_off_in_mid_stream_is_an_error_event(fault: Any, dialect: str):
    asked = STREAMS[dialect]
    async with (
        MockNeuron(MockModel("m", "loaded", fault=fault)) as neuron,
        run_gateway({"a": neuron.endpoint}) as gateway,
    ):
        status, stream = await post(gateway.url + asked.route, asked.body_for("m"))
        assert status == 200
        assert message_of_failure(dialect, stream)
        assert len(neuron.seen) == 1


@pytest.mark.parametrize("dialect", STREAMS)
async def test_a_node_that_falls_silent_in_mid_stream_is_an_error_event(dialect: str):
    asked = STREAMS[dialect]
    async with (
        MockNeuron(MockModel("m", "loaded", token_gate=asyncio.Event())) as neuron,
        run_gateway({"a": neuron.endpoint}, stall_s=0.05) as gateway,
    ):
        status, stream = await post(gateway.url + asked.route, asked.body_for("m"))
        assert status == 200
        assert message_of_failure(dialect, stream) == "node a sent no token for 0.05 s"


@pytest.mark.parametrize("dialect", STREAMS)
async def test_a_node_that_never_begins_is_an_error_event_after_signs_of_life(dialect: str):
    asked = STREAMS[dialect]
    async with (
        MockNeuron(MockModel("m", "loaded", first_gate=asyncio.Event())) as neuron,
        run_gateway({"a": neuron.endpoint}, keepalive_s=0.02, first_token_s=0.2) as gateway,
    ):
        status, stream = await post(gateway.url + asked.route, asked.body_for("m"))
        assert status == 200
        assert message_of_failure(dialect, stream) == "node a produced no token within 0.2 s"


async def test_an_error_in_mid_stream_is_the_openai_sdks_own_exception(doomed: Cortex):
    async def read_on() -> None:
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                kill_engine(doomed)

    async with AsyncOpenAI(base_url=f"{doomed.url}/v1", api_key="none") as client:
        await until_answering(doomed)
        body: Any = STREAMS["chat"].body_for(MODEL)
        stream: Any = await client.chat.completions.create(**body)
        with pytest.raises(openai.APIError, match="engine"):
            await read_on()


async def test_an_error_in_mid_stream_is_the_anthropic_sdks_own_exception(doomed: Cortex):
    async def read_on() -> None:
        async for event in stream:
            if event.type == "content_block_delta":
                kill_engine(doomed)

    async with AsyncAnthropic(base_url=doomed.url, api_key="none") as client:
        await until_answering(doomed)
        body: Any = STREAMS["messages"].body_for(MODEL)
        stream: Any = await client.messages.create(**body)
        with pytest.raises(anthropic.APIStatusError, match="engine"):
            await read_on()


@pytest.mark.parametrize("dialect", STREAMS)
async def test_a_whole_stream_has_every_event_and_its_usage(up: Cortex, dialect: str):
    asked = STREAMS[dialect]
    body = asked.body_for(MODEL)
    if dialect in ("chat", "text"):
        body["stream_options"] = {"include_usage": True}
    status, stream = await post(up.url + asked.route, body)
    assert status == 200
    read_stream(asked.route, body, stream)


@pytest.mark.parametrize("dialect", STREAMS)
async def test_an_answer_that_is_not_streamed_has_its_usage(up: Cortex, dialect: str):
    asked = STREAMS[dialect]
    status, answer = await post(up.url + asked.route, asked.body_for(MODEL, stream=False))
    assert status == 200
    read_whole(asked.route, answer)


@pytest.mark.parametrize("dialect", STREAMS)
async def test_a_query_string_a_beta_and_unknown_fields_change_nothing(up: Cortex, dialect: str):
    asked = STREAMS[dialect]
    body = {**asked.body_for(MODEL), "field_of_2030": {"on": True}}
    beta = {"anthropic-beta": "tomorrow-2030-01-01"}
    status, stream = await post(f"{up.url}{asked.route}?beta=true&x=1", body, **beta)
    assert status == 200, stream
    read_stream(asked.route, body, stream)


@pytest.mark.parametrize("dialect", STREAMS)
@pytest.mark.parametrize("is_stream", [True, False])
async def test_an_unknown_model_is_404_in_the_envelope_at_once(
    up: Cortex, dialect: str, is_stream: bool
):
    asked = STREAMS[dialect]
    body = asked.body_for("no-such-model", stream=is_stream)
    status, answer = await post(up.url + asked.route, body)
    assert status == 404
    assert b"no-such-model" in answer
    assert b'"error":{' in answer
