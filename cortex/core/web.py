"""What both Starlette apps are built from: body reading, error rendering and event streams.

This is the request edge: the one place where an unexpected exception of a handler is caught,
logged with its traceback and turned into an error that the caller's dialect understands.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping
from contextlib import aclosing
from typing import Any, Literal, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cortex.core import anthropic, openai
from cortex.core.errors import (
    BadRequestError,
    BodyTooLargeError,
    CortexError,
    InternalError,
    MethodNotAllowedError,
    RouteNotFoundError,
    ShuttingDownError,
)
from cortex.core.serve import LAST_CALL

T = TypeVar("T")
Dialect = Literal["openai", "anthropic"]

MAX_QUEUED_CHUNKS = 64
BODY_READ_S = 120.0
# How far past the limit an oversized body is read and dropped, so that the caller, who is
# still sending, gets to see the answer instead of a reset connection.
DRAIN_FACTOR = 4
# A reader that takes nothing for this long is gone, whatever TCP says.
SEND_STALL_S = 300.0

_logger = logging.getLogger(__name__)
_json = msgspec.json.Encoder()


class _ClientGoneError(Exception):
    """Ends a task group when the client has left."""


class _LastCallError(Exception):
    """Ends a task group when the server is about to end."""


def dialect_of(scope: Scope) -> Dialect:
    """Return the dialect in which a request wants its errors."""
    path: str = scope["path"]
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return "anthropic"
    if path.startswith("/v1/models") and _has_header(scope, b"anthropic-version"):
        return "anthropic"
    return "openai"


def _has_header(scope: Scope, name: bytes) -> bool:
    return any(key == name for key, _ in scope["headers"])


async def read_body(request: Request, *, max_bytes: int) -> bytes:
    """Return the whole request body.

    Raises:
        BodyTooLargeError: it is over `max_bytes`.
        BadRequestError: it did not arrive within BODY_READ_S.
    """
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_READ_S):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= max_bytes:
                    chunks.append(chunk)
                else:
                    chunks.clear()
                    if size > max_bytes * DRAIN_FACTOR:
                        break
    except TimeoutError as exc:
        raise BadRequestError(f"the body did not arrive within {BODY_READ_S:.0f} s") from exc
    if size > max_bytes:
        raise BodyTooLargeError(
            f"the body is over the limit of {max_bytes} bytes; send less, or raise max_body_mb"
        )
    return b"".join(chunks)


def json_response(
    value: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a struct (or anything msgspec encodes) as a JSON response."""
    return Response(
        _json.encode(value), status_code=status, headers=headers, media_type="application/json"
    )


def error_response(exc: CortexError, dialect: Dialect) -> Response:
    """Return an error as the dialect's envelope, with `Retry-After` where it has one."""
    headers = {}
    if exc.retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(exc.retry_after_s)))
    body, status = openai.error_body(exc), exc.status
    if dialect == "anthropic":
        body, status = anthropic.error_body(exc), anthropic.status_of(exc)
    return Response(body, status_code=status, headers=headers, media_type="application/json")


class ErrorMiddleware:
    """Render every error that leaves a handler before the response has begun.

    A trailing slash of the path is dropped on the way in.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"].endswith("/") and scope["path"] != "/":
            scope["path"] = scope["path"].rstrip("/")
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except (ClientDisconnect, _ClientGoneError):
            return
        except CortexError as exc:
            error = exc
        except Exception as exc:  # noqa: BLE001  the request edge: nothing may pass unanswered
            error = _internal(exc, f"{scope['method']} {scope['path']}")
        else:
            return
        if started:
            # Half an answer cannot be taken back; hypercorn closes the connection.
            raise error
        await error_response(error, dialect_of(scope))(scope, receive, send)


def _internal(exc: BaseException, where: str) -> InternalError:
    _logger.error("unexpected error in %s", where, exc_info=exc)
    return InternalError("internal error; the log of the server has the details")


class EventStream:
    """An ASGI response that relays an async generator of bytes as server-sent events.

    The generator gets up to `keepalive_s` before the headers go out, so that an error it raises
    early still becomes a proper HTTP error. After that `keepalive` is sent whenever nothing else
    was for that long. An error past the first byte is rendered by `on_error` and ends the stream.
    When the client leaves, the generator is cancelled at its await and closed.
    """

    def __init__(
        self,
        body: AsyncGenerator[bytes, None],
        *,
        keepalive: bytes,
        keepalive_s: float,
        on_error: Callable[[CortexError], bytes],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._body = body
        self._keepalive = keepalive
        self._keepalive_s = keepalive_s
        self._on_error = on_error
        # May still be filled in until the first byte.
        self._headers = {} if headers is None else headers
        self._chunks: asyncio.Queue[bytes | CortexError | None] = asyncio.Queue(MAX_QUEUED_CHUNKS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; raises the error of a stream that failed before it began."""
        early: CortexError | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                watcher = tasks.create_task(_watch(receive), name="client watch")
                pump = tasks.create_task(self._pump(scope["path"]), name="stream pump")
                ending = tasks.create_task(self._end_on_last_call(scope, pump), name="last call")
                early = await self._relay(send)
                for task in (pump, watcher, ending):
                    task.cancel()
        except* _ClientGoneError:
            _logger.debug("client left %s", scope["path"])
        if early is not None:
            raise early

    async def _end_on_last_call(self, scope: Scope, pump: asyncio.Task[None]) -> None:
        await _last_call(scope)
        pump.cancel()
        await self._chunks.put(_shutting_down())

    async def _pump(self, path: str) -> None:
        last: CortexError | None = None
        async with aclosing(self._body) as body:
            try:
                async for chunk in body:
                    if chunk:
                        await self._chunks.put(chunk)
            except CortexError as exc:
                last = exc
            except Exception as exc:  # noqa: BLE001  the request edge: the stream must end in words
                last = _internal(exc, path)
        await self._chunks.put(last)

    async def _relay(self, send: Send) -> CortexError | None:
        """Send until the end; return an error that came before anything was sent."""
        started = False
        while True:
            try:
                async with asyncio.timeout(self._keepalive_s):
                    item = await self._chunks.get()
            except TimeoutError:
                item = self._keepalive
            data, end = self._take(item)
            if isinstance(end, CortexError):
                if not started and not data:
                    return end
                data += self._on_error(end)
            if not started:
                started = True
                await send({"type": "http.response.start", "status": 200, "headers": self._head()})
            async with asyncio.timeout(SEND_STALL_S):
                await send({"type": "http.response.body", "body": data, "more_body": end is False})
            if end is not False:
                return None

    def _take(
        self, item: bytes | CortexError | None
    ) -> tuple[bytes, CortexError | Literal[False] | None]:
        """Join what is queued already; the second value is False while the stream goes on."""
        parts: list[bytes] = []
        while isinstance(item, bytes):
            parts.append(item)
            if self._chunks.empty():
                return b"".join(parts), False
            item = self._chunks.get_nowait()
        return b"".join(parts), item

    def _head(self) -> list[tuple[bytes, bytes]]:
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
            **self._headers,
        }
        return [(key.encode("latin-1"), value.encode("latin-1")) for key, value in headers.items()]


async def _watch(receive: Receive) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _ClientGoneError


async def _last_call(scope: Scope) -> None:
    """Wait until the server says that what is open is about to be cut off."""
    event: asyncio.Event = scope.get(LAST_CALL) or asyncio.Event()
    await event.wait()


def _shutting_down() -> ShuttingDownError:
    return ShuttingDownError("the server is shutting down; try again", retry_after_s=15)


async def _raise_on_last_call(scope: Scope) -> None:
    await _last_call(scope)
    raise _LastCallError


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, cancelling it if the client leaves first (the body must have been read).

    Raises:
        ShuttingDownError: the server ends and `work` would be cut off.
    """
    outcome: list[T] = []
    failure: Exception | None = None
    try:
        async with asyncio.TaskGroup() as tasks:
            watchers = [
                tasks.create_task(_watch(request.receive), name="client watch"),
                tasks.create_task(_raise_on_last_call(request.scope), name="last call"),
            ]
            try:
                outcome.append(await work)
            except Exception as exc:  # noqa: BLE001  carried out of the task group unwrapped
                failure = exc
            for watcher in watchers:
                watcher.cancel()
    except* _ClientGoneError:
        failure = ClientDisconnect()
    except* _LastCallError:
        failure = _shutting_down()
    if failure is not None:
        raise failure
    return outcome[0]


async def _raise_http_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    where = f"{request.method} {request.url.path}"
    if exc.status_code == 404:
        raise RouteNotFoundError(f"no such route: {where}") from exc
    if exc.status_code == 405:
        allowed = (exc.headers or {}).get("Allow", "another method")
        raise MethodNotAllowedError(f"{where} is not allowed; use {allowed}") from exc
    raise BadRequestError(f"{where}: {exc.detail}") from exc


def build_app(routes: Iterable[BaseRoute]) -> ASGIApp:
    """Return a Starlette app over `routes` whose every error speaks the caller's dialect."""
    app = Starlette(
        routes=list(routes),
        middleware=[Middleware(ErrorMiddleware)],
        exception_handlers={HTTPException: _raise_http_error},
    )
    # Not every client follows a redirect of a POST; the middleware drops trailing slashes.
    app.router.redirect_slashes = False
    return app
