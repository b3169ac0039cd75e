"""`GET /events` of a mock neuron: numbered changes, kept for subscribers that come back."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from aiohttp import web

from cortex.core.neuron_api import ModelRemoved, NeuronSnapshot, Version
from tests.support.mock_neuron.node import Node

PING_S = 1.0
RING_EVENTS = 100


class EventFeed:
    """What subscribers are told of a node.

    Attributes:
        epoch: another one makes old event ids worthless, as a restart does.
        asked: the `Last-Event-ID` of every subscription.
        snapshots: how many of them began with a snapshot.
        raw: said next, as it is.
        is_mute: nothing is said.
        pace_s: counters are told at most this often, as by a real neuron; models' statuses at once.
    """

    def __init__(self, node: Node) -> None:
        self.node = node
        self.pace_s = 0.0
        self.epoch = "e1"
        self.asked: list[str] = []
        self.snapshots = 0
        self.raw: list[bytes] = []
        self.is_mute = False
        self._count = 0
        self._ring: list[tuple[int, bytes]] = []
        self._told: dict[str, bytes] = {}
        self._statuses: object = None
        self._looked_s = 0.0
        self._open: list[web.Request] = []

    @property
    def subscribers(self) -> int:
        return len(self._open)

    def cut(self) -> None:
        """Cut the connections of all subscribers."""
        for request in list(self._open):
            assert request.transport is not None
            request.transport.abort()

    def look(self) -> None:
        """Number what has changed since the last look."""
        node = self.node
        statuses = (node.status, [(model.id, model.status) for model in node.models.values()])
        now_s = asyncio.get_running_loop().time()
        if statuses == self._statuses and now_s < self._looked_s + self.pace_s:
            return
        self._statuses, self._looked_s = statuses, now_s
        health = node.health()
        now: dict[str, tuple[str, object]] = {
            f"model {model.id}": ("model", _lasting(node.info(model)))
            for model in node.models.values()
        }
        now |= {f"load {load.id}": ("load", [load]) for load in health.models}
        now["node"] = ("node", msgspec.structs.replace(health, models=[]))
        for key in self._told.keys() - now.keys():
            kind, _, model_id = key.partition(" ")
            del self._told[key]
            if kind == "model":
                self._add("model_removed", ModelRemoved(id=model_id))
        for key, (name, data) in now.items():
            encoded = msgspec.json.encode(data)
            if self._told.get(key) != encoded:
                self._told[key] = encoded
                self._add(name, data if name != "node" else health)

    def _add(self, name: str, data: object) -> None:
        self._count += 1
        self._ring.append((self._count, self._event(name, data)))
        del self._ring[:-RING_EVENTS]

    def _event(self, name: str, data: object) -> bytes:
        head = f"id: {self.epoch}-{self._count}\nevent: {name}\ndata: ".encode()
        return head + msgspec.json.encode(data) + b"\n\n"

    def _replay_from(self, last_id: str) -> int | None:
        epoch, _, number = last_id.partition("-")
        if epoch != self.epoch or not number.isdigit() or int(number) > self._count:
            return None
        oldest = self._ring[0][0] if self._ring else self._count + 1
        return int(number) if int(number) >= oldest - 1 else None

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Answer a subscription until its connection ends."""
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        self._open.append(request)
        try:
            async with aclosing(self.stream(request.headers.get("last-event-id", ""))) as parts:
                async for part in parts:
                    await response.write(part)
        finally:
            self._open.remove(request)
        return response

    async def stream(self, last_id: str) -> AsyncGenerator[bytes, None]:
        """Yield events from the one after `last_id` on, or from a snapshot on; never ends."""
        self.asked.append(last_id)
        await self._speak()
        yield b": ping\n\n"
        self.look()
        seen = self._replay_from(last_id)
        if seen is None:
            seen = self._count
            self.snapshots += 1
            yield self._event("snapshot", self._snapshot())
        await self.node.changed()
        loop = asyncio.get_running_loop()
        spoke_s = -PING_S
        while True:
            await self._speak()
            self.look()
            parts = [event for count, event in self._ring if count > seen] + self.raw
            seen, self.raw = self._count, []
            if parts or loop.time() >= spoke_s + PING_S:
                spoke_s = loop.time()
                yield b"".join(parts) or b": ping\n\n"
            await self._wait(max(0.0, spoke_s + PING_S - loop.time()))

    async def _speak(self) -> None:
        await self.node.faults.speak()
        if self.is_mute:
            await asyncio.Event().wait()

    async def _wait(self, limit_s: float) -> None:
        """Wait for something to happen, or until a ping is due."""
        try:
            async with asyncio.timeout(limit_s), self.node.change:
                await self.node.change.wait()
        except TimeoutError:
            return

    def _snapshot(self) -> NeuronSnapshot:
        node = self.node
        return NeuronSnapshot(
            models=[node.info(model) for model in node.models.values()],
            health=node.health(),
            discovery=node.discovery(),
            version=Version(package_version="mock"),
        )


def _lasting(info: object) -> object:
    return msgspec.structs.replace(
        info, in_flight=0, last_used_s=None, progress=None, resident_s=None
    )
