"""The gateway's HTTP routes: read what must be read, hand the rest to the dispatcher."""

from collections.abc import Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from cortex.core import anthropic, openai, translate
from cortex.core.completions import parse_completion_request
from cortex.core.decode import decode_body
from cortex.core.embeddings import EMBEDDINGS, EMBEDDINGS_PATH, parse_embedding_request
from cortex.core.errors import (
    MissingModelError,
    ModelNotFoundError,
    PermissionDeniedError,
)
from cortex.core.translate_stream import StreamTranslator
from cortex.core.web import (
    EventStream,
    cancel_on_disconnect,
    dialect_of,
    json_response,
)
from cortex.gateway.auth import Caller, refusal
from cortex.gateway.counting import count_tokens
from cortex.gateway.decisions import Decisions
from cortex.gateway.dispatch import Ask, Dispatcher
from cortex.gateway.edge import visit_of
from cortex.gateway.fleet import Fleet
from cortex.gateway.intake import (
    CHAT_PATH,
    Intake,
    decode_answer,
    no_such_model,
    with_caller,
)
from cortex.gateway.live import Live
from cortex.gateway.metrics import CONTENT_TYPE, Metrics
from cortex.gateway.plans import plan_report
from cortex.gateway.roster import targets
from cortex.gateway.router import NOTHING, Refuse, Serve
from cortex.gateway.routing import Routing, Trip
from cortex.gateway.usage import usage_report
from cortex.gateway.views import ConfigReport, health_report, model_card, model_cards

COMPLETIONS_PATH = "/v1/completions"

_head_decoder = msgspec.json.Decoder(openai.RequestHead)
_messages_decoder = msgspec.json.Decoder(anthropic.MessagesRequest)
_count_decoder = msgspec.json.Decoder(anthropic.CountTokensRequest)
_completion_decoder = msgspec.json.Decoder(openai.ChatCompletion)
_encoder = msgspec.json.Encoder()


class Handlers:
    """The API's endpoints over one dispatcher."""

    def __init__(
        self,
        *,
        live: Live,
        fleet: Fleet,
        routing: Routing,
        decisions: Decisions,
        dispatcher: Dispatcher,
        metrics: Metrics,
        intake: Intake,
    ) -> None:
        self._intake = intake
        self._live = live
        self._fleet = fleet
        self._routing = routing
        self._decisions = decisions
        self._dispatcher = dispatcher
        self._metrics = metrics

    def routes(self) -> list[Route]:
        """Return the API's routes; `gateway.edge` asks for a key before any of them."""
        return [
            Route("/", self._health, methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/v1/usage", with_caller(self._usage), methods=["GET"]),
            Route("/plan", with_caller(self._plan), methods=["GET"]),
            Route("/why/{request_id:path}", with_caller(self._why), methods=["GET"]),
            Route("/v1/models", with_caller(self._models), methods=["GET"]),
            Route("/v1/models/{name:path}", with_caller(self._model), methods=["GET"]),
            Route(CHAT_PATH, with_caller(self._chat), methods=["POST"]),
            Route(COMPLETIONS_PATH, with_caller(self._completions), methods=["POST"]),
            Route(EMBEDDINGS_PATH, with_caller(self._embeddings), methods=["POST"]),
            Route("/v1/messages", with_caller(self._messages), methods=["POST"]),
            Route("/v1/messages/count_tokens", with_caller(self._count_tokens), methods=["POST"]),
        ]

    async def _health(self, request: Request) -> Response:
        report = health_report(self._fleet.snapshot(), self._live.state)
        if not visit_of(request.scope).is_trusted:
            report = msgspec.structs.replace(
                report, unservable=[], details=[], config=ConfigReport()
            )
        return json_response(report)

    async def _usage(self, request: Request, caller: Caller) -> Response:
        if not caller.is_known:
            raise refusal(request.headers.raw)
        standings = await visit_of(request.scope).standings()
        models = self._metrics.usage(caller.account_id, caller.key_id)
        return json_response(usage_report(caller, standings, models))

    async def _models(self, request: Request, caller: Caller) -> Response:
        cards = [
            card
            for card in model_cards(self._fleet.snapshot(), self._live.catalogue)
            if self._intake.allows(caller, card.id)
        ]
        if dialect_of(request.scope) == "anthropic":
            query = anthropic.parse_models_query(request.query_params.multi_items())
            return json_response(anthropic.model_list(cards, query))
        return json_response(openai.ModelList(data=cards))

    async def _model(self, request: Request, caller: Caller) -> Response:
        name: str = request.path_params["name"]
        self._intake.check_model(caller, name)
        card = model_card(self._fleet.snapshot(), self._live.catalogue, name)
        if card is None:
            raise no_such_model(name)
        if dialect_of(request.scope) == "anthropic":
            return json_response(anthropic.model_info(card))
        return json_response(card)

    async def _chat(self, request: Request, caller: Caller) -> ASGIApp:
        return await self._relayed(request, CHAT_PATH, openai.parse_chat_request)

    async def _completions(self, request: Request, caller: Caller) -> ASGIApp:
        return await self._relayed(request, COMPLETIONS_PATH, parse_completion_request)

    async def _embeddings(self, request: Request, caller: Caller) -> ASGIApp:
        body = await self._intake.body(request)
        model = _named_model(decode_body(_head_decoder, body))
        await self._intake.admit(request, model, body, writes=False)
        ask = self._intake.ask(
            request,
            name=model,
            path=EMBEDDINGS_PATH,
            body=body,
            check=parse_embedding_request,
            capability=EMBEDDINGS,
        )
        return await self._whole(request, ask)

    async def _relayed(
        self, request: Request, path: str, check: Callable[[bytes], object]
    ) -> ASGIApp:
        """Answer with the bytes of a node, at the path that it was asked for here."""
        body = await self._intake.body(request)
        head = decode_body(_head_decoder, body)
        model = _named_model(head)
        await self._intake.admit(request, model, body)
        ask = self._intake.ask(request, name=model, path=path, body=body, check=check)
        if head.stream:
            return EventStream(
                self._dispatcher.stream(ask, openai.KEEPALIVE),
                keepalive=openai.KEEPALIVE,
                keepalive_s=self._live.settings.keepalive_s,
                on_error=openai.error_event,
                headers=self._intake.exposed(ask),
            )
        return await self._whole(request, ask)

    async def _whole(self, request: Request, ask: Ask) -> Response:
        answer = await cancel_on_disconnect(request, self._dispatcher.whole(ask))
        return Response(answer, headers=self._intake.exposed(ask), media_type="application/json")

    async def _messages(self, request: Request, caller: Caller) -> ASGIApp:
        body = await self._intake.body(request)
        message = decode_body(_messages_decoder, body)
        await self._intake.admit(request, message.model, body)
        chat = translate.to_openai(
            message, drop_billing_header=self._live.settings.strip_billing_header
        )
        ask = self._intake.ask(
            request, name=message.model, path=CHAT_PATH, body=_encoder.encode(chat)
        )
        if message.stream:
            translator = StreamTranslator(message.model)
            return EventStream(
                self._dispatcher.stream(ask, anthropic.PING, translator),
                keepalive=anthropic.PING,
                keepalive_s=self._live.settings.keepalive_s,
                on_error=translator.fail,
                headers=self._intake.exposed(ask),
            )
        answer = await cancel_on_disconnect(request, self._dispatcher.whole(ask))
        completion = decode_answer(_completion_decoder, answer)
        return json_response(
            translate.from_openai(completion, message.model), headers=self._intake.exposed(ask)
        )

    async def _plan(self, request: Request, caller: Caller) -> Response:
        name = request.query_params.get("model")
        if not name:
            raise MissingModelError("name a model: GET /plan?model=NAME", param="model")
        self._intake.check_model(caller, name)
        if not caller.sees_all and not caller.is_admin:
            raise PermissionDeniedError(
                "a plan names all models that take part; it takes a key without a list of models, "
                "or one with `admin = true`"
            )
        snapshot, catalogue = self._fleet.snapshot(), self._live.catalogue
        models = targets(snapshot, catalogue, name)
        route = self._routing.choose(Trip(name, b""))
        if isinstance(route, Refuse) and isinstance(route.error, ModelNotFoundError):
            raise route.error
        further = self._routing.further(route.model_id) if isinstance(route, Serve) else NOTHING
        return json_response(plan_report(name, models, route, further))

    async def _why(self, request: Request, caller: Caller) -> Response:
        account = None if caller.is_admin else caller.account_id
        found = self._decisions.find(request.path_params["request_id"], account)
        return json_response(found.report())

    async def _count_tokens(self, request: Request, caller: Caller) -> Response:
        body = await self._intake.body(request)
        message = decode_body(_count_decoder, body)
        await self._intake.admit(request, message.model, None)
        chat = translate.to_openai(
            message, drop_billing_header=self._live.settings.strip_billing_header
        )
        count = await count_tokens(request, self._dispatcher, chat)
        return json_response(anthropic.CountTokensResponse(input_tokens=count))


def _named_model(head: openai.RequestHead) -> str:
    if not head.model:
        raise MissingModelError("the request names no model; set `model`", param="model")
    return head.model


def metrics_routes(metrics: Metrics) -> list[Route]:
    """Return the routes of the metrics listener."""

    async def render(_: Request) -> Response:
        return Response(metrics.render(), headers={"content-type": CONTENT_TYPE})

    return [Route("/metrics", render, methods=["GET"])]
