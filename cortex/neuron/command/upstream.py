"""The HTTP connection to one external engine: the one module that talks to it.

What goes wrong with the connection becomes an error that says what it means for the request; an
engine's own refusals keep their status, as far as it is the caller who can do something about it.
"""

import asyncio
import io
import re
from collections.abc import Mapping

import aiohttp
import msgspec

from cortex.core.errors import (
    ContextLengthExceededError,
    CortexError,
    EngineDiedError,
    QueueFullError,
    RemoteError,
    UpstreamConnectionError,
    UpstreamMalformedError,
)
from cortex.core.openai import parse_error

MAX_ANSWER_BYTES = 64 << 20
MAX_ERROR_BYTES = 1 << 16
ERROR_BODY_S = 5.0
READ_BUFFER_BYTES = 1 << 18
# A body over this goes out piece by piece, so that the event loop goes on.
MAX_BODY_AT_ONCE_BYTES = 1 << 20
BUSY_RETRY_S = 2.0

# How vLLM, SGLang and llama-server each say that a prompt does not fit.
_TOO_LONG = re.compile(
    r"context (?:length|size|window)|exceed_context_size|longer than the model", re.IGNORECASE
)


class Reply:
    """An engine's answer with its head read; the body comes piece by piece."""

    def __init__(self, model_id: str, response: aiohttp.ClientResponse) -> None:
        self.status = response.status
        self.content_type = response.content_type
        self._model_id = model_id
        self._response = response

    async def read(self) -> bytes:
        """Return what has arrived, at least one byte; nothing at the end.

        Raises:
            EngineDiedError: the connection broke.
        """
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as exc:
            raise EngineDiedError(
                f"the engine of model '{self._model_id}' broke off its answer"
            ) from exc

    async def read_all(self, max_bytes: int = MAX_ANSWER_BYTES) -> bytes:
        """Return the rest of the body.

        Raises:
            EngineDiedError: the connection broke.
            UpstreamMalformedError: it is over `max_bytes`.
        """
        pieces: list[bytes] = []
        size = 0
        while piece := await self.read():
            size += len(piece)
            if size > max_bytes:
                raise UpstreamMalformedError(
                    f"the engine of model '{self._model_id}' answered over {max_bytes} bytes"
                )
            pieces.append(piece)
        return b"".join(pieces)

    async def error(self) -> CortexError:
        """Return the error that a non-2xx answer stands for."""
        body = b""
        try:
            async with asyncio.timeout(ERROR_BODY_S):
                body = await self.read_all(MAX_ERROR_BYTES)
        except (TimeoutError, CortexError):
            # What matters is the status; the words are a courtesy.
            pass
        return engine_error(self._model_id, self.status, body)

    def close(self) -> None:
        """Let go of the answer; one that has not ended takes its connection with it."""
        self._response.close()


class Upstream:
    """The connections to one engine, one a request. Close it with `close`.

    Args:
        base_url: `http://host:port`.
        connect_s: limit of a connect.
    """

    def __init__(self, model_id: str, base_url: str, *, connect_s: float) -> None:
        self._model_id = model_id
        self._base_url = base_url
        self._session = aiohttp.ClientSession(
            # A kept connection may be closed by the server in the moment it is used again, and a
            # chat cannot be sent twice; a new one costs next to nothing on the loopback address.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=READ_BUFFER_BYTES,
            headers={"content-type": "application/json", "accept-encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_s, sock_read=None),
        )

    async def get(self, path: str, limit_s: float) -> tuple[int, bytes]:
        """Return status and body of a small answer; (0, nothing) where none came in time."""
        try:
            async with asyncio.timeout(limit_s):
                reply = await self._request("GET", path, None)
                try:
                    return reply.status, await reply.read_all(MAX_ERROR_BYTES)
                finally:
                    reply.close()
        except (TimeoutError, CortexError):
            return 0, b""

    async def post(self, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> Reply:
        """Return the answer once its head is there, whatever its status.

        Raises:
            UpstreamConnectionError: no connection came about.
            EngineDiedError: it broke before the answer began.
        """
        data = body if len(body) <= MAX_BODY_AT_ONCE_BYTES else io.BytesIO(body)
        return await self._request("POST", path, data, headers)

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()

    async def _request(
        self,
        method: str,
        path: str,
        data: bytes | io.BytesIO | None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        if self._session.closed:
            raise UpstreamConnectionError(f"the engine of model '{self._model_id}' has ended")
        try:
            response = await self._session.request(
                method, self._base_url + path, data=data, headers=headers, allow_redirects=False
            )
        except (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError) as exc:
            raise UpstreamConnectionError(
                f"the engine of model '{self._model_id}' cannot be reached: {exc}"
            ) from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise EngineDiedError(
                f"the engine of model '{self._model_id}' hung up before it answered"
            ) from exc
        return Reply(self._model_id, response)


def engine_error(model_id: str, status: int, body: bytes) -> CortexError:
    """Return what the caller of a model is told of an engine's non-2xx answer."""
    error = parse_error(status, with_envelope(body))
    said = f"the engine of model '{model_id}' says: {error.message}"
    if status in (401, 403, 404, 405):
        # About the engine's own names and keys: nothing the caller wrote.
        return UpstreamMalformedError(
            f"{said}; check `upstream_model` and `command` in neuron.toml"
        )
    if status == 429:
        return QueueFullError(said, retry_after_s=BUSY_RETRY_S)
    if 400 <= status < 500:
        if _TOO_LONG.search(error.message) or _TOO_LONG.search(error.kind):
            return ContextLengthExceededError(said, param=error.param)
        return RemoteError(
            said,
            status=status,
            code=error.code if error.code.isidentifier() else "invalid_request",
            kind="invalid_request_error",
            param=error.param,
        )
    return RemoteError(
        said,
        status=503 if status == 503 else 502,
        code="service_unavailable" if status == 503 else "engine_error",
        retry_after_s=BUSY_RETRY_S if status == 503 else None,
    )


def with_envelope(body: bytes) -> bytes:
    """Return an error body in OpenAI's envelope, where its own form is a known other one.

    SGLang has the fields at the top, FastAPI's own errors `detail`, transformers a bare string.
    """
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return body
    if not isinstance(found, dict):
        return body
    error = found.get("error", found)
    if isinstance(error, str):
        error = {"message": error, "code": "invalid_request"}
    elif isinstance(error, dict) and "message" not in error and "detail" in found:
        detail = found["detail"]
        text = detail if isinstance(detail, str) else msgspec.json.encode(detail).decode()
        error = {"message": text, "code": "invalid_request"}
    return msgspec.json.encode({"error": error})
