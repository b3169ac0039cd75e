"""What every API route does with a request before it is answered: read, check, count, describe."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp

from cortex.core.embeddings import TEXT
from cortex.core.errors import ModelNotFoundError, UpstreamMalformedError
from cortex.core.openai import parse_chat_request
from cortex.core.web import read_body
from cortex.gateway.auth import Caller
from cortex.gateway.dispatch import Ask
from cortex.gateway.edge import visit_of
from cortex.gateway.fleet import Fleet
from cortex.gateway.live import Live
from cortex.gateway.request_ids import HEADER, request_id_of

CHAT_PATH = "/v1/chat/completions"
# What a node may want to know of the caller; keys stay here.
FORWARDED_HEADERS = ("x-session-affinity",)
# How clients name a conversation, so that it goes where its last turn is cached.
SESSION_HEADERS = ("x-claude-code-session-id", "x-session-affinity", "x-session-id")

_T = TypeVar("_T")


class Intake:
    """Takes requests in, for all inference routes alike."""

    def __init__(self, live: Live, fleet: Fleet) -> None:
        self._live = live
        self._fleet = fleet

    async def body(self, request: Request) -> bytes:
        """Return a request's body, within `max_body_mb`."""
        return await read_body(request, max_bytes=self._live.settings.max_body_mb << 20)

    def check_model(self, caller: Caller, name: str) -> None:
        """Refuse a model that the caller's key does not list as if there were none of that name.

        Raises:
            ModelNotFoundError: the key has a list and the model is not on it.
        """
        # The router's own words for an unknown name list all there are.
        if not self.allows(caller, name):
            raise no_such_model(name)

    def allows(self, caller: Caller, name: str) -> bool:
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

    async def admit(
        self, request: Request, name: str, body: bytes | None, *, writes: bool = True
    ) -> None:
        """Check the model's name, then count the request against its key's limits.

        Args:
            body: what is read to estimate its tokens; None where it spends none.
            writes: whether the answer has tokens, too.
        """
        visit = visit_of(request.scope)
        self.check_model(visit.caller, name)
        await visit.admit(body, writes=writes)

    def ask(
        self,
        request: Request,
        *,
        name: str,
        path: str,
        body: bytes,
        check: Callable[[bytes], object] = parse_chat_request,
        capability: str = TEXT,
        cache_key: str | None = None,
    ) -> Ask:
        """Return what the dispatcher is asked for a request.

        Args:
            capability: what the model has to be made for.
            cache_key: names the conversation where no header does.
        """
        visit = visit_of(request.scope)
        return Ask(
            name=name,
            path=path,
            body=body,
            check=check,
            capability=capability,
            headers=_forwarded(request),
            caller=visit.caller,
            session=_session(request) or cache_key or "",
            note=visit.note,
            request_id=request_id_of(request.scope),
        )

    def exposed(self, ask: Ask) -> dict[str, str] | None:
        """Return the headers that tell how a request went, filled in as it goes."""
        return ask.facts if self._live.settings.expose_headers else None


def with_caller(
    endpoint: Callable[[Request, Caller], Awaitable[ASGIApp]],
) -> Callable[[Request], Awaitable[ASGIApp]]:
    """Return an endpoint that is handed whose request it is."""

    async def handed(request: Request) -> ASGIApp:
        return await endpoint(request, visit_of(request.scope).caller)

    return handed


def no_such_model(name: str) -> ModelNotFoundError:
    """Return the error for a name that nothing goes by, or nothing that the caller may use."""
    return ModelNotFoundError(
        f"model '{name}' does not exist; GET /v1/models lists what there is", param="model"
    )


def decode_answer(decoder: "msgspec.json.Decoder[_T]", body: bytes) -> _T:
    """Decode a node's whole answer.

    Raises:
        UpstreamMalformedError: it is something else.
    """
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise UpstreamMalformedError(
            f"the node answered something that is not a completion: {exc}"
        ) from exc


def _session(request: Request) -> str:
    named = (request.headers.get(name) for name in SESSION_HEADERS)
    return next((each for each in named if each), "")


def _forwarded(request: Request) -> dict[str, str]:
    headers = request.headers
    forwarded = {name: headers[name] for name in FORWARDED_HEADERS if name in headers}
    return {HEADER: request_id_of(request.scope), **forwarded}
