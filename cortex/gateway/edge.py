"""The gateway's outermost layer: whoever is not let in here reaches no route, known or unknown."""

from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from cortex.core.errors import AuthenticationError
from cortex.core.web import dialect_of, error_response
from cortex.gateway.auth import ANONYMOUS, Caller, Gatekeeper, refusal

# What answers without a key where keys are required; a list of what does, so that a route that
# is forgotten here asks for one.
OPEN_PATHS = frozenset(["/health"])
VISIT = "cortex.visit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One request as the edge let it in.

    Attributes:
        caller: whose it is.
        is_trusted: whether it may know the inside of the fleet.
    """

    caller: Caller
    is_trusted: bool


def visit_of(scope: Scope) -> Visit:
    """Return what the edge knows of a request."""
    visit: Visit = scope[VISIT]
    return visit


class KeyMiddleware:
    """Lets in what carries a known key, or everything where none is required."""

    def __init__(self, app: ASGIApp, gatekeeper: Gatekeeper) -> None:
        self.app = app
        self._gatekeeper = gatekeeper

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        try:
            caller = self._gatekeeper.check(scope["headers"])
            is_trusted = True
        except AuthenticationError as exc:
            if not _is_open(scope):
                await _refuse(scope, receive, send, exc)
                return
            caller, is_trusted = ANONYMOUS, False
        scope[VISIT] = Visit(caller=caller, is_trusted=is_trusted)
        await self.app(scope, receive, send)


class MetricsGuard:
    """Asks for a key on the metrics port where the configuration wants that."""

    def __init__(self, app: ASGIApp, gatekeeper: Gatekeeper) -> None:
        self.app = app
        self._gatekeeper = gatekeeper

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        guarded = scope["type"] != "lifespan" and self._gatekeeper.metrics_required
        if guarded and not self._gatekeeper.find(scope["headers"]).is_known:
            await _refuse(scope, receive, send, refusal(scope["headers"]))
            return
        await self.app(scope, receive, send)


def _is_open(scope: Scope) -> bool:
    return (
        scope["type"] == "http"
        and scope["path"] in OPEN_PATHS
        and scope["method"] in ("GET", "HEAD")
    )


async def _refuse(scope: Scope, receive: Receive, send: Send, exc: AuthenticationError) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    response = error_response(exc, dialect_of(scope))
    response.headers["www-authenticate"] = "Bearer"
    await response(scope, receive, send)
