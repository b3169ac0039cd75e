"""Mock nodes without sockets: links that can be cut, processes that can be killed, in one loop.

What a gateway says to its nodes goes through `MemoryClient`, which stands in for its pool of
connections; everything above that, and the nodes' ledgers, are the same as over sockets.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any
from unittest.mock import patch

import msgspec
from starlette.types import ASGIApp, Message

from cortex.core.catalogue import Catalogue
from cortex.core.config import GatewayConfig, NeuronAddress
from cortex.core.errors import UpstreamConnectionError
from cortex.core.neuron_api import LoadRequest
from cortex.core.openai import SSE_DONE
from cortex.gateway.app import GatewayApps, open_apps
from cortex.gateway.neuron_client import NeuronClient, RefusedError, Reply, UnreachableError
from tests.support.mock_neuron import answers
from tests.support.mock_neuron.events import EventFeed
from tests.support.mock_neuron.node import Node
from tests.support.mock_neuron.node import RefusedError as NodeRefusal
from tests.support.mock_neuron.script import MockModel

CONNECT_S = 3.0

Body = AsyncGenerator[bytes, None]


class MemoryReply(Reply):
    """A node's answer; what it has sent waits in a queue."""

    def __init__(self, node: str, status: int, headers: Mapping[str, str]) -> None:
        self.node = node
        self.status = status
        self._headers = headers
        self.arrived: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.on_close: Callable[[], None] = lambda: None

    def header(self, name: str) -> str | None:
        """Return a response header."""
        return self._headers.get(name)

    async def read_chunk(self) -> bytes:
        """Return what has arrived; None in the queue stands for a broken connection."""
        chunk = await self.arrived.get()
        if chunk is None:
            self.arrived.put_nowait(None)
            raise UpstreamConnectionError(f"the connection to node {self.node} broke")
        return chunk

    def close(self) -> None:
        """Let go of the answer."""
        self.on_close()


class MemoryHost:
    """A host with a mock node on it.

    Attributes:
        gate: open while the link carries packets; what is sent meanwhile arrives later.
    """

    def __init__(self, name: str, make: Callable[[], Node]) -> None:
        self.name = name
        self.is_up = True
        self.gate = asyncio.Event()
        self.gate.set()
        self.lives = 1
        self._make = make
        self._served: set[asyncio.Task[None]] = set()
        # What is still on its way over the link; no process's end takes it back.
        self._underway: set[asyncio.Task[None]] = set()
        self._boot()

    def _boot(self) -> None:
        self.node = self._make()
        self.feed = EventFeed(self.node)
        self.feed.epoch = f"e{self.lives}"

    async def kill(self) -> None:
        """End the process; its connections are reset, as far as the link carries that."""
        self.is_up = False
        for task in [*self._served, *self.node._tasks]:
            task.cancel()
        await asyncio.sleep(0)

    async def close(self) -> None:
        """End the process and whatever is on its way."""
        await self.kill()
        for task in [*self._underway]:
            task.cancel()
        await asyncio.sleep(0)

    def revive(self) -> None:
        """Start it again with nothing in memory."""
        self.lives += 1
        self.is_up = True
        self._boot()

    async def request(self, path: str, body: bytes, headers: Mapping[str, str]) -> MemoryReply:
        """Answer a request as a client of this host sees it.

        Raises:
            UnreachableError, RefusedError: no connection came about.
            UpstreamConnectionError: the connection broke before the answer.
        """
        try:
            async with asyncio.timeout(CONNECT_S):
                await self.gate.wait()
        except TimeoutError as exc:
            raise UnreachableError(f"node {self.name} cannot be reached") from exc
        if not self.is_up:
            raise RefusedError(f"node {self.name} cannot be reached: nobody listens")
        head: asyncio.Future[MemoryReply] = asyncio.get_running_loop().create_future()
        task = asyncio.get_running_loop().create_task(self._serve(path, body, headers, head))
        self._served.add(task)
        task.add_done_callback(self._served.discard)
        try:
            reply = await head
        except asyncio.CancelledError:
            self._leave(task)
            raise
        reply.on_close = lambda: self._leave(task)
        return reply

    def _leave(self, task: asyncio.Task[None]) -> None:
        """Have the node learn, once the link carries it, that a client has gone."""
        if self.gate.is_set():
            task.cancel()
        elif not task.done():
            leaving = asyncio.get_running_loop().create_task(self._leave_later(task))
            self._served.add(leaving)
            leaving.add_done_callback(self._served.discard)

    async def _leave_later(self, task: asyncio.Task[None]) -> None:
        await self.gate.wait()
        task.cancel()

    async def _serve(
        self,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        head: "asyncio.Future[MemoryReply]",
    ) -> None:
        reply: MemoryReply | None = None
        try:
            status, kind, chunks = await self._answer(path, body, headers)
            await self.gate.wait()
            if head.done():
                return
            reply = MemoryReply(self.name, status, {"content-type": kind})
            head.set_result(reply)
            async with aclosing(chunks) as parts:
                async for part in parts:
                    await self.gate.wait()
                    reply.arrived.put_nowait(part)
            await self.gate.wait()
            reply.arrived.put_nowait(b"")
        except asyncio.CancelledError:
            self._break(head, reply)
            raise

    def _break(self, head: "asyncio.Future[MemoryReply]", reply: MemoryReply | None) -> None:
        async def tell() -> None:
            await self.gate.wait()
            if reply is not None:
                reply.arrived.put_nowait(None)
            elif not head.done():
                head.set_exception(UpstreamConnectionError(f"node {self.name} went away"))

        if self.gate.is_set() and reply is not None:
            reply.arrived.put_nowait(None)
        elif not head.done() or reply is not None:
            telling = asyncio.get_running_loop().create_task(tell())
            self._underway.add(telling)
            telling.add_done_callback(self._underway.discard)

    async def _answer(
        self, path: str, body: bytes, headers: Mapping[str, str]
    ) -> tuple[int, str, Body]:
        json = "application/json"
        try:
            match path:
                case "/discovery":
                    return 200, json, _once(self.node.discovery())
                case "/health":
                    return 200, json, _once(self.node.health())
                case "/models":
                    infos = [self.node.info(each) for each in self.node.models.values()]
                    return 200, json, _once(infos)
                case "/events":
                    return (
                        200,
                        "text/event-stream",
                        self.feed.stream(headers.get("last-event-id", "")),
                    )
                case "/models/load":
                    wish = msgspec.json.decode(body, type=LoadRequest)
                    return 200, json, _once(await self.node.load(wish))
                case "/v1/chat/completions":
                    return await self._chat(msgspec.json.decode(body))
        except NodeRefusal as exc:
            error = {"message": exc.message, "type": "api_error", "code": exc.code, **exc.extras}
            return exc.status, json, _once({"error": error})
        raise AssertionError(f"{path} is not asked for by a gateway")

    async def _chat(self, asked: dict[str, Any]) -> tuple[int, str, Body]:
        """Answer after as many tenths of a second as the request has `max_tokens`."""
        model = self.node.models.get(asked["model"])
        if model is None or model.status != "loaded":
            raise NodeRefusal(404, "model_not_found")
        if asked.get("stream"):
            return 200, "text/event-stream", self._stream(model, asked["max_tokens"] / 10)
        if not await self._work(model, asked["max_tokens"] / 10):
            raise NodeRefusal(502, "engine_died", "the engine ended unexpectedly")
        counts = answers.usage(10, 1, 0)
        return 200, "application/json", _once(answers.completion(model.id, "done", counts))

    async def _stream(self, model: MockModel, seconds: float) -> Body:
        yield answers.chunk(model.id, {"role": "assistant", "content": ""})
        if await self._work(model, seconds):
            yield answers.chunk(model.id, {"content": "done"}, "stop") + SSE_DONE
        else:
            yield answers.error_event("engine_died", "the engine ended unexpectedly")

    async def _work(self, model: MockModel, seconds: float) -> bool:
        """Be in flight for a while; return whether the engine lived through it."""
        crashes = model.crashes
        self.node.begin(model)
        try:
            await asyncio.sleep(seconds)
        finally:
            model.in_flight -= 1
        await self.node.changed()
        return model.crashes == crashes


async def _once(value: object) -> Body:
    yield msgspec.json.encode(value)


class MemoryClient(NeuronClient):
    """A gateway's connections to memory hosts; `on_load` sees every load that it asks for."""

    def __init__(
        self, hosts: Mapping[str, MemoryHost], on_load: Callable[[str, LoadRequest, int], None]
    ) -> None:
        self._hosts = hosts
        self._on_load = on_load

    def show_secret(self, secret: str | None) -> None:
        """Send no secret: memory hosts ask for none."""

    async def post(
        self,
        node: str,
        endpoint: str,
        path: str,
        body: bytes,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """POST to a host."""
        if path != "/models/load":
            return await self._hosts[node].request(path, body, headers or {})
        wish = msgspec.json.decode(body, type=LoadRequest)
        self._on_load(node, wish, +1)
        try:
            return await self._hosts[node].request(path, body, headers or {})
        finally:
            self._on_load(node, wish, -1)

    async def _begin_get(
        self, node: str, endpoint: str, path: str, headers: Mapping[str, str] | None = None
    ) -> Reply:
        return await self._hosts[node].request(path, b"", headers or {})


def _opener(client: MemoryClient) -> Any:
    """Return what stands in for the gateway's `open_client`."""

    @asynccontextmanager
    async def open_client(*_: object) -> AsyncIterator[MemoryClient]:
        yield client

    return open_client


@asynccontextmanager
async def memory_gateway(
    hosts: Mapping[str, MemoryHost],
    catalogue: Catalogue | None = None,
    on_load: Callable[[str, LoadRequest, int], None] = lambda *_: None,
) -> AsyncIterator[GatewayApps]:
    """Run a gateway over memory hosts, on the loop's clock.

    Args:
        on_load: called with node, request and +1 when a load is asked for, with -1 at its end.
    """
    config = GatewayConfig(
        neurons=[NeuronAddress(name=name, endpoint=f"http://{name}") for name in hosts]
    )
    clock = asyncio.get_running_loop().time
    opened = open_apps(config, catalogue or Catalogue(), clock=clock)
    with patch("cortex.gateway.app.open_client", _opener(MemoryClient(hosts, on_load))):
        apps = await opened.__aenter__()
    try:
        yield apps
    finally:
        await opened.__aexit__(None, None, None)


class Call:
    """One request to an ASGI app, without a socket.

    Attributes:
        status: 0 until the answer begins.
    """

    def __init__(self, app: ASGIApp, path: str, body: object) -> None:
        self.status = 0
        self.body = b""
        self.is_done = False
        self.left = asyncio.Event()
        self._app = app
        self._path = path
        self._body: bytes | None = msgspec.json.encode(body)

    async def run(self) -> None:
        """Ask and collect the answer."""
        scope = {
            "type": "http",
            "method": "POST",
            "path": self._path,
            "raw_path": self._path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "http_version": "1.1",
            "scheme": "http",
            "client": ("memory", 1),
            "server": ("memory", 1),
        }
        try:
            await self._app(scope, self._receive, self._send)
        finally:
            self.is_done = True

    async def _receive(self) -> Message:
        body, self._body = self._body, None
        if body is not None:
            return {"type": "http.request", "body": body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.body += message.get("body", b"")
