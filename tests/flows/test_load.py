"""Many streams at once, clients that leave, and engines that die."""

import asyncio
import os
import signal
import time

import aiohttp

from tests.support.processes import Cortex

MODEL = "cortex-tiny"
STREAMS = 32
FILLED_S = 20
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
        await slots_become(session, up, 0, limit_s=FILLED_S)
        for reply in replies[: STREAMS // 2]:
            reply.close()
        await slots_become(session, up, STREAMS // 2, limit_s=FREED_S)
        for reply in replies[STREAMS // 2 :]:
            while not (await reply.content.readline()).startswith(b"data: "):
                assert not reply.content.at_eof()
            reply.close()
        await slots_become(session, up, STREAMS, limit_s=FREED_S)


async def slots_become(
    session: aiohttp.ClientSession, up: Cortex, wanted: int, *, limit_s: float
) -> None:
    async with asyncio.timeout(limit_s):
        while await free_slots(session, up) != wanted:
            await asyncio.sleep(0.01)


async def test_a_killed_engine_ends_its_stream_with_an_error_and_comes_back(up: Cortex):
    async with aiohttp.ClientSession() as session:
        bias = {str(each): -100 for each in await end_token_ids(session, up)}
        endless = body("Tell me a story.", max_tokens=4000, logit_bias=bias)
        translated = body("Count from 1 to 30.", max_tokens=4000, temperature=1)
        for path, request, last in (
            ("/v1/chat/completions", endless, b"[DONE]"),
            ("/v1/messages", translated, b"message_stop"),
        ):
            seen: set[str] = set()
            async with asyncio.TaskGroup() as tasks:
                watch = tasks.create_task(watch_status(session, up, seen))
                async with session.post(up.url + path, json=request) as reply:
                    await reply.content.readline()
                    (old,) = up.engine_pids()
                    os.kill(old, signal.SIGKILL)
                    rest = await reply.content.read()
                assert b"error" in rest
                assert last not in rest
                await served_again(session, up, old)
                watch.cancel()
            assert "recovering" in seen


async def watch_status(session: aiohttp.ClientSession, up: Cortex, seen: set[str]) -> None:
    while True:
        async with session.get(f"{up.neuron_url}/models/{MODEL}") as reply:
            seen.add((await reply.json())["status"])
        await asyncio.sleep(0.02)


async def served_again(session: aiohttp.ClientSession, up: Cortex, old: int) -> None:
    """Ask until another engine answers; until then each refusal says when to try again."""
    deadline = time.monotonic() + RECOVERED_S
    while True:
        async with session.post(
            f"{up.url}/v1/chat/completions", json={**body("hi"), "stream": False}
        ) as reply:
            answer = await reply.read()
        if reply.status == 200:
            break
        assert reply.status == 503, answer
        assert "Retry-After" in reply.headers
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    assert up.engine_pids() != [old]
