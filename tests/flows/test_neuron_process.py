"""A real `cortex neuron` with real engines: what it does when it ends, and when an engine hangs."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.processes import cortex_process, free_port

MODEL = "cortex-tiny"
CONFIG = """
host = "127.0.0.1"
port = {port}
state_dir = "state"
[[default_models]]
model_id = "cortex-tiny"
[harness.torch]
demo_models = false
hub = false
drain_s = {drain_s}
stall_s = {stall_s}
"""

pytestmark = pytest.mark.slow


class Neuron:
    """A running neuron, and a client for it."""

    def __init__(self, process: Any, url: str, session: aiohttp.ClientSession) -> None:
        self.process = process
        self.url = url
        self.session = session

    async def get(self, path: str) -> Any:
        async with self.session.get(self.url + path) as reply:
            return await reply.json()

    async def stream(self, began: asyncio.Event | None = None) -> str:
        """Ask for a long answer and return all of the stream."""
        body = {
            "model": MODEL,
            "stream": True,
            "max_tokens": 400,
            "messages": [{"role": "user", "content": "Tell me a long story."}],
        }
        text = ""
        async with self.session.post(f"{self.url}/v1/chat/completions", json=body) as reply:
            async for chunk in reply.content:
                text += chunk.decode()
                if began is not None:
                    began.set()
        return text

    async def is_loaded(self) -> bool:
        return bool((await self.get(f"/models/{MODEL}"))["status"] == "loaded")

    async def is_at_work(self) -> bool:
        return bool((await self.get("/health"))["models"][0]["in_flight"])

    def engines(self) -> list[int]:
        """Process ids of the engines below it."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                command = (entry / "cmdline").read_bytes()
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            if b"cortex.neuron.engine.process" in command and int(parent) == self.process.pid:
                found.append(int(entry.name))
        return found

    async def end(self) -> int:
        """Send SIGTERM and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return int(await asyncio.to_thread(self.process.wait, 30))


@asynccontextmanager
async def neuron(tmp_path: Path, *, drain_s: float, stall_s: float = 300) -> AsyncIterator[Neuron]:
    """Run a neuron with the bundled model loaded."""
    port = free_port()
    config = tmp_path / "neuron.toml"
    config.write_text(CONFIG.format(port=port, drain_s=drain_s, stall_s=stall_s))
    url = f"http://127.0.0.1:{port}"
    with cortex_process(tmp_path, url, "neuron", "--config", str(config)) as process:
        async with aiohttp.ClientSession() as session:
            running = Neuron(process, url, session)
            await until(running.is_loaded)
            yield running


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(90):
        while not await condition():
            await asyncio.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


async def test_sigterm_lets_a_stream_end_and_leaves_no_engine(tmp_path):
    async with neuron(tmp_path, drain_s=30) as it:
        [engine] = it.engines()
        began = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            streaming = tasks.create_task(it.stream(began))
            await began.wait()
            ending = tasks.create_task(it.end())
        assert streaming.result().endswith("data: [DONE]\n\n")
        assert ending.result() == 0
        assert not is_alive(engine)


async def test_sigterm_ends_a_neuron_whose_engine_hangs(tmp_path):
    async with neuron(tmp_path, drain_s=1) as it:
        [engine] = it.engines()
        os.kill(engine, signal.SIGSTOP)
        async with asyncio.TaskGroup() as tasks:
            streaming = tasks.create_task(it.stream())
            await until(it.is_at_work)
            # Two drains, ten seconds for a polite end, five for a firm one, then SIGKILL.
            ending = tasks.create_task(it.end())
        assert '"shutting_down"' in streaming.result()
        assert ending.result() == 0
        assert not is_alive(engine)


async def test_an_engine_that_hangs_is_killed_and_another_takes_its_place(tmp_path):
    async with neuron(tmp_path, drain_s=1, stall_s=2) as it:
        [engine] = it.engines()
        os.kill(engine, signal.SIGSTOP)
        assert '"engine_died"' in await it.stream()

        async def is_succeeded() -> bool:
            return it.engines() not in ([], [engine]) and await it.is_loaded()

        await until(is_succeeded)
        assert not is_alive(engine)
        assert (await it.stream()).endswith("data: [DONE]\n\n")
