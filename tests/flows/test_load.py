"""Many streams at once, clients that leave, and engines that die."""

import asyncio
import os
import signal
import time

import aiohttp

from tests.support.processes import Cortex

MODEL = "cortex-tiny"
STREAMS = 32
FREED_S = 0.5
RECOVERED_S = 60


def body(text: str, **more: object) -> dict:
    return {
        "model": MODEL,
        "stream": True,
        "messages": [{"role": "user", "content": text}],
        **more,
    }


async def free_slots(session: aiohttp.ClientSession, up: Cortex) -> int:
    async with session.get(f"{up.neuron_url}/health") as reply:
        models = (await reply.json())["models"]
    return next(model["free_slots"] for model in models if model["id"] == MODEL)


async def end_token_ids(session: aiohttp.ClientSession, up: Cortex) -> list[int]:
    async with session.post(
        f"{up.neuron_url}/v1/tokenize",
        json={
            "model": MODEL,
            "prompt": "<|im_end|><|endoftext|>",
            "return_tokens": True,
        },
    ) as reply:
        return (await reply.json())["tokens"]


async def test_32_streams_at_once_all_complete(up: Cortex):
    async def one(session: aiohttp.ClientSession, number: int) -> bytes:
        async with session.post(
            f"{up.url}/v1/chat/completions", json=body(f"Count from 1 to {9 + number % 9}.")
        ) as reply:
            assert reply.status == 200
            return await reply.read()

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(one(session, number)) for number in range(STREAMS)]
        assert all(task.result().endswith(b"data: [DONE]\n\n") for task in running)
        assert await free_slots(session, up) == STREAMS


async def test_clients_that_leave_midway_free_their_slots_at_once(up: Cortex):
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        bias = {str(each): -100 for each in await end_token_ids(session, up)}
        endless = body("Tell me a story.", max_tokens=4000, temperature=1, logit_bias=bias)
        replies = []
        for _ in range(STREAMS):
            reply = await session.post(f"{up.url}/v1/chat/completions", json=endless)
            replies.append(reply)
        for reply in replies:
            while b'"content":"' not in await reply.content.readline():
                pass
        assert await free_slots(session, up) == 0
        for reply in replies[: STREAMS // 2]:
            reply.close()
        left_at = time.monotonic()
        while await free_slots(session, up) < STREAMS // 2:
            assert time.monotonic() - left_at < FREED_S
            await asyncio.sleep(0.01)
        for reply in replies[STREAMS // 2 :]:
            assert b'"content":"' in await reply.content.readline() + await reply.content.readline()
            reply.close()
        deadline = time.monotonic() + FREED_S
        while await free_slots(session, up) < STREAMS:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)


async def test_a_killed_engine_ends_its_stream_with_an_error_and_comes_back(up: Cortex):
    async with aiohttp.ClientSession() as session:
        bias = {str(each): -100 for each in await end_token_ids(session, up)}
        for path, last in (("/v1/chat/completions", b"[DONE]"), ("/v1/messages", b"message_stop")):
            endless = body("Tell me a story.", max_tokens=4000, logit_bias=bias)
            if path == "/v1/messages":
                endless = body("Count from 1 to 30.", max_tokens=4000, temperature=1)
            async with session.post(up.url + path, json=endless) as reply:
                await reply.content.readline()
                for pid in up.engine_pids():
                    os.kill(pid, signal.SIGKILL)
                rest = await reply.content.read()
            assert b"error" in rest
            assert last not in rest
            await recovered(session, up)


async def recovered(session: aiohttp.ClientSession, up: Cortex) -> None:
    """Wait until the model serves again, having been seen as not servable before."""
    seen = set()
    deadline = time.monotonic() + RECOVERED_S
    while True:
        async with session.get(f"{up.neuron_url}/models/{MODEL}") as reply:
            status = (await reply.json())["status"]
        seen.add(status)
        if status == "loaded":
            break
        assert time.monotonic() < deadline, seen
        await asyncio.sleep(0.05)
    assert "recovering" in seen
    while True:
        async with session.post(
            f"{up.url}/v1/chat/completions", json={**body("hi"), "stream": False}
        ) as reply:
            if reply.status == 200:
                return
            assert reply.status == 503
            assert "Retry-After" in reply.headers
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
