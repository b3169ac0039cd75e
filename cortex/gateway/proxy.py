"""One request at one node: the lease, the bytes through, and what they tell in passing.

Answers are relayed as they come and never parsed event by event. In passing the meter notes when
the first content token went by and keeps the last few chunks, where usage and the end mark are.
"""

import asyncio
import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from cortex.core.errors import (
    CortexError,
    RemoteError,
    UpstreamConnectionError,
    UpstreamMalformedError,
)
from cortex.core.openai import NO_ENVELOPE, Usage, parse_error, read_usage_comment
from cortex.gateway.fleet import Fleet, Lease
from cortex.gateway.live import Live
from cortex.gateway.metrics import RequestTiming
from cortex.gateway.neuron_client import NeuronClient, Reply, UnreachableError
from cortex.gateway.router import Serve

MAX_ANSWER_BYTES = 64 << 20
MAX_TAIL_CHUNKS = 8
MAX_TAIL_BYTES = 1 << 16
# Enough of the chunk before to recognise a first token that two chunks share.
OVERLAP_BYTES = 64
# A stream from a node that counts as down goes on as long as it is never silent for this long:
# its own bytes are better proof than what was missed elsewhere.
LOST_GRACE_S = 3.0

_CONTENT = re.compile(
    rb'"(?:content|reasoning_content|reasoning|text)":\s*"[^"]|"tool_calls":\s*\[\s*\{'
)
_DELTA = b'"delta":{"'
_NO_CONTENT = b'"content":""'
# A text completion's chunks have no delta.
_TEXT = b'"text":"'
_NO_TEXT = b'"text":""'
# At the start of a line only: an answer may quote either.
_DONE = re.compile(rb"(?:^|\n)data: ?\[DONE\]")
_FIRST_EVENT = re.compile(rb"(?:^|\n)data:(.*?)\r?\n\r?\n", re.DOTALL)
_ERROR = re.compile(rb'(?:^|\n)data: ?\{"error"')


def _statuses(kind: type[CortexError]) -> dict[str, int]:
    found = {kind.code: kind.status}
    for each in kind.__subclasses__():
        found |= _statuses(each)
    return found


_STATUS_OF_CODE = _statuses(CortexError)


class _UsageOnly(msgspec.Struct, kw_only=True):
    """The one part of an answer that is read."""

    usage: Usage | None = None


_usage_decoder = msgspec.json.Decoder(_UsageOnly)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long a node may be silent: until its first event, and between two chunks."""

    first_token_s: float
    stall_s: float


class StreamMeter:
    """What a stream's bytes tell without being parsed.

    Args:
        arrival_s: when the request came, on `clock`.
        on_content: called once, when the first content token goes by.
    """

    def __init__(
        self,
        timing: RequestTiming,
        arrival_s: float,
        clock: Callable[[], float],
        on_content: Callable[[], None] = lambda: None,
    ) -> None:
        self._timing = timing
        self._arrival_s = arrival_s
        self._clock = clock
        self._on_content = on_content
        self._tail: deque[bytes] = deque(maxlen=MAX_TAIL_CHUNKS)
        self._overlap = b""
        self._first_s: float | None = None
        self._last_s = arrival_s
        self._num_deltas = 0
        self._opening: Usage | None = None

    def feed(self, chunk: bytes) -> None:
        """Note a chunk that goes by."""
        if not _is_comment(chunk):
            # A comment only says that the node is there, not that it gets on.
            self._last_s = self._clock()
        self._tail.append(chunk)
        if self._first_s is None:
            # The prompt's count comes with the first chunk, long gone when a client leaves late.
            self._opening = self._opening or _usage_in(chunk)
            if _CONTENT.search(self._overlap + chunk) is None:
                self._overlap = (self._overlap + chunk)[-OVERLAP_BYTES:]
                return
            self._first_s = self._last_s
            self._timing.ttft_s = self._first_s - self._arrival_s
            self._on_content()
            # The role chunk may have come along.
            self._num_deltas -= chunk.count(_NO_CONTENT)
        self._num_deltas += chunk.count(_DELTA) + chunk.count(_TEXT) - chunk.count(_NO_TEXT)

    @property
    def has_content(self) -> bool:
        """Whether the first content token went by."""
        return self._first_s is not None

    @property
    def silent_s(self) -> float:
        """How long no event has come, comments aside."""
        return self._clock() - self._last_s

    @property
    def has_ended(self) -> bool:
        """Whether the stream's own end went by: `[DONE]`, or an error in the node's words."""
        tail = self._tail_bytes()
        return _DONE.search(tail) is not None or _ERROR.search(tail) is not None

    def close(self) -> None:
        """Write what went by into the timing."""
        tail = self._tail_bytes()
        if _ERROR.search(tail) is not None:
            self._timing.failed = True
        if self._first_s is not None and self._last_s > self._first_s:
            self._timing.decode_s = self._last_s - self._first_s
        usage = _usage_in(tail)
        if usage is not None:
            note_usage(self._timing, usage)
        else:
            # The client left or the node tells none: the chunks that went by are a lower bound,
            # and closer to the truth than nothing.
            if self._opening is not None:
                note_usage(self._timing, self._opening)
            self._timing.completion_tokens = max(0, self._num_deltas)

    def _tail_bytes(self) -> bytes:
        return b"".join(self._tail)[-MAX_TAIL_BYTES:]


def _is_comment(chunk: bytes) -> bool:
    # A chunk may also begin in the middle of `data: {`.
    return chunk.startswith(b": ") and chunk[2:3] != b"{" and b"data:" not in chunk


def note_usage(timing: RequestTiming, usage: Usage) -> None:
    """Copy token counts into a timing."""
    timing.prompt_tokens = usage.prompt_tokens
    timing.completion_tokens = usage.completion_tokens
    details = usage.prompt_tokens_details
    timing.cached_tokens = (details.cached_tokens or 0) if details is not None else 0


def usage_of(body: bytes) -> Usage | None:
    """Return the usage of a whole answer, None where it has none that can be read."""
    try:
        return _usage_decoder.decode(body).usage
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _usage_in(tail: bytes) -> Usage | None:
    for line in reversed(tail.split(b"\n")):
        told = read_usage_comment(line)
        if told is not None:
            return told
        if line.startswith(b"data:") and b'"usage"' in line:
            usage = usage_of(line[5:])
            if usage is not None:
                return usage
    return None


class Exchange:
    """An answer that is being streamed; made by `Proxy.open`, to be closed by its user.

    Args:
        lost_grace_s: how long it may be silent once its node counts as down.
    """

    def __init__(
        self,
        lease: Lease,
        reply: Reply,
        limits: Limits,
        meter: StreamMeter,
        *,
        lost_grace_s: float = LOST_GRACE_S,
    ) -> None:
        self._lease = lease
        self._reply = reply
        self._limits = limits
        self._meter = meter
        self._lost_grace_s = lost_grace_s
        self._watch: asyncio.Timeout | None = None
        self._closed = False
        self.first = b""

    async def read_first(self) -> None:
        """Read up to the first event; comments before it are dropped, the gateway has its own.

        Raises:
            UpstreamConnectionError: the stream ended or broke before.
            RemoteError: the first event is an error.
        """
        received = b""
        while (event := _FIRST_EVENT.search(received)) is None:
            chunk = await self._reply.read_chunk()
            if not chunk:
                raise UpstreamConnectionError(
                    f"node {self._reply.node} ended its answer before the first event"
                )
            received += chunk
        data = event.group(1)
        if data.lstrip().startswith(b'{"error"'):
            # It came after a node's keep-alives, so without a status; its code's is known here.
            code = parse_error(UpstreamConnectionError.status, data).code
            raise parse_error(_STATUS_OF_CODE.get(code, UpstreamConnectionError.status), data)
        self._meter.feed(received)
        self.first = received
        self._lease.succeeded()
        self._lease.on_node_lost(self._node_lost)

    async def next_chunk(self) -> bytes:
        """Return what came next, nothing at the stream's proper end.

        Raises:
            UpstreamConnectionError: the node broke off or fell silent.
        """
        limits = self._limits
        limit_s = limits.stall_s if self._meter.has_content else limits.first_token_s
        left_s = max(0.0, limit_s - self._meter.silent_s)
        try:
            async with asyncio.timeout(self._bounded(left_s)) as self._watch:
                chunk = await self._reply.read_chunk()
            self._watch = None
        except TimeoutError as exc:
            self._lease.failed()
            if self._lease.lost and self._meter.silent_s < limit_s:
                raise UpstreamConnectionError(
                    f"node {self._reply.node} became unreachable in the middle of the answer"
                ) from exc
            raise UpstreamConnectionError(
                f"node {self._reply.node} sent no token for {limit_s:g} s"
            ) from exc
        except UpstreamConnectionError:
            self._lease.failed()
            raise
        if chunk:
            self._meter.feed(chunk)
        elif not self._meter.has_ended:
            self._lease.failed()
            raise UpstreamConnectionError(
                f"node {self._reply.node} broke off in the middle of the answer"
            )
        return chunk

    def _bounded(self, limit_s: float) -> float:
        return min(limit_s, self._lost_grace_s) if self._lease.lost else limit_s

    def _node_lost(self) -> None:
        if self._watch is not None:
            until_s = asyncio.get_running_loop().time() + self._lost_grace_s
            due_s = self._watch.when()
            assert due_s is not None
            self._watch.reschedule(min(due_s, until_s))

    def close(self) -> None:
        """Let the node's connection and the lease go, and settle the meter; once."""
        if not self._closed:
            self._closed = True
            self._reply.close()
            self._lease.release()
            self._meter.close()


class Proxy:
    """Carries requests to nodes."""

    def __init__(self, client: NeuronClient, fleet: Fleet, live: Live) -> None:
        self._client = client
        self._fleet = fleet
        self._live = live

    async def open(
        self, serve: Serve, path: str, body: bytes, headers: Mapping[str, str], meter: StreamMeter
    ) -> Exchange:
        """Send a request and return its answer once the first event has come.

        Raises:
            CortexError: the node could not be reached, refused, broke off or said nothing; the
                caller has not seen a byte, so another node may be tried.
        """
        settings = self._live.settings
        limits = Limits(first_token_s=settings.first_token_s, stall_s=settings.stall_s)
        lease = self._fleet.lease(serve.node, serve.model_id)
        reply: Reply | None = None
        try:
            async with asyncio.timeout(limits.first_token_s) as watch:
                lease.on_node_lost(lambda: watch.reschedule(0))
                reply = await self._post(serve, path, body, headers)
                if not (reply.header("content-type") or "").startswith("text/event-stream"):
                    raise UpstreamMalformedError(
                        f"node {serve.node} did not answer with an event stream"
                    )
                exchange = Exchange(lease, reply, limits, meter)
                await exchange.read_first()
        except TimeoutError as exc:
            lease.failed()
            _abandon(lease, reply)
            if lease.lost:
                raise _lost(serve.node) from exc
            raise UpstreamConnectionError(
                f"node {serve.node} produced no token within {limits.first_token_s:g} s"
            ) from exc
        except BaseException as exc:
            _tell(lease, exc)
            _abandon(lease, reply)
            raise
        return exchange

    async def call(self, serve: Serve, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
        """Send a request and return its whole answer.

        A long answer takes its time: nothing bounds it but the life of the node.

        Raises:
            CortexError: as for `open`, or the node became unhealthy meanwhile.
        """
        lease = self._fleet.lease(serve.node, serve.model_id)
        reply: Reply | None = None
        try:
            async with asyncio.timeout(None) as watch:
                lease.on_node_lost(lambda: watch.reschedule(0))
                reply = await self._post(serve, path, body, headers)
                answer = await reply.read_all(MAX_ANSWER_BYTES)
                lease.succeeded()
                return answer
        except TimeoutError as exc:
            lease.failed()
            raise _lost(serve.node) from exc
        except CortexError as exc:
            _tell(lease, exc)
            raise
        finally:
            _abandon(lease, reply)

    async def _post(
        self, serve: Serve, path: str, body: bytes, headers: Mapping[str, str]
    ) -> Reply:
        reply = await self._client.post(serve.node, serve.endpoint, path, body, headers)
        if 200 <= reply.status < 300:
            return reply
        try:
            error: CortexError = await reply.error()
        finally:
            reply.close()
        raise error


def _lost(node: str) -> UpstreamConnectionError:
    return UpstreamConnectionError(f"node {node} became unreachable while it worked on the request")


def _tell(lease: Lease, exc: BaseException) -> None:
    """Tell the node's breaker how a request went that ended in `exc`."""
    if isinstance(exc, UnreachableError):
        lease.failed(at_once=True)
    elif isinstance(exc, RemoteError) and exc.code != NO_ENVELOPE:
        # It refused in its own words: the node works, whatever it thinks of the request.
        lease.succeeded()
    elif isinstance(exc, CortexError):
        lease.failed()


def _abandon(lease: Lease, reply: Reply | None) -> None:
    lease.release()
    if reply is not None:
        reply.close()
