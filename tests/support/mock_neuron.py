"""A neuron without an engine: the real API over a real socket, with behaviour on command.

Time is in the test's hands: a load or a stream waits at an `asyncio.Event` gate where one is
set, so that no test has to sleep.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
from aiohttp import web

from cortex.core.neuron_api import (
    Device,
    DeviceHealth,
    Discovery,
    Limit,
    LoadProgress,
    LoadRequest,
    LoadResponse,
    ModelInfo,
    ModelLoad,
    NeuronHealth,
    Servable,
)

GIB = 1 << 30

Fault = Literal[
    "hang",  # never answer
    "die",  # cut the connection after `die_after` tokens
    "no_done",  # end the stream properly framed, but without [DONE]
    "error_event",  # an error event in mid-stream, then the end
    "malformed",  # 200 and something that is not JSON
    "reset",  # cut the connection before any answer
    "late_refusal",  # keep-alive comments, then an error event as the first event
]


@dataclass
class MockModel:
    """One model and how it behaves.

    Attributes:
        tokens: the answer, one chunk each.
        load_gate: a load waits here.
        token_gate: every token after the first `free_tokens` waits here.
        first_gate: the answer's head waits here.
        refusal: (status, code) of every inference request.
        load_refusal: (status, code) of every load.
    """

    id: str
    status: str = "unloaded"
    memory_bytes: int = GIB
    tokens: list[str] = field(default_factory=lambda: ["Hello", " world", "!"])
    tool_call: dict[str, str] | None = None
    prompt_tokens: int = 7
    cached_tokens: int = 2
    load_gate: asyncio.Event | None = None
    first_gate: asyncio.Event | None = None
    token_gate: asyncio.Event | None = None
    free_tokens: int = 1
    fault: Fault | None = None
    die_after: int = 1
    refusal: tuple[int, str] | None = None
    load_refusal: tuple[int, str] | None = None
    servable: Servable | None = None
    limit: Limit | None = None
    capabilities: list[str] = field(default_factory=lambda: ["text"])
    progress: LoadProgress | None = None
    in_flight: int = 0
    reported_in_flight: int | None = None
    queue_depth: int = 0
    used_tick: int | None = None


@dataclass
class Seen:
    """One request as it arrived."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        """The decoded body."""
        decoded: dict[str, Any] = msgspec.json.decode(self.body)
        return decoded


class MockNeuron:
    """A scripted neuron; `async with` serves it on a free port."""

    def __init__(self, *models: MockModel, total_bytes: int = 64 * GIB) -> None:
        self.models = {model.id: model for model in models}
        self.total_bytes = total_bytes
        self.devices = [Device(index=0, name="Mock", vram_total_mb=total_bytes >> 20)]
        self.status: Literal["ok", "draining"] = "ok"
        self.seen: list[Seen] = []
        self.loads: list[LoadRequest] = []
        self.polls = 0
        self.cancelled = 0
        self.change = asyncio.Condition()
        self.control_fault: Literal["hang", "malformed", "error"] | None = None
        self.port = 0
        self._loading: dict[str, asyncio.Event] = {}
        self._tick = 0
        self._runner: web.AppRunner | None = None

    @property
    def endpoint(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> "MockNeuron":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen; on the same port again after a `stop`."""
        app = web.Application(client_max_size=1 << 27)
        app.router.add_get("/discovery", self._discovery)
        app.router.add_get("/health", self._health)
        app.router.add_get("/models", self._models)
        app.router.add_post("/models/load", self._load)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/tokenize", self._tokenize)
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=0.01
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Stop listening and cut every connection."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def until(self, test: Any) -> None:
        """Wait until `test()` holds; checked whenever something happened here."""
        async with asyncio.timeout(10), self.change:
            await self.change.wait_for(test)

    async def _changed(self) -> None:
        async with self.change:
            self.change.notify_all()

    async def _control(self) -> web.Response | None:
        match self.control_fault:
            case "hang":
                await asyncio.Event().wait()
            case "malformed":
                return web.Response(text="<html>not a neuron</html>")
            case "error":
                return _error(500, "internal_server_error")
        return None

    async def _discovery(self, _: web.Request) -> web.Response:
        if (fault := await self._control()) is not None:
            return fault
        return _json(Discovery(hostname="mock", devices=self.devices, memory_total_mb=65536))

    async def _health(self, _: web.Request) -> web.Response:
        if (fault := await self._control()) is not None:
            return fault
        used_mb = (self.total_bytes - self.free_bytes) >> 20
        loads = [
            ModelLoad(
                id=model.id,
                in_flight=_in_flight(model),
                queue_depth=model.queue_depth,
                max_in_flight=8,
                max_queue_depth=64,
                free_slots=8 - _in_flight(model),
                rejected_queue_full=3,
                tok_s_decode=50.0,
            )
            for model in self.models.values()
            if model.status == "loaded"
        ]
        devices = [
            DeviceHealth(
                index=device.index,
                vram_used_mb=used_mb,
                vram_free_mb=device.vram_total_mb - used_mb,
                utilization_pct=12,
                temp_c=40,
            )
            for device in self.devices
        ]
        return _json(NeuronHealth(uptime_secs=1, status=self.status, devices=devices, models=loads))

    async def _models(self, _: web.Request) -> web.Response:
        self.polls += 1
        await self._changed()
        if (fault := await self._control()) is not None:
            return fault
        return _json([self._info(model) for model in self.models.values()])

    def _info(self, model: MockModel) -> ModelInfo:
        return ModelInfo(
            id=model.id,
            harness="torch",
            status=model.status,
            weight_bytes=model.memory_bytes,
            capabilities=model.capabilities,
            limit=model.limit,
            servable=model.servable,
            progress=model.progress,
            in_flight=_in_flight(model),
            last_used_s=self._idle_s(model),
        )

    def _idle_s(self, model: MockModel) -> float | None:
        return None if model.used_tick is None else float(self._tick - model.used_tick)

    @property
    def free_bytes(self) -> int:
        """Memory that no loaded or loading model holds."""
        held = sum(
            model.memory_bytes
            for model in self.models.values()
            if model.status in ("loaded", "loading", "recovering")
        )
        return self.total_bytes - held

    async def _load(self, request: web.Request) -> web.Response:
        wish = msgspec.json.decode(await request.read(), type=LoadRequest)
        self.loads.append(wish)
        await self._changed()
        model = self.models.get(wish.model_id)
        if model is None:
            return _error(422, "unreadable_checkpoint", f"no checkpoint for {wish.model_id}")
        if model.load_refusal is not None:
            return _error(*model.load_refusal)
        if model.status == "loaded":
            return _json(LoadResponse(status="loaded", model_id=model.id, load_s=0.0))
        if model.id in self._loading:
            await self._loading[model.id].wait()
            return _json(LoadResponse(status="loaded", model_id=model.id, load_s=0.0))
        evicted = self._evict(wish.evict)
        if self.free_bytes < model.memory_bytes:
            return self._shortage(model)
        model.status = "loading"
        done = self._loading[model.id] = asyncio.Event()
        try:
            if model.load_gate is not None:
                await model.load_gate.wait()
            model.status = "loaded"
        finally:
            # A caller that cuts the connection ends this load; a real neuron's would go on.
            if model.status == "loading":
                model.status = "unloaded"
            del self._loading[model.id]
            done.set()
        await self._changed()
        return _json(LoadResponse(status="loaded", model_id=model.id, load_s=0.1, evicted=evicted))

    def _evict(self, names: list[str]) -> list[str]:
        evicted = []
        for name in names:
            model = self.models[name]
            if model.status == "loaded" and _in_flight(model) == 0:
                model.status = "unloaded"
                evicted.append(name)
        return evicted

    def _shortage(self, model: MockModel) -> web.Response:
        residents = [
            {
                "id": each.id,
                "device": 0,
                "bytes": each.memory_bytes,
                "in_flight": _in_flight(each),
                "last_used_s": self._idle_s(each),
            }
            for each in self.models.values()
            if each.status in ("loaded", "loading", "recovering")
        ]
        return _error(
            409,
            "insufficient_memory",
            device=0,
            needed_bytes=model.memory_bytes,
            free_bytes=self.free_bytes,
            residents=residents,
        )

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.seen.append(Seen(request.path, dict(request.headers), body))
        asked = msgspec.json.decode(body)
        if asked["model"] not in self.models:
            return _error(404, "model_not_found")
        words = sum(len(str(message["content"]).split()) for message in asked["messages"])
        return web.json_response({"count": words + len(asked.get("tools") or [])})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.seen.append(Seen(request.path, dict(request.headers), body))
        asked = msgspec.json.decode(body)
        model = self.models.get(asked["model"])
        if model is None or model.status != "loaded":
            return _error(404, "model_not_found")
        if model.refusal is not None:
            return _error(*model.refusal, headers={"retry-after": "7"})
        self._tick += 1
        model.used_tick = self._tick
        model.in_flight += 1
        await self._changed()
        try:
            return await self._answer(request, model, asked)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            model.in_flight -= 1
            await self._changed()

    async def _answer(
        self, request: web.Request, model: MockModel, asked: dict[str, Any]
    ) -> web.StreamResponse:
        if model.first_gate is not None:
            await model.first_gate.wait()
        if model.fault == "hang":
            await asyncio.Event().wait()
        if model.fault == "reset":
            return _cut(request)
        if model.fault == "malformed":
            return web.Response(text="certainly not JSON")
        if asked.get("stream"):
            return await self._stream(request, model, asked)
        if model.fault == "die":
            return _cut(request)
        return web.json_response(_completion(model))

    async def _stream(
        self, request: web.Request, model: MockModel, asked: dict[str, Any]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        if model.fault == "late_refusal":
            await response.write(b": keep-alive\n\n")
            error = {"message": "the queue is full", "type": "api_error", "code": "queue_full"}
            await response.write(_event({"error": error}))
            return response
        await response.write(_chunk(model, {"role": "assistant", "content": ""}))
        for sent, token in enumerate(model.tokens):
            if model.fault == "die" and sent == model.die_after:
                return _cut(request, response)
            if model.fault == "error_event" and sent == model.die_after:
                error = {"message": "the engine died", "type": "api_error", "code": "engine_died"}
                await response.write(_event({"error": error}))
                return response
            if model.token_gate is not None and sent >= model.free_tokens:
                await model.token_gate.wait()
            await response.write(_chunk(model, {"content": token}))
        finish = "stop"
        if model.tool_call is not None:
            call = {"index": 0, "id": "call_1", "type": "function", "function": model.tool_call}
            await response.write(_chunk(model, {"tool_calls": [call]}))
            finish = "tool_calls"
        await response.write(_chunk(model, {}, finish))
        if (asked.get("stream_options") or {}).get("include_usage"):
            await response.write(_event({**_head(model, "chunk"), "choices": [], **_usage(model)}))
        if model.fault != "no_done":
            await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response


def _cut(request: web.Request, response: web.StreamResponse | None = None) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return response or web.Response()


def _in_flight(model: MockModel) -> int:
    return model.in_flight if model.reported_in_flight is None else model.reported_in_flight


def _head(model: MockModel, kind: str) -> dict[str, Any]:
    name = f"chat.completion.{kind}" if kind else "chat.completion"
    return {"id": "chatcmpl-1", "object": name, "created": 1, "model": model.id}


def _chunk(model: MockModel, delta: dict[str, Any], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return _event({**_head(model, "chunk"), "choices": [choice]})


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def _usage(model: MockModel) -> dict[str, Any]:
    usage = {
        "prompt_tokens": model.prompt_tokens,
        "completion_tokens": len(model.tokens),
        "total_tokens": model.prompt_tokens + len(model.tokens),
        "prompt_tokens_details": {"cached_tokens": model.cached_tokens},
    }
    return {"usage": usage}


def _completion(model: MockModel) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": "".join(model.tokens) or None}
    finish = "stop"
    if model.tool_call is not None:
        message["tool_calls"] = [{"id": "call_1", "type": "function", "function": model.tool_call}]
        finish = "tool_calls"
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return {**_head(model, ""), "choices": [choice], **_usage(model)}


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


def _error(
    status: int,
    code: str,
    message: str = "the mock refuses",
    headers: dict[str, str] | None = None,
    **extras: object,
) -> web.Response:
    error = {"message": message, "type": "api_error", "code": code, "param": None, **extras}
    return web.Response(
        status=status,
        body=msgspec.json.encode({"error": error}),
        content_type="application/json",
        headers=headers,
    )
