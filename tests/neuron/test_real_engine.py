import asyncio
import os
import signal

import pytest

from cortex.neuron.app import ENGINE_COMMAND
from tests.support.neuron_http import chat, encode, neuron

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
        async with asyncio.timeout(60):
            while (await api.health_of("cortex-tiny"))["free_slots"] != slots:
                await asyncio.sleep(0.05)

        before = await api.get("/models/cortex-tiny")
        assert before.json["in_flight"] == 0
        os.kill(await engine_pid(), signal.SIGKILL)
        async with asyncio.timeout(120):
            while True:
                answer = await api.post("/v1/chat/completions", body)
                if answer.status == 200:
                    break
                assert answer.status in (502, 503), answer.body
                await asyncio.sleep(0.2)
        assert answer.json["choices"][0]["message"]["content"] == text


async def engine_pid() -> int:
    """Return the engine process that this process started."""
    finder = await asyncio.create_subprocess_exec(
        "pgrep", "-P", str(os.getpid()), "-f", "engine.process", stdout=asyncio.subprocess.PIPE
    )
    out, _ = await finder.communicate()
    (pid,) = out.split()
    return int(pid)
