import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest

from cortex.neuron.app import ENGINE_COMMAND
from tests.support.neuron_http import chat, encode, neuron, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


async def test_the_bundled_model_answers_streams_and_survives_the_death_of_its_engine(tmp_path):
    async with neuron(tmp_path, engine_command=ENGINE_COMMAND) as api:
        loaded = await api.load("cortex-tiny")
        assert loaded.json["status"] == "loaded", loaded.body
        body = chat("cortex-tiny", "What is two plus two?", max_tokens=24, temperature=0)
        whole = (await api.post("/v1/chat/completions", body)).json
        text = whole["choices"][0]["message"]["content"]
        assert whole["usage"]["completion_tokens"] > 0
        streamed = (await api.post("/v1/chat/completions", body | {"stream": True})).events
        assert streamed[-1] == "[DONE]"
        pieces = [each["choices"][0]["delta"].get("content", "") for each in streamed[:-1]]
        assert "".join(pieces) == text

        url = api.url + "/v1/chat/completions"
        long = encode(chat("cortex-tiny", "Tell me a long story.", stream=True, max_tokens=3000))
        health = await api.health_of("cortex-tiny")
        slots = health["free_slots"]
        assert slots > 0
        async with api.session.post(url, data=long) as reply:
            await reply.content.readuntil(b"\n\n")

        async def freed():
            health = await api.health_of("cortex-tiny")
            return (health["in_flight"], health["free_slots"]) == (0, slots)

        await until(freed)
        os.kill(engine_pid(), signal.SIGKILL)
        async with asyncio.timeout(120):
            while True:
                answer = await api.post("/v1/chat/completions", body)
                if answer.status == 200:
                    break
                assert answer.status in (502, 503), answer.body
                await asyncio.sleep(0.2)
        assert answer.json["choices"][0]["message"]["content"] == text


def engine_pid() -> int:
    """Return the engine process that this process started."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            command = stat.with_name("cmdline").read_bytes()
            if parent == os.getpid() and b"engine.process" in command:
                return int(stat.parent.name)
    raise AssertionError("no engine process")
