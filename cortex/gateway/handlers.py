"""The gateway's HTTP routes: read what must be read, hand the rest to the dispatcher."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from cortex.core import anthropic, openai, translate
from cortex.core.completions import parse_completion_request
from cortex.core.decode import decode_body
from cortex.core.errors import (
    MissingModelError,
    ModelNotFoundError,
    PermissionDeniedError,
    UpstreamMalformedError,
)
from cortex.core.translate_stream import StreamTranslator
from cortex.core.web import (
    EventStream,
    cancel_on_disconnect,
    dialect_of,
    json_response,
    read_body,
)
from cortex.gateway.auth import Caller, refusal
from cortex.gateway.decisions import Decisions
from cortex.gateway.dispatch import Ask, Dispatcher
from cortex.gateway.edge import visit_of
from cortex.gateway.fleet import Fleet
from cortex.gateway.live import Live
from cortex.gateway.metrics import CONTENT_TYPE, Metrics
from cortex.gateway.plans import plan_report
from cortex.gateway.request_ids import HEADER, request_id_of
from cortex.gateway.roster import targets
from cortex.gateway.router import NOTHING, Refuse, Serve
from cortex.gateway.routing import Routing, Trip
from cortex.gateway.usage import usage_report
from cortex.gateway.views import ConfigReport, health_report, model_card, model_cards

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"
TOKENIZE_PATH = "/v1/tokenize"
# What a node may want to know of the caller; keys stay here.
FORWARDED_HEADERS = ("x-session-affinity",)
# How clients name a conversation, so that it goes where its last turn is cached.
SESSION_HEADERS = ("x-claude-code-session-id", "x-session-affinity", "x-session-id")

_T = TypeVar("_T")

_head_decoder = msgspec.json.Decoder(openai.RequestHead)
_messages_decoder = msgspec.json.Decoder(anthropic.MessagesRequest)
_count_decoder = msgspec.json.Decoder(anthropic.CountTokensRequest)
_completion_decoder = msgspec.json.Decoder(openai.ChatCompletion)
_encoder = msgspec.json.Encoder()


class _TokenizeRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Body of a neuron's `POST /v1/tokenize`."""

    model: str
    messages: list[openai.Message]
    tools: list[openai.Tool] | None = None
    tool_choice: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class _TokenizeResponse(msgspec.Struct, kw_only=True):
    """Its answer."""

    count: int


_tokenize_decoder = msgspec.json.Decoder(_TokenizeResponse)


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
    ) -> None:
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
            Route("/v1/usage", _with_caller(self._usage), methods=["GET"]),
            Route("/plan", _with_caller(self._plan), methods=["GET"]),
            Route("/why/{request_id:path}", _with_caller(self._why), methods=["GET"]),
            Route("/v1/models", _with_caller(self._models), methods=["GET"]),
            Route("/v1/models/{name:path}", _with_caller(self._model), methods=["GET"]),
            Route(CHAT_PATH, _with_caller(self._chat), methods=["POST"]),
            Route(COMPLETIONS_PATH, _with_caller(self._completions), methods=["POST"]),
            Route("/v1/messages", _with_caller(self._messages), methods=["POST"]),
            Route("/v1/messages/count_tokens", _with_caller(self._count_tokens), methods=["POST"]),
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
            if self._allows(caller, card.id)
        ]
        if dialect_of(request.scope) == "anthropic":
            query = anthropic.parse_models_query(request.query_params.multi_items())
            return json_response(anthropic.model_list(cards, query))
        return json_response(openai.ModelList(data=cards))

    async def _model(self, request: Request, caller: Caller) -> Response:
        name: str = request.path_params["name"]
        self._check_model(caller, name)
        card = model_card(self._fleet.snapshot(), self._live.catalogue, name)
        if card is None:
            raise _no_such_model(name)
        if dialect_of(request.scope) == "anthropic":
            return json_response(anthropic.model_info(card))
        return json_response(card)

    async def _body(self, request: Request) -> bytes:
        return await read_body(request, max_bytes=self._live.settings.max_body_mb << 20)

    def _check_model(self, caller: Caller, name: str) -> None:
        """Refuse a model that the caller's key does not list as if there were none of that name.

        Raises:
            ModelNotFoundError: the key has a list and the model is not on it.
        """
        # The router's own words for an unknown name list all there are.
        if not self._allows(caller, name):
            raise _no_such_model(name)

    def _allows(self, caller: Caller, name: str) -> bool:
        """Whether a key may use what goes by a name; False also where nothing does.

        A model that is reached by a pattern among the aliases is judged by its own id: such names
        are made up by callers.
        """
        if caller.sees_all:
            return True
        catalogue, snapshot = self._live.catalogue, self._fleet.snapshot()
        targets = catalogue.targets(name, is_listed=snapshot.lists(name))
        if not any(snapshot.lists(each) or catalogue.find(each) is not None for each in targets):
            return False
        if name in catalogue.names and caller.may_use(name):
            return True
        return all(caller.may_use(each) for each in targets)

    async def _admit(self, request: Request, name: str, body: bytes | None) -> None:
        """Check the model's name, then count the request against its key's limits.

        Args:
            body: what is read to estimate its tokens; None where it spends none.
        """
        visit = visit_of(request.scope)
        self._check_model(visit.caller, name)
        await visit.admit(body)

    async def _chat(self, request: Request, caller: Caller) -> ASGIApp:
        return await self._relayed(request, caller, CHAT_PATH, openai.parse_chat_request)

    async def _completions(self, request: Request, caller: Caller) -> ASGIApp:
        return await self._relayed(request, caller, COMPLETIONS_PATH, parse_completion_request)

    async def _relayed(
        self, request: Request, caller: Caller, path: str, check: Callable[[bytes], object]
    ) -> ASGIApp:
        """Answer with the bytes of a node, at the path that it was asked for here."""
        body = await self._body(request)
        head = decode_body(_head_decoder, body)
        if not head.model:
            raise MissingModelError("the request names no model; set `model`", param="model")
        await self._admit(request, head.model, body)
        ask = Ask(
            name=head.model,
            path=path,
            body=body,
            check=check,
            headers=_forwarded(request),
            caller=caller,
            session=_session(request),
            note=visit_of(request.scope).note,
            request_id=request_id_of(request.scope),
        )
        if head.stream:
            return EventStream(
                self._dispatcher.stream(ask, openai.KEEPALIVE),
                keepalive=openai.KEEPALIVE,
                keepalive_s=self._live.settings.keepalive_s,
                on_error=openai.error_event,
                headers=self._exposed(ask),
            )
        answer = await cancel_on_disconnect(request, self._dispatcher.whole(ask))
        return Response(answer, headers=self._exposed(ask), media_type="application/json")

    async def _messages(self, request: Request, caller: Caller) -> ASGIApp:
        body = await self._body(request)
        message = decode_body(_messages_decoder, body)
        await self._admit(request, message.model, body)
        chat = translate.to_openai(
            message, drop_billing_header=self._live.settings.strip_billing_header
        )
        ask = Ask(
            name=message.model,
            path=CHAT_PATH,
            body=_encoder.encode(chat),
            headers=_forwarded(request),
            caller=caller,
            session=_session(request),
            note=visit_of(request.scope).note,
            request_id=request_id_of(request.scope),
        )
        if message.stream:
            translator = StreamTranslator(message.model)
            return EventStream(
                self._dispatcher.stream(ask, anthropic.PING, translator),
                keepalive=anthropic.PING,
                keepalive_s=self._live.settings.keepalive_s,
                on_error=translator.fail,
                headers=self._exposed(ask),
            )
        answer = await cancel_on_disconnect(request, self._dispatcher.whole(ask))
        completion = _decode_answer(_completion_decoder, answer)
        return json_response(
            translate.from_openai(completion, message.model), headers=self._exposed(ask)
        )

    def _exposed(self, ask: Ask) -> dict[str, str] | None:
        """Return the headers that tell how a request went, filled in as it goes."""
        return ask.facts if self._live.settings.expose_headers else None

    async def _plan(self, request: Request, caller: Caller) -> Response:
        name = request.query_params.get("model")
        if not name:
            raise MissingModelError("name a model: GET /plan?model=NAME", param="model")
        self._check_model(caller, name)
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
        body = await self._body(request)
        message = decode_body(_count_decoder, body)
        await self._admit(request, message.model, None)
        chat = translate.to_openai(
            message, drop_billing_header=self._live.settings.strip_billing_header
        )
        asked = _TokenizeRequest(
            model=chat.model,
            messages=chat.messages,
            tools=chat.tools,
            # The one choice that changes a prompt: it hides the tools.
            tool_choice="none" if chat.tool_choice == "none" else None,
            chat_template_kwargs=chat.chat_template_kwargs,
        )
        ask = Ask(
            name=message.model, path=TOKENIZE_PATH, body=_encoder.encode(asked), caller=caller
        )
        answer = await cancel_on_disconnect(request, self._dispatcher.tokenize(ask))
        count = _decode_answer(_tokenize_decoder, answer).count
        return json_response(anthropic.CountTokensResponse(input_tokens=count))


def _with_caller(
    endpoint: Callable[[Request, Caller], Awaitable[ASGIApp]],
) -> Callable[[Request], Awaitable[ASGIApp]]:
    async def handed(request: Request) -> ASGIApp:
        return await endpoint(request, visit_of(request.scope).caller)

    return handed


def _no_such_model(name: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"model '{name}' does not exist; GET /v1/models lists what there is", param="model"
    )


def metrics_routes(metrics: Metrics) -> list[Route]:
    """Return the routes of the metrics listener."""

    async def render(_: Request) -> Response:
        return Response(metrics.render(), headers={"content-type": CONTENT_TYPE})

    return [Route("/metrics", render, methods=["GET"])]


def _session(request: Request) -> str:
    named = (request.headers.get(name) for name in SESSION_HEADERS)
    return next((each for each in named if each), "")


def _forwarded(request: Request) -> dict[str, str]:
    headers = request.headers
    forwarded = {name: headers[name] for name in FORWARDED_HEADERS if name in headers}
    return {HEADER: request_id_of(request.scope), **forwarded}


def _decode_answer(decoder: "msgspec.json.Decoder[_T]", body: bytes) -> _T:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise UpstreamMalformedError(
            f"the node answered something that is not a completion: {exc}"
        ) from exc
