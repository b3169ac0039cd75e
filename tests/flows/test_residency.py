"""Real engines on one small host: who comes, who goes, and where that can be seen.

The bundled model under several names; the host has room for two of them.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cortex.core.catalogue import Catalogue, CatalogueModel
from cortex.neuron.app import ENGINE_COMMAND
from tests.support.gateway import RunningGateway, run_gateway
from tests.support.neuron_http import Api, add_chat_model, neuron
from tests.support.processes import run_cortex
from tests.support.small_host import SmallHost

NAMES = ("red", "green", "blue")
# One takes about 930 MiB: 520 of them are caches for its 65,536 tokens, the rest is the process.
ROOM_BYTES = 2200 << 20
WAIT_S = 60
TTL_S = 2.0

pytestmark = pytest.mark.slow


class Flow:
    """A gateway over one neuron, and what can be seen of them."""

    def __init__(self, gateway: RunningGateway, node: Api, tmp: Path) -> None:
        self.gateway = gateway
        self.node = node
        self._tmp = tmp

    async def ask(self, model: str) -> str:
        """Ask for a short answer; return it."""
        question = [{"role": "user", "content": "What is the capital of France?"}]
        answer = await self.gateway.chat(model, messages=question, temperature=0)
        assert answer.status == 200, await answer.text()
        content: str = (await answer.json())["choices"][0]["message"]["content"]
        return content

    async def loaded(self) -> set[str]:
        """What the gateway's listing has as loaded."""
        cards = (await (await self.gateway.get("/v1/models")).json())["data"]
        return {card["id"] for card in cards if card["loaded"]}

    async def becomes(self, *models: str) -> None:
        """Wait until exactly these are loaded, by the gateway's listing and the node's own."""
        async with asyncio.timeout(WAIT_S):
            while await self.loaded() != set(models):
                await asyncio.sleep(0.05)
        infos = (await self.node.get("/models")).json
        assert {info["id"] for info in infos if info["status"] == "loaded"} == set(models)

    async def metric(self, name: str) -> float:
        """One sample of the gateway's metrics; 0 where there is none."""
        return (await self.gateway.metrics()).get(name, 0.0)

    async def cortex(self, *arguments: str) -> Any:
        """Run a `cortex` command against the gateway."""
        return await asyncio.to_thread(
            run_cortex, self._tmp, arguments[0], "-e", self.gateway.url, *arguments[1:]
        )


@asynccontextmanager
async def flow(tmp: Path, models: list[CatalogueModel], **eviction: object) -> AsyncIterator[Flow]:
    for name in NAMES:
        add_chat_model(tmp / "models", name)
    catalogue = Catalogue(models=models)
    small = SmallHost(ROOM_BYTES)
    async with neuron(tmp, engine_command=ENGINE_COMMAND, probe=small) as node:
        nodes = {"host": node.url}
        async with run_gateway(
            nodes, catalogue=catalogue, eviction=eviction, poll_s=0.2
        ) as gateway:
            yield Flow(gateway, node, tmp)


async def test_the_longest_unused_makes_room_and_comes_back_and_the_pinned_one_stays(
    tmp_path: Path,
) -> None:
    pinned = [CatalogueModel(id="red", pinned_on=["host"], residency_priority=100)]
    async with flow(tmp_path, pinned) as fleet:
        assert await fleet.ask("red") == "The capital of France is Paris."
        await fleet.ask("green")
        await fleet.becomes("red", "green")
        # Red is the longest unused, but pinned.
        await fleet.ask("blue")
        await fleet.becomes("red", "blue")
        assert await fleet.metric("cortex_evictions_total") == 1
        assert await fleet.ask("green") == "The capital of France is Paris."
        await fleet.becomes("red", "green")
        assert await fleet.metric("cortex_evictions_total") == 2
        green = '{model="green",node="host"}'
        assert await fleet.metric(f"cortex_cold_starts_total{green}") == 2
        status = await fleet.cortex("status")
        assert status.returncode == 0
        assert "red (loaded)" in status.stdout
        assert "blue (loaded)" not in status.stdout


async def test_an_idle_model_is_unloaded_after_its_time_and_loaded_by_the_next_request(
    tmp_path: Path,
) -> None:
    async with flow(tmp_path, [CatalogueModel(id="green", ttl_s=TTL_S)]) as fleet:
        await fleet.ask("green")
        await fleet.becomes("green")
        await fleet.becomes()
        assert await fleet.metric("cortex_evictions_total") == 0
        assert await fleet.ask("green") == "The capital of France is Paris."


async def test_a_long_lived_engine_is_recycled_after_so_many_loads_beside_it(
    tmp_path: Path,
) -> None:
    async with flow(tmp_path, [], defrag_after_cycles=2) as fleet:
        await fleet.ask("red")
        old = engines()
        for _ in range(2):
            await fleet.ask("green")
            unloaded = await fleet.node.post("/models/unload", {"model_id": "green"})
            assert unloaded.status == 200
        red = '{model="red",node="host"}'
        async with asyncio.timeout(WAIT_S):
            while await fleet.metric(f"cortex_model_recycles_total{red}") < 1:
                await asyncio.sleep(0.1)
        await fleet.becomes("red")
        assert len(engines()) == 1
        assert engines() != old
        assert await fleet.ask("red") == "The capital of France is Paris."


def engines() -> set[int]:
    """The engine processes of this process' neuron."""
    found = set()
    for child in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        for pid in child.read_text().split():
            if b"engine.process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(int(pid))
    return found


async def test_a_drained_node_takes_nothing_until_it_is_used_again(tmp_path: Path) -> None:
    async with flow(tmp_path, []) as fleet:
        await fleet.ask("red")
        drained = await fleet.cortex("drain", "host")
        assert drained.returncode == 0, drained.stdout + drained.stderr
        refused = await fleet.gateway.chat("red")
        assert refused.status == 503
        assert int(refused.headers["retry-after"]) >= 1
        status = await fleet.cortex("status")
        assert "draining" in status.stdout
        assert (await fleet.cortex("undrain", "host")).returncode == 0
        assert await fleet.ask("red") == "The capital of France is Paris."
