"""The gateway's outermost layer: whoever is not let in here reaches no route, known or unknown."""

import asyncio
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cortex.core.errors import (
    AuthenticationError,
    CortexError,
    PermissionDeniedError,
    QuotaExceededError,
    RateLimitError,
)
from cortex.core.web import Dialect, dialect_of, error_response
from cortex.gateway.auth import ANONYMOUS, Caller, Gatekeeper, refusal
from cortex.gateway.limiter import Limiter, Reservation
from cortex.gateway.metrics import Metrics, RequestTiming
from cortex.gateway.windows import Standing, rate_headers

# What answers without a key where keys are required; a list of what does, so that a route that
# is forgotten here asks for one.
OPEN_PATHS = frozenset(["/health"])
# What is for whoever may call at all; the rest is for those who run the fleet.
CALLER_PATHS = frozenset(["/", "/plan", "/openapi.json"]) | OPEN_PATHS
CALLER_PREFIXES = ("/v1/", "/why/")
VISIT = "cortex.visit"
# The SDKs wait at most this long between tries.
LONG_WAIT_S = 60
MAX_DRAINED_BYTES = 64 << 20
DRAIN_S = 5.0

_usage_logger = logging.getLogger("cortex.usage")


class Visit:
    """One request from the edge inwards: whose it is, and what it may and did spend.

    Attributes:
        is_trusted: whether it may know the inside of the fleet.
    """

    def __init__(self, caller: Caller, limiter: Limiter, *, is_trusted: bool) -> None:
        self.caller = caller
        self.is_trusted = is_trusted
        self._limiter = limiter
        self._reservation: Reservation | None = None
        self._timing: RequestTiming | None = None
        self._is_final = False

    async def admit(self, body: bytes | None, *, writes: bool = True) -> None:
        """Have the request counted against its key's limits; at most once.

        Args:
            body: what its tokens are estimated from; None for one that spends none.
            writes: whether the answer has tokens, too.

        Raises:
            RateLimitError, QuotaExceededError, LimitsUnavailableError: it has to wait.
        """
        assert self._reservation is None
        if not self.caller.is_limited:
            return
        self._reservation = self._limiter.begin(self.caller, body, writes=writes)
        try:
            await self._limiter.count(self._reservation)
        except (RateLimitError, QuotaExceededError) as exc:
            self._is_final = exc.retry_after_s is None or exc.retry_after_s > LONG_WAIT_S
            raise

    async def standings(self) -> list[Standing]:
        """Return how far the key's limits are used up; this request does not count.

        Raises:
            LimitsUnavailableError: the store does not answer.
        """
        return await self._limiter.standings(self.caller)

    def note(self, timing: RequestTiming) -> None:
        """Take what the request came to, as far as it came."""
        self._timing = timing

    def close(self) -> None:
        """Settle; called once, however the request ended."""
        timing, reservation = self._timing, self._reservation
        if timing is not None and self.caller.is_known and self._limiter.logs_usage:
            _log_usage(timing)
        if reservation is None:
            return
        spent = 0
        if timing is not None and (timing.completion_tokens or not timing.failed):
            spent = timing.prompt_tokens + timing.completion_tokens
            if timing.completion_tokens and not timing.prompt_tokens:
                # The node told no usage; the prompt was read all the same.
                spent += reservation.prompt_tokens
        self._limiter.settle(reservation, spent)

    def headers(self, dialect: Dialect) -> list[tuple[bytes, bytes]]:
        """Return what the answer tells of the key's limits."""
        standings = self._reservation.standings if self._reservation is not None else []
        found = rate_headers(standings, dialect)
        if self._is_final:
            # The SDKs try again by themselves; here that cannot help.
            found.append((b"x-should-retry", b"false"))
        return found


def visit_of(scope: Scope) -> Visit:
    """Return what the edge knows of a request."""
    visit: Visit = scope[VISIT]
    return visit


class KeyMiddleware:
    """Lets in what carries a known key, or everything where none is required.

    What is not for callers is for keys with `admin`, where keys are required or there are such
    keys.
    """

    def __init__(
        self, app: ASGIApp, gatekeeper: Gatekeeper, limiter: Limiter, metrics: Metrics
    ) -> None:
        self.app = app
        self._gatekeeper = gatekeeper
        self._limiter = limiter
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        try:
            caller = self._gatekeeper.check(scope["headers"])
            # Names of all models and nodes are not for a key that may use some.
            is_trusted = caller.sees_all or caller.is_admin
            if not _is_for_callers(scope["path"]):
                self._gatekeeper.check_admin(caller)
        except (AuthenticationError, PermissionDeniedError) as exc:
            if not _is_open(scope):
                self._metrics.record_unauthorized()
                await _refuse(scope, receive, send, exc)
                return
            caller, is_trusted = ANONYMOUS, False
        visit = scope[VISIT] = Visit(caller, self._limiter, is_trusted=is_trusted)
        if caller.is_limited and scope["type"] == "http":
            send = _with_headers(send, visit, dialect_of(scope))
        try:
            await self.app(scope, receive, send)
        finally:
            visit.close()


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


def _log_usage(timing: RequestTiming) -> None:
    _usage_logger.info(
        "request ended",
        extra={
            "account": timing.account,
            "key": timing.key,
            "model": timing.model,
            "node": timing.node,
            "prompt_tokens": timing.prompt_tokens,
            "completion_tokens": timing.completion_tokens,
            "cached_tokens": timing.cached_tokens,
            "failed": timing.failed,
            "duration_s": round(timing.duration_s, 3),
        },
    )


def _with_headers(send: Send, visit: Visit, dialect: Dialect) -> Send:
    async def told(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *visit.headers(dialect)]}
        await send(message)

    return told


def _is_for_callers(path: str) -> bool:
    return path in CALLER_PATHS or path.startswith(CALLER_PREFIXES)


def _is_open(scope: Scope) -> bool:
    return (
        scope["type"] == "http"
        and scope["path"] in OPEN_PATHS
        and scope["method"] in ("GET", "HEAD")
    )


async def _refuse(scope: Scope, receive: Receive, send: Send, exc: CortexError) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await _drain(receive)
    response = error_response(exc, dialect_of(scope))
    if exc.status == AuthenticationError.status:
        response.headers["www-authenticate"] = "Bearer"
    await response(scope, receive, send)


async def _drain(receive: Receive) -> None:
    """Read what is still being sent, so that its sender sees the answer and not a reset."""
    size = 0
    try:
        async with asyncio.timeout(DRAIN_S):
            while size <= MAX_DRAINED_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return
