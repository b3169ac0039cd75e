"""The neuron API over a mock node, on a real socket.

Time is in the test's hands: a load or a stream waits at an `asyncio.Event` gate where one is
set, so that no test has to sleep.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Literal

import msgspec
from aiohttp import web

from cortex.core.neuron_api import (
    Endpoint,
    LoadRequest,
    RecycleRequest,
    RecycleResponse,
    UnloadRequest,
    UnloadResponse,
    Version,
)
from cortex.core.openai import (
    KEEPALIVE,
    SSE_DONE,
    ModelCard,
    ModelList,
    Usage,
    usage_comment,
)
from tests.support.mock_neuron import answers
from tests.support.mock_neuron.engine import EngineDied, QueueFull
from tests.support.mock_neuron.events import EventFeed
from tests.support.mock_neuron.faults import FaultCommand
from tests.support.mock_neuron.node import Node, RefusedError
from tests.support.mock_neuron.script import MockModel, Seen

KEEPALIVE_S = 1.0
# Answered from the script alone, by models without an engine.
COMPLETIONS_PATH = "/v1/completions"
EMBEDDINGS_PATH = "/v1/embeddings"
BUSY_RETRY_S = 7

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class MockNeuron(Node):
    """A node that is served; `async with` listens on a free port.

    Attributes:
        polls: how often `/models` was asked for.
        cancelled: requests whose caller left.
        feed: its events; `/events` is there only where `events` says so.
        control_fault: what `/discovery`, `/health` and `/models` do instead of answering.
    """

    def __init__(
        self,
        *models: MockModel,
        host: str = "127.0.0.1",
        port: int = 0,
        events: bool = False,
        **node: Any,
    ) -> None:
        super().__init__(*models, **node)
        self.feed = EventFeed(self)
        self.events = events
        self.host = host
        self.port = port
        self.polls = 0
        self.cancelled = 0
        self.control_fault: Literal["hang", "malformed", "error"] | None = None
        self._runner: web.AppRunner | None = None

    @property
    def endpoint(self) -> str:
        """Where it listens."""
        return f"http://{self.host}:{self.port}"

    async def __aenter__(self) -> "MockNeuron":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen; on the same port again after a `stop`."""
        app = web.Application(client_max_size=1 << 27, middlewares=[self._edge])
        app.router.add_routes(
            [
                web.get("/version", self._version),
                web.get("/discovery", self._discovery),
                web.get("/health", self._health),
                web.get("/models", self._models),
                web.post("/models/load", self._load),
                web.post("/models/unload", self._unload),
                web.post("/models/recycle", self._recycle),
                web.get("/models/{model_id:.+}/endpoint", self._endpoint),
                web.get("/models/{model_id:.+}", self._model),
                web.get("/v1/models", self._cards),
                web.post("/v1/chat/completions", self._chat),
                web.post(COMPLETIONS_PATH, self._chat),
                web.post(EMBEDDINGS_PATH, self._chat),
                web.post("/v1/tokenize", self._tokenize),
                web.post("/mock/fault", self._fault),
                web.post("/mock/clear", self._clear),
                web.get("/mock/stats", self._stats),
            ]
        )
        if self.events:
            app.router.add_get("/events", self.feed.serve)
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=0.01
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.host, self.port, backlog=1024)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self.start_engines()

    async def stop(self) -> None:
        """Stop listening and cut every connection."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        await self.end_tasks()
        for model in self.models.values():
            model.running = None

    @web.middleware
    async def _edge(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if not request.path.startswith("/mock/"):
            await self.faults.speak()
        try:
            response = await handler(request)
        except RefusedError as exc:
            response = answers.error_answer(exc.status, exc.code, exc.message, **exc.extras)
        if not request.path.startswith("/mock/"):
            await self.faults.speak()
        return response

    async def _control(self) -> web.Response | None:
        match self.control_fault:
            case "hang":
                await asyncio.Event().wait()
            case "malformed":
                return web.Response(text="<html>not a neuron</html>")
            case "error":
                return answers.error_answer(500, "internal_server_error")
        return None

    async def _version(self, _: web.Request) -> web.Response:
        return answers.json_answer(Version(package_version="mock"))

    async def _discovery(self, _: web.Request) -> web.Response:
        return await self._control() or answers.json_answer(self.discovery())

    async def _health(self, _: web.Request) -> web.Response:
        return await self._control() or answers.json_answer(self.health())

    async def _models(self, _: web.Request) -> web.Response:
        self.polls += 1
        await self.changed()
        listed = [self.info(model) for model in self.models.values()]
        return await self._control() or answers.json_answer(listed)

    async def _model(self, request: web.Request) -> web.Response:
        return answers.json_answer(self.info(self._named(request)))

    async def _cards(self, _: web.Request) -> web.Response:
        cards = [
            ModelCard(id=model.id, loaded=model.status == "loaded", status=model.status)
            for model in self.models.values()
        ]
        return answers.json_answer(ModelList(data=cards))

    async def _endpoint(self, request: web.Request) -> web.Response:
        if self._named(request).status != "loaded":
            raise RefusedError(404, "model_not_found")
        return answers.json_answer(Endpoint(url=self.endpoint))

    def _named(self, request: web.Request) -> MockModel:
        model = self.models.get(request.match_info["model_id"])
        if model is None:
            raise RefusedError(404, "model_not_found")
        return model

    async def _load(self, request: web.Request) -> web.Response:
        wish = msgspec.json.decode(await request.read(), type=LoadRequest)
        answer = await self.load(wish)
        return answers.json_answer(answer, 202 if answer.status == "loading" else 200)

    async def _unload(self, request: web.Request) -> web.Response:
        wish = msgspec.json.decode(await request.read(), type=UnloadRequest)
        await self.unload(wish.model_id)
        return answers.json_answer(UnloadResponse(status="unloaded", model_id=wish.model_id))

    async def _recycle(self, request: web.Request) -> web.Response:
        wish = msgspec.json.decode(await request.read(), type=RecycleRequest)
        await self.recycle(wish.model_id)
        return answers.json_answer(RecycleResponse(status="recycled", model_id=wish.model_id))

    async def _fault(self, request: web.Request) -> web.Response:
        self.apply(msgspec.json.decode(await request.read(), type=FaultCommand))
        return answers.json_answer({})

    async def _clear(self, _: web.Request) -> web.Response:
        self.faults.clear()
        return answers.json_answer({})

    async def _stats(self, _: web.Request) -> web.Response:
        engines = [each.running for each in self.models.values() if each.running is not None]
        return answers.json_answer(
            {
                "requests": self.requests,
                "cancelled": self.cancelled,
                "starts": self.starts,
                "loads": len(self.loads),
                "prompt_tokens": sum(each.prompt_tokens for each in engines),
                "cached_tokens": sum(each.cached_tokens for each in engines),
            }
        )

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.note(Seen(request.path, dict(request.headers), body))
        asked = msgspec.json.decode(body)
        if asked["model"] not in self.models:
            raise RefusedError(404, "model_not_found")
        words = sum(len(str(message["content"]).split()) for message in asked["messages"])
        return answers.json_answer({"count": words + len(asked.get("tools") or [])})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.note(Seen(request.path, dict(request.headers), body))
        asked = msgspec.json.decode(body)
        if self.faults.takes("errors"):
            raise RefusedError(500, "internal_server_error")
        model = self.models.get(asked["model"])
        if model is not None and model.status == "recovering":
            raise RefusedError(503, "model_recovering", "the engine is being restarted")
        if model is None or model.status != "loaded":
            raise RefusedError(404, "model_not_found")
        if model.refusal is not None:
            return answers.error_answer(*model.refusal, headers={"retry-after": str(BUSY_RETRY_S)})
        self.begin(model)
        await self.changed()
        try:
            return await self._answer(request, model, asked)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            model.in_flight -= 1
            await self.changed()

    async def _answer(
        self, request: web.Request, model: MockModel, asked: dict[str, Any]
    ) -> web.StreamResponse:
        if model.first_gate is not None:
            await model.first_gate.wait()
        if model.fault == "hang":
            await asyncio.Event().wait()
        if model.fault == "reset":
            return answers.cut(request)
        if model.fault == "malformed":
            return web.Response(text="certainly not JSON")
        if request.path == EMBEDDINGS_PATH:
            return answers.json_answer(answers.embeddings(model, asked))
        if model.running is not None:
            return await self._from_engine(request, model, asked)
        if asked.get("stream"):
            return await self._scripted_stream(request, model, asked)
        if model.fault == "die":
            return answers.cut(request)
        text, counts = "".join(model.tokens), answers.scripted_usage(model)
        if request.path == COMPLETIONS_PATH:
            return answers.json_answer(answers.text_completion(model.id, text, counts))
        return answers.json_answer(answers.completion(model.id, text, counts, model.tool_call))

    async def _scripted_stream(
        self, request: web.Request, model: MockModel, asked: dict[str, Any]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        if model.fault == "late_refusal":
            await response.write(KEEPALIVE)
            await response.write(answers.error_event("queue_full", "the queue is full"))
            return response
        is_chat = request.path != COMPLETIONS_PATH
        if is_chat:
            await response.write(answers.chunk(model.id, {"role": "assistant", "content": ""}))
        else:
            await response.write(answers.text_chunk(model.id, ""))
        for sent, token in enumerate(model.tokens):
            if model.fault == "die" and sent == model.die_after:
                return answers.cut(request, response)
            if model.fault == "error_event" and sent == model.die_after:
                await response.write(answers.error_event("engine_died", "the engine died"))
                return response
            if model.token_gate is not None and sent >= model.free_tokens:
                await model.token_gate.wait()
            said = answers.chunk(model.id, {"content": token})
            await response.write(said if is_chat else answers.text_chunk(model.id, token))
        finish = "stop"
        if model.tool_call is not None:
            call = {"index": 0, "id": "call_1", "type": "function", "function": model.tool_call}
            await response.write(answers.chunk(model.id, {"tool_calls": [call]}))
            finish = "tool_calls"
        end = answers.chunk(model.id, {}, finish)
        await response.write(end if is_chat else answers.text_chunk(model.id, "", finish))
        await response.write(_last(model, asked, answers.scripted_usage(model)))
        if model.fault != "no_done":
            await response.write(SSE_DONE)
        await response.write_eof()
        return response

    async def _from_engine(
        self, request: web.Request, model: MockModel, asked: dict[str, Any]
    ) -> web.StreamResponse:
        assert model.running is not None
        text = answers.rendered(asked)
        asked_tokens = asked.get("max_tokens") or asked.get("max_completion_tokens")
        limit = model.running.spec.max_tokens
        generated = model.running.generate(text, min(asked_tokens or limit, limit))
        reset = self.faults.takes("reset")
        async with aclosing(generated):
            try:
                if asked.get("stream"):
                    return await self._engine_stream(request, model, asked, generated, reset=reset)
                counts, tokens = await _collected(generated)
            except EngineDied as exc:
                raise RefusedError(502, "engine_died", "the engine ended unexpectedly") from exc
            except QueueFull:
                return answers.error_answer(
                    503, "queue_full", headers={"retry-after": str(BUSY_RETRY_S)}
                )
        if reset:
            return answers.cut(request)
        return answers.json_answer(answers.completion(model.id, "".join(tokens), counts))

    async def _engine_stream(
        self,
        request: web.Request,
        model: MockModel,
        asked: dict[str, Any],
        generated: AsyncGenerator[str | tuple[int, int], None],
        *,
        reset: bool,
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        prompt = cached = sent = 0
        try:
            async with aclosing(_with_keepalives(generated)) as items:
                async for item in items:
                    await self.faults.speak()
                    if not response.prepared:
                        await response.prepare(request)
                    if item is None:
                        await response.write(KEEPALIVE)
                    elif isinstance(item, tuple):
                        prompt, cached = item
                        told = usage_comment(answers.usage(prompt, 0, cached))
                        role = answers.chunk(model.id, {"role": "assistant", "content": ""})
                        await response.write(told + role)
                    elif reset and sent == self.faults.after_tokens:
                        return answers.cut(request, response)
                    else:
                        sent += 1
                        await response.write(answers.chunk(model.id, {"content": item}))
        except EngineDied:
            if not response.prepared:
                raise
            error = answers.error_event("engine_died", "the engine ended unexpectedly")
            await response.write(error)
            return response
        counts = answers.usage(prompt, sent, cached)
        end = answers.chunk(model.id, {}, "stop") + usage_comment(counts)
        await response.write(end + _last(model, asked, counts) + SSE_DONE)
        await response.write_eof()
        return response


def _last(model: MockModel, asked: dict[str, Any], counts: Usage) -> bytes:
    """Return the chunk that tells the usage, to a caller who wants it."""
    if not (asked.get("stream_options") or {}).get("include_usage"):
        return b""
    return answers.event({**answers.head(model.id, "chunk"), "choices": [], "usage": counts})


async def _collected(
    generated: AsyncGenerator[str | tuple[int, int], None],
) -> tuple[Usage, list[str]]:
    prompt = cached = 0
    tokens: list[str] = []
    async for item in generated:
        if isinstance(item, tuple):
            prompt, cached = item
        else:
            tokens.append(item)
    return answers.usage(prompt, len(tokens), cached), tokens


async def _with_keepalives(
    generated: AsyncGenerator[str | tuple[int, int], None],
) -> AsyncGenerator[str | tuple[int, int] | None, None]:
    """Yield what comes, and None for every KEEPALIVE_S in which nothing does."""
    upcoming: asyncio.Task[str | tuple[int, int]] | None = None
    try:
        while True:
            if upcoming is None:
                upcoming = asyncio.get_running_loop().create_task(anext(generated))  # type: ignore[arg-type]
            done, _ = await asyncio.wait([upcoming], timeout=KEEPALIVE_S)
            if not done:
                yield None
                continue
            try:
                item = upcoming.result()
            except StopAsyncIteration:
                return
            upcoming = None
            yield item
    finally:
        if upcoming is not None and not upcoming.done():
            upcoming.cancel()
            await asyncio.wait([upcoming])
