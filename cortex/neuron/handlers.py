"""The neuron's HTTP routes; errors of all of them speak OpenAI's envelope."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from cortex.core.completions import CompletionRequest, parse_completion_request
from cortex.core.decode import decode_body
from cortex.core.embeddings import EMBEDDINGS_PATH, parse_embedding_request
from cortex.core.errors import ModelNotFoundError
from cortex.core.neuron_api import (
    Endpoint,
    LoadRequest,
    LoadResponse,
    RecycleRequest,
    RecycleResponse,
    UnloadRequest,
    UnloadResponse,
)
from cortex.core.openai import KEEPALIVE, ChatRequest, error_event, parse_chat_request
from cortex.core.serve import SHUTDOWN
from cortex.core.web import (
    EventStream,
    build_app,
    cancel_on_disconnect,
    json_response,
    read_body,
)
from cortex.neuron.command.rewrite import Head, parse_head
from cortex.neuron.embeddings import Embeddings
from cortex.neuron.events import PING, EventHub
from cortex.neuron.inference import Inference
from cortex.neuron.lifecycle import Lifecycle
from cortex.neuron.metrics import CONTENT_TYPE, Metrics
from cortex.neuron.relay import CHAT_PATH, COMPLETIONS_PATH, Relay
from cortex.neuron.tokenize import TokenizeRequest, TokenizeResponse
from cortex.neuron.views import Views

# Load and unload bodies are a few names long.
MAX_CONTROL_BODY_BYTES = 1 << 20
# A client or proxy that hears nothing for long gives up; prefill can take long.
KEEPALIVE_S = 1.0
# What an external engine is told of a request besides its body, for its own log.
FORWARDED = ("x-request-id",)
# A listing waits this long for a fresh look at the directories, then shows the last one.
LISTING_WAIT_S = 0.2
# The hub sends a sign of life every second; this one is for when it cannot.
EVENTS_KEEPALIVE_S = 1.5

_load_decoder = msgspec.json.Decoder(LoadRequest)
_unload_decoder = msgspec.json.Decoder(UnloadRequest)
_recycle_decoder = msgspec.json.Decoder(RecycleRequest)
_tokenize_decoder = msgspec.json.Decoder(TokenizeRequest)


class Handlers:
    """The routes over one lifecycle."""

    def __init__(
        self,
        *,
        lifecycle: Lifecycle,
        inference: Inference,
        embeddings: Embeddings,
        relay: Relay,
        views: Views,
        events: EventHub,
        metrics: Metrics,
        max_body_bytes: int,
    ) -> None:
        self._lifecycle = lifecycle
        self._inference = inference
        self._embeddings = embeddings
        self._relay = relay
        self._views = views
        self._events = events
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes

    def app(self) -> ASGIApp:
        """Return the ASGI app."""
        return build_app(
            [
                Route("/version", self.version),
                Route("/discovery", self.discovery),
                Route("/health", self.health),
                Route("/metrics", self.metrics),
                Route("/events", self.events),
                Route("/models", self.models),
                Route("/models/load", self.load, methods=["POST"]),
                Route("/models/unload", self.unload, methods=["POST"]),
                Route("/models/recycle", self.recycle, methods=["POST"]),
                Route("/models/{model_id:path}/endpoint", self.endpoint),
                Route("/models/{model_id:path}", self.model),
                Route("/v1/models", self.cards),
                Route(CHAT_PATH, self.chat, methods=["POST"]),
                Route(COMPLETIONS_PATH, self.completions, methods=["POST"]),
                Route(EMBEDDINGS_PATH, self.embeddings, methods=["POST"]),
                Route("/v1/tokenize", self.tokenize, methods=["POST"]),
            ]
        )

    async def version(self, _: Request) -> Response:
        """`GET /version`."""
        return json_response(self._views.version())

    async def discovery(self, _: Request) -> Response:
        """`GET /discovery`."""
        return json_response(self._views.discovery())

    async def health(self, _: Request) -> Response:
        """`GET /health`."""
        return json_response(self._views.health())

    async def metrics(self, _: Request) -> Response:
        """`GET /metrics`."""
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE})

    async def events(self, request: Request) -> EventStream:
        """`GET /events`: what changes here, from the last event the caller has seen."""
        last_id = request.headers.get("last-event-id") or request.query_params.get("last_event_id")
        ending: asyncio.Event = request.scope.get(SHUTDOWN) or asyncio.Event()
        return EventStream(
            self._events.stream(last_id, ending),
            keepalive=PING,
            keepalive_s=EVENTS_KEEPALIVE_S,
            on_error=error_event,
        )

    async def models(self, _: Request) -> Response:
        """`GET /models`."""
        await self._lifecycle.refresh(LISTING_WAIT_S)
        return json_response(self._views.models())

    async def cards(self, _: Request) -> Response:
        """`GET /v1/models`."""
        await self._lifecycle.refresh(LISTING_WAIT_S)
        return json_response(self._views.cards())

    async def model(self, request: Request) -> Response:
        """`GET /models/{id}`."""
        model_id: str = request.path_params["model_id"]
        info = self._views.model(model_id)
        if info is None:
            raise ModelNotFoundError(
                f"this neuron has no model '{model_id}'; GET /models lists what it can serve",
                param="model_id",
            )
        return json_response(info)

    async def endpoint(self, request: Request) -> Response:
        """`GET /models/{id}/endpoint`: this very address, as the caller wrote it."""
        model_id: str = request.path_params["model_id"]
        model = self._lifecycle.model(model_id)
        if model is None or model.state.status != "loaded":
            raise ModelNotFoundError(f"model '{model_id}' is not loaded here", param="model_id")
        return json_response(Endpoint(url=f"{request.url.scheme}://{request.url.netloc}"))

    async def load(self, request: Request) -> Response:
        """`POST /models/load`: answers when the model is loaded, or at once without `wait`."""
        body = await read_body(request, max_bytes=MAX_CONTROL_BODY_BYTES)
        asked = decode_body(_load_decoder, body)
        return await cancel_on_disconnect(request, self._load(asked))

    async def _load(self, asked: LoadRequest) -> Response:
        job = await self._lifecycle.load(asked)
        if asked.wait:
            await job.wait()
        if job.load_s is None:
            loading = LoadResponse(status="loading", model_id=asked.model_id, progress=job.progress)
            return json_response(loading, status=202)
        return json_response(
            LoadResponse(
                status="loaded",
                model_id=asked.model_id,
                load_s=job.load_s,
                evicted=job.evicted,
                drained=job.drained,
            )
        )

    async def unload(self, request: Request) -> Response:
        """`POST /models/unload`: answers when everything the model held is given back."""
        body = await read_body(request, max_bytes=MAX_CONTROL_BODY_BYTES)
        asked = decode_body(_unload_decoder, body)
        await cancel_on_disconnect(request, self._lifecycle.unload(asked.model_id))
        return json_response(UnloadResponse(status="unloaded", model_id=asked.model_id))

    async def recycle(self, request: Request) -> Response:
        """`POST /models/recycle`: answers when the model's new engine serves."""
        body = await read_body(request, max_bytes=MAX_CONTROL_BODY_BYTES)
        asked = decode_body(_recycle_decoder, body)
        return await cancel_on_disconnect(request, self._recycle(asked.model_id))

    async def _recycle(self, model_id: str) -> Response:
        job = await self._lifecycle.recycle(model_id)
        await job.wait()
        return json_response(
            RecycleResponse(status="recycled", model_id=model_id, load_s=job.load_s)
        )

    async def chat(self, request: Request) -> Response | EventStream:
        """`POST /v1/chat/completions`."""
        return await self._answered(request, CHAT_PATH, parse_chat_request)

    async def completions(self, request: Request) -> Response | EventStream:
        """`POST /v1/completions`."""
        return await self._answered(request, COMPLETIONS_PATH, parse_completion_request)

    async def _answered(
        self,
        request: Request,
        path: str,
        parse: Callable[[bytes], ChatRequest | CompletionRequest],
    ) -> Response | EventStream:
        body = await read_body(request, max_bytes=self._max_body_bytes)
        head = parse_head(body)
        if self._lifecycle.is_external(head.model):
            return await self._relayed(request, path, body, head)
        asked = parse(body)
        serving = self._inference.serving(asked.model)
        if asked.stream:
            return _event_stream(self._inference.stream(asked, serving))
        completion = await cancel_on_disconnect(request, self._inference.complete(asked, serving))
        return json_response(completion)

    async def _relayed(
        self, request: Request, path: str, body: bytes, head: Head
    ) -> Response | EventStream:
        """Answer by an external engine, which is the judge of all that is not in the head."""
        serving = self._lifecycle.serving(head.model)
        headers = {name: request.headers[name] for name in FORWARDED if name in request.headers}
        if head.stream:
            return _event_stream(self._relay.stream(path, body, head, serving, headers))
        completion = await cancel_on_disconnect(
            request, self._relay.complete(path, body, head, serving, headers)
        )
        return Response(completion, media_type="application/json")

    async def embeddings(self, request: Request) -> Response | EventStream:
        """`POST /v1/embeddings`; no stream, whatever the body says."""
        body = await read_body(request, max_bytes=self._max_body_bytes)
        head = msgspec.structs.replace(parse_head(body), stream=False)
        if self._lifecycle.is_external(head.model):
            return await self._relayed(request, EMBEDDINGS_PATH, body, head)
        asked = parse_embedding_request(body)
        serving = self._inference.serving(asked.model)
        answer = await cancel_on_disconnect(request, self._embeddings.answer(asked, serving))
        return Response(answer, media_type="application/json")

    async def tokenize(self, request: Request) -> Response:
        """`POST /v1/tokenize`."""
        body = await read_body(request, max_bytes=self._max_body_bytes)
        asked = decode_body(_tokenize_decoder, body)
        counting: Coroutine[Any, Any, TokenizeResponse]
        if self._lifecycle.is_external(asked.model):
            counting = self._relay.tokenize(asked, self._lifecycle.serving(asked.model))
        else:
            counting = self._inference.tokenize(asked)
        return json_response(await cancel_on_disconnect(request, counting))


def _event_stream(events: AsyncGenerator[bytes, None]) -> EventStream:
    return EventStream(events, keepalive=KEEPALIVE, keepalive_s=KEEPALIVE_S, on_error=error_event)
