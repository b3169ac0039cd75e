"""OpenAI's Responses API over the dispatcher: translated to chat and back, and kept."""

import logging
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from cortex.core import openai
from cortex.core import responses as wire
from cortex.core.errors import BadRequestError, ResponseStoreError, UnsupportedFieldError
from cortex.core.response_draft import Draft, from_chat
from cortex.core.response_items import item_page, kept_items, parse_items_query
from cortex.core.translate_responses import PlacedItem, Translated, placed, to_chat
from cortex.core.translate_responses_stream import ResponseStream
from cortex.core.web import EventStream, cancel_on_disconnect, json_response
from cortex.gateway.auth import Caller
from cortex.gateway.counting import count_tokens
from cortex.gateway.dispatch import Ask, Dispatcher
from cortex.gateway.intake import CHAT_PATH, Intake, decode_answer, with_caller
from cortex.gateway.live import Live
from cortex.gateway.response_store import Kept, ResponseStore

PATH = "/v1/responses"

_completion_decoder = msgspec.json.Decoder(openai.ChatCompletion)
_encoder = msgspec.json.Encoder()
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A request on its way.

    Attributes:
        items: its own input as it is kept, a JSON list.
    """

    owner: str
    draft: Draft
    items: bytes


@dataclass(frozen=True, slots=True)
class _Run:
    """A stream that is under way."""

    owner: str
    stream: ResponseStream


class ResponsesHandlers:
    """The endpoints of `/v1/responses`.

    Args:
        wall_clock: seconds since 1970.
    """

    def __init__(
        self,
        *,
        live: Live,
        dispatcher: Dispatcher,
        intake: Intake,
        store: ResponseStore,
        wall_clock: Callable[[], float],
    ) -> None:
        self._live = live
        self._dispatcher = dispatcher
        self._intake = intake
        self._store = store
        self._wall_clock = wall_clock
        # By response id; as many as there are streams.
        self._runs: dict[str, _Run] = {}

    def routes(self) -> list[Route]:
        """Return the routes."""
        one = f"{PATH}/{{response_id}}"
        return [
            Route(PATH, with_caller(self._create), methods=["POST"]),
            Route(f"{PATH}/input_tokens", with_caller(self._count), methods=["POST"]),
            Route(one, with_caller(self._retrieve), methods=["GET"]),
            Route(one, with_caller(self._delete), methods=["DELETE"]),
            Route(f"{one}/cancel", with_caller(self._cancel), methods=["POST"]),
            Route(f"{one}/input_items", with_caller(self._input_items), methods=["GET"]),
        ]

    async def _create(self, request: Request, caller: Caller) -> ASGIApp:
        asked = wire.parse_request(await self._intake.body(request))
        self._intake.check_model(caller, asked.model)
        owner = _owner(caller)
        response_id = wire.RESPONSE_PREFIX + uuid.uuid4().hex
        raws = await self._resolved(asked, owner)
        translated = await self._translated(asked, owner, raws)
        body = _encoder.encode(translated.chat)
        await self._intake.admit(request, asked.model, body)
        ask = self._intake.ask(
            request,
            name=asked.model,
            path=CHAT_PATH,
            body=body,
            cache_key=asked.prompt_cache_key,
        )
        job = _Job(
            owner=owner,
            draft=Draft(asked, translated.tools, response_id, int(self._wall_clock())),
            items=kept_items(asked, raws, response_id) if asked.wants_store else b"[]",
        )
        if asked.stream:
            stream = ResponseStream(job.draft)
            return EventStream(
                self._events(ask, job, stream),
                keepalive=openai.KEEPALIVE,
                keepalive_s=self._live.settings.keepalive_s,
                on_error=stream.fail,
                headers=self._intake.exposed(ask),
            )
        response = await cancel_on_disconnect(request, self._whole(ask, job))
        return json_response(response, headers=self._intake.exposed(ask))

    async def _count(self, request: Request, caller: Caller) -> Response:
        asked = wire.parse_request(await self._intake.body(request))
        await self._intake.admit(request, asked.model, None)
        owner = _owner(caller)
        translated = await self._translated(asked, owner, await self._resolved(asked, owner))
        count = await count_tokens(request, self._dispatcher, translated.chat)
        return json_response(wire.InputTokens(input_tokens=count))

    async def _resolved(self, asked: wire.ResponsesRequest, owner: str) -> list[msgspec.Raw]:
        """Return the items of a request's input, references replaced by what they stand for."""
        if not isinstance(asked.input, list):
            return []
        items = wire.parse_items(asked.input)
        wanted = {at: item.id for at, item in enumerate(items) if item.kind == "item_reference"}
        if not wanted:
            return asked.input
        for at, item_id in wanted.items():
            if not item_id:
                raise BadRequestError(
                    f"input[{at}]: an item needs a type, a role or an id", param=f"input[{at}]"
                )
        found = await self._store.items(owner, [each for each in wanted.values() if each])
        return [
            found[wanted[at] or ""] if at in wanted else raw for at, raw in enumerate(asked.input)
        ]

    async def _translated(
        self, asked: wire.ResponsesRequest, owner: str, raws: list[msgspec.Raw]
    ) -> Translated:
        before: list[PlacedItem] = []
        previous = asked.previous_response_id
        if previous is not None:
            kept = await self._store.conversation(owner, previous)
            before = placed(wire.parse_items(kept, previous), previous)
        return to_chat(asked, [*before, *placed(wire.parse_items(raws))])

    async def _whole(self, ask: Ask, job: _Job) -> wire.Response:
        answer = await self._dispatcher.whole(ask)
        completion = decode_answer(_completion_decoder, answer)
        response = from_chat(completion, job.draft, is_stored=job.draft.request.wants_store)
        if response.store and not await self._keep(job, response):
            return msgspec.structs.replace(response, store=False)
        return response

    async def _events(
        self, ask: Ask, job: _Job, stream: ResponseStream
    ) -> AsyncGenerator[bytes, None]:
        response_id = job.draft.response_id
        self._runs[response_id] = _Run(job.owner, stream)
        try:
            async with aclosing(self._dispatcher.stream(ask, openai.KEEPALIVE, stream)) as events:
                async for chunk in events:
                    if stream.is_cancelled:
                        break
                    yield chunk
            is_stored = False
            if stream.is_complete and job.draft.request.wants_store:
                # Before the last event: whoever has seen it may go on from the response.
                is_stored = await self._keep(job, stream.response)
            yield stream.conclude(is_stored=is_stored)
        finally:
            del self._runs[response_id]

    async def _keep(self, job: _Job, response: wire.Response) -> bool:
        """Store a response; False, and a line in the log, where that fails."""
        kept = Kept(
            id=response.id,
            owner=job.owner,
            previous=response.previous_response_id,
            response=_encoder.encode(response),
            items=job.items,
        )
        try:
            is_stored = await self._store.put(kept)
        except ResponseStoreError as exc:
            _logger.warning("a response was not kept: %s", exc.message)
            return False
        if not is_stored:
            _logger.warning(
                "a response of %d bytes was not kept: it is over responses.max_mb", kept.size
            )
        return is_stored

    async def _retrieve(self, request: Request, caller: Caller) -> Response:
        response_id = request.path_params["response_id"]
        if request.query_params.get("stream") in ("true", "1"):
            raise UnsupportedFieldError(
                "stream is not supported here: a response is streamed once, as it is made",
                param="stream",
            )
        run = self._run_of(response_id, caller)
        if run is not None:
            return json_response(run.stream.response)
        kept = await self._store.get(_owner(caller), response_id)
        return Response(kept.response, media_type="application/json")

    async def _delete(self, request: Request, caller: Caller) -> Response:
        response_id = request.path_params["response_id"]
        await self._store.delete(_owner(caller), response_id)
        return json_response(wire.Deleted(id=response_id))

    async def _cancel(self, request: Request, caller: Caller) -> Response:
        response_id = request.path_params["response_id"]
        run = self._run_of(response_id, caller)
        if run is not None and run.stream.is_open:
            return json_response(run.stream.cancel())
        await self._store.get(_owner(caller), response_id)
        raise BadRequestError(
            f"response '{response_id[:64]}' is complete; only one that is being streamed can be "
            "cancelled"
        )

    async def _input_items(self, request: Request, caller: Caller) -> Response:
        query = parse_items_query(dict(request.query_params))
        kept = await self._store.get(_owner(caller), request.path_params["response_id"])
        return json_response(item_page(msgspec.json.decode(kept.items), query))

    def _run_of(self, response_id: str, caller: Caller) -> _Run | None:
        run = self._runs.get(response_id)
        return run if run is not None and run.owner == _owner(caller) else None


def _owner(caller: Caller) -> str:
    """Return what tells one key from another; callers without a known one are one owner."""
    if not caller.is_known:
        return ""
    return _encoder.encode([caller.account_id, caller.key_id]).decode()
