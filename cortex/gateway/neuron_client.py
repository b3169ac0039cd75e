"""The gateway's client of the neuron API: the one module that talks to nodes.

Every fault of a connection becomes an `UpstreamConnectionError` that names the node, every error
answer the `RemoteError` it carries, everything else that is not the protocol an
`UpstreamMalformedError`.
"""

import asyncio
import io
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from errno import ECONNREFUSED
from typing import TypeVar

import aiohttp
import msgspec

from cortex.core.errors import (
    CortexError,
    FleetSecretError,
    UpstreamConnectionError,
    UpstreamMalformedError,
)
from cortex.core.neuron_api import (
    Discovery,
    LoadRequest,
    LoadResponse,
    ModelInfo,
    NeuronHealth,
    RecycleRequest,
    RecycleResponse,
)
from cortex.core.openai import parse_error
from cortex.core.trust import Trust, client_context

READ_BUFFER_BYTES = 1 << 18
MAX_CONTROL_BODY_BYTES = 16 << 20
MAX_ERROR_BODY_BYTES = 1 << 16
ERROR_BODY_S = 5.0
# A body over this goes out piece by piece, so that a slow node does not hold up the event loop.
MAX_BODY_AT_ONCE_BYTES = 1 << 20
# How long a connection that nobody uses stays open; below the 75 s of the neuron's own server.
IDLE_CONNECTION_S = 30.0
# A host that lost its power closes no connection, and knows of none when it is back. So one that
# is silent for this long is asked after by the kernel, and so often before it is given up.
PROBE_AFTER_S = 5
PROBE_EVERY_S = 2
MAX_PROBES = 5

OPEN_FLEET = Trust()

_JSON = {"content-type": "application/json"}

_T = TypeVar("_T")

_discovery = msgspec.json.Decoder(Discovery)
_health = msgspec.json.Decoder(NeuronHealth)
_models = msgspec.json.Decoder(list[ModelInfo])
_recycle_response = msgspec.json.Decoder(RecycleResponse)
_load_response = msgspec.json.Decoder(LoadResponse)
_encoder = msgspec.json.Encoder()


class UnreachableError(UpstreamConnectionError):
    """No connection came about, so the node has seen nothing of the request."""


class RefusedError(UnreachableError):
    """The host is there, and nobody listens at the address."""


class Reply:
    """A node's answer with its head read; the body comes chunk by chunk."""

    def __init__(self, node: str, response: aiohttp.ClientResponse) -> None:
        self.node = node
        self.status = response.status
        self._response = response

    def header(self, name: str) -> str | None:
        """Return a response header."""
        return self._response.headers.get(name)

    async def read_chunk(self) -> bytes:
        """Return what has arrived, at least one byte; nothing at the end of the body.

        Raises:
            UpstreamConnectionError: the connection broke.
        """
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as exc:
            raise _broken(self.node, exc) from exc

    async def read_all(self, max_bytes: int) -> bytes:
        """Return the rest of the body.

        Raises:
            UpstreamConnectionError: the connection broke.
            UpstreamMalformedError: it is over `max_bytes`.
        """
        chunks: list[bytes] = []
        size = 0
        while chunk := await self.read_chunk():
            size += len(chunk)
            if size > max_bytes:
                raise UpstreamMalformedError(
                    f"the answer of node {self.node} is over {max_bytes} bytes"
                )
            chunks.append(chunk)
        return b"".join(chunks)

    async def error(self) -> CortexError:
        """Return the error that a non-2xx answer stands for."""
        body = b""
        try:
            async with asyncio.timeout(ERROR_BODY_S):
                body = await self.read_all(MAX_ERROR_BODY_BYTES)
        except (TimeoutError, CortexError):
            # What matters is the status; the words are a courtesy.
            pass
        error = parse_error(self.status, body, retry_after_s=_seconds(self.header("retry-after")))
        if self.status == FleetSecretError.status:
            # It concerns this gateway and not its caller, who may even try another node.
            return UpstreamConnectionError(
                f"node {self.node} refuses this gateway: {error.message}"
            )
        return error

    def close(self) -> None:
        """Let go of the answer; one that has not ended takes its connection with it."""
        self._response.close()


class NeuronClient:
    """One pool of connections to all nodes. Made by `open_client`."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    def show_secret(self, secret: str | None) -> None:
        """Send the fleet secret with every request from now on, or none."""
        self._session.headers.pop("authorization", None)
        if secret is not None:
            self._session.headers["authorization"] = f"Bearer {secret}"

    async def discovery(self, node: str, endpoint: str) -> Discovery:
        """`GET /discovery`."""
        return _decode(node, _discovery, await self._get(node, endpoint, "/discovery"))

    async def health(self, node: str, endpoint: str) -> NeuronHealth:
        """`GET /health`."""
        return _decode(node, _health, await self._get(node, endpoint, "/health"))

    async def models(self, node: str, endpoint: str) -> list[ModelInfo]:
        """`GET /models`."""
        return _decode(node, _models, await self._get(node, endpoint, "/models"))

    async def load(self, node: str, endpoint: str, request: LoadRequest) -> LoadResponse:
        """`POST /models/load`; with `wait` it lasts as long as the load, so bound it."""
        body = _encoder.encode(request)
        answer = await self.call(node, endpoint, "/models/load", body, MAX_CONTROL_BODY_BYTES)
        return _decode(node, _load_response, answer)

    async def recycle(self, node: str, endpoint: str, model_id: str) -> RecycleResponse:
        """`POST /models/recycle`; answers when the new engine serves, so bound it."""
        body = _encoder.encode(RecycleRequest(model_id=model_id))
        answer = await self.call(node, endpoint, "/models/recycle", body, MAX_CONTROL_BODY_BYTES)
        return _decode(node, _recycle_response, answer)

    async def call(self, node: str, endpoint: str, path: str, body: bytes, max_bytes: int) -> bytes:
        """POST a JSON body and return the whole answer; an error answer is raised."""
        reply = await self.post(node, endpoint, path, body)
        try:
            if not 200 <= reply.status < 300:
                raise await reply.error()
            return await reply.read_all(max_bytes)
        finally:
            reply.close()

    async def post(
        self,
        node: str,
        endpoint: str,
        path: str,
        body: bytes,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """POST a JSON body and return the reply once its head is there, whatever its status.

        Raises:
            UnreachableError: no connection came about within the connect limit.
            UpstreamConnectionError: the connection broke before the answer began.
        """
        merged = {**_JSON, **headers} if headers else _JSON
        data = body if len(body) <= MAX_BODY_AT_ONCE_BYTES else io.BytesIO(body)
        try:
            response = await self._session.post(endpoint + path, data=data, headers=merged)
        except (aiohttp.ClientError, OSError, TimeoutError) as exc:
            raise _broken(node, exc) from exc
        return Reply(node, response)

    async def events(self, node: str, endpoint: str, last_id: str) -> Reply:
        """`GET /events` from the event after `last_id` (empty: from a snapshot on).

        Raises:
            CortexError: it was refused, or the connection broke before the answer began.
        """
        headers = {"last-event-id": last_id} if last_id else {}
        reply = await self._begin_get(node, endpoint, "/events", headers)
        if reply.status != 200:
            try:
                raise await reply.error()
            finally:
                reply.close()
        return reply

    async def _begin_get(
        self, node: str, endpoint: str, path: str, headers: Mapping[str, str] | None = None
    ) -> Reply:
        try:
            response = await self._session.get(endpoint + path, headers=headers)
        except (aiohttp.ClientError, OSError, TimeoutError) as exc:
            raise _broken(node, exc) from exc
        return Reply(node, response)

    async def _get(self, node: str, endpoint: str, path: str) -> bytes:
        reply = await self._begin_get(node, endpoint, path)
        try:
            if reply.status != 200:
                raise await reply.error()
            return await reply.read_all(MAX_CONTROL_BODY_BYTES)
        finally:
            reply.close()


@asynccontextmanager
async def open_client(connect_s: float, trust: Trust = OPEN_FLEET) -> AsyncIterator[NeuronClient]:
    """Open the connection pool; `connect_s` bounds each connect, nothing bounds an answer.

    Raises:
        ConfigError: a certificate of `trust` cannot be used.
    """
    connector = aiohttp.TCPConnector(
        limit=0,
        keepalive_timeout=IDLE_CONNECTION_S,
        ssl=client_context(trust, "cortex.toml") or True,
        socket_factory=_probed_socket,
    )
    async with aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        read_bufsize=READ_BUFFER_BYTES,
        headers={"accept-encoding": "identity"},
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_s, sock_read=None),
    ) as session:
        client = NeuronClient(session)
        client.show_secret(trust.fleet_secret)
        yield client


def _probed_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    family, kind, protocol = address[:3]
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_AFTER_S)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_EVERY_S)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, MAX_PROBES)
    return made


def _broken(node: str, exc: BaseException) -> UpstreamConnectionError:
    if isinstance(exc, aiohttp.ServerTimeoutError):
        return UnreachableError(f"node {node} cannot be reached: no connection in time")
    if isinstance(exc, aiohttp.ClientConnectorError) and exc.os_error.errno == ECONNREFUSED:
        return RefusedError(f"node {node} cannot be reached: nobody listens at its endpoint")
    if isinstance(exc, aiohttp.ClientConnectorError):
        return UnreachableError(f"node {node} cannot be reached: {exc.os_error.strerror or exc}")
    reason = str(exc) or type(exc).__name__
    return UpstreamConnectionError(f"the connection to node {node} broke: {reason}")


def _decode(node: str, decoder: "msgspec.json.Decoder[_T]", body: bytes) -> _T:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise UpstreamMalformedError(
            f"node {node} answered something that is not the neuron API: {exc}"
        ) from exc


def _seconds(value: str | None) -> float | None:
    """Read a `Retry-After` of seconds; a date is as good as none."""
    if value is None or not value.strip().isdigit():
        return None
    return float(value)
