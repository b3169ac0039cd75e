"""How a chat stream is read where it is translated: the fields that count, and what all share.

Chunks are read leniently: this runs once per token, and other engines send null, or nothing, where
ours sends a value.
"""

from abc import ABC, abstractmethod

import msgspec

from cortex.core import errors
from cortex.core.errors import CortexError, RemoteError, UpstreamMalformedError
from cortex.core.openai import (
    ChoiceLogprobs,
    FunctionDelta,
    Usage,
    parse_error,
    read_usage_comment,
)
from cortex.core.sse import SseEvent, SseSplitter

_STATUS_BY_CODE = {
    cls.code: cls.status
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, CortexError)
}
_STATUS_BY_KIND = {"invalid_request_error": 400, "rate_limit_error": 429, "overloaded_error": 503}

NOT_DECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class CallPiece(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    """A fragment of a tool call."""

    index: int | None = None
    id: str | None = None
    function: FunctionDelta | None = None

    @property
    def name(self) -> str:
        """The name that it brings, "" for none."""
        return (self.function.name if self.function else None) or ""

    @property
    def arguments(self) -> str:
        """The piece of JSON text that it brings."""
        return (self.function.arguments if self.function else None) or ""


class DeltaPiece(msgspec.Struct, kw_only=True, frozen=True):
    """What a chunk adds."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[CallPiece] | None = None


class ChoicePiece(msgspec.Struct, kw_only=True, frozen=True):
    """One choice of a chunk."""

    index: int | None = 0
    delta: DeltaPiece | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    # Undecoded: most translations have no use for them.
    logprobs: msgspec.Raw = msgspec.Raw(b"null")


class ChunkPiece(msgspec.Struct, kw_only=True, frozen=True):
    """One event of a chat stream."""

    id: str | None = None
    choices: list[ChoicePiece]
    usage: Usage | None = None


decode_chunk = msgspec.json.Decoder(ChunkPiece).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_logprobs_decoder: "msgspec.json.Decoder[ChoiceLogprobs | None]" = msgspec.json.Decoder(
    ChoiceLogprobs | None
)


def read_logprobs(raw: msgspec.Raw) -> ChoiceLogprobs | None:
    """Return a choice's log probabilities, None where it has none that can be read."""
    try:
        return _logprobs_decoder.decode(raw)
    except NOT_DECODABLE:
        return None


def is_whole_object(pieces: list[str]) -> bool:
    """Whether pieces of JSON text make up a whole object."""
    if not pieces or not pieces[-1].rstrip().endswith("}"):
        return False
    try:
        _decode_fields("".join(pieces))
    except NOT_DECODABLE:
        return False
    return True


def is_new_call(piece: CallPiece, call_id: str | None, name: str) -> bool:
    """Whether a fragment begins another call than the one of its index that is under way.

    Some engines give every call the same index, or none: then a second name begins a call.

    Args:
        call_id, name: of the call that is under way.
    """
    is_other_id = bool(piece.id and call_id and piece.id != call_id)
    is_unnumbered = piece.index is None and (not piece.id or not call_id)
    return bool(piece.name and name) and (is_other_id or is_unnumbered)


def told_error(event: SseEvent) -> RemoteError | None:
    """Return the error that an event in the middle of a stream tells of, if it tells of one."""
    try:
        fields = _decode_fields(event.data)
    except NOT_DECODABLE:
        fields = {}
    if event.name != b"error" and "error" not in fields:
        return None
    error = parse_error(502, event.data)
    status = _STATUS_BY_CODE.get(error.code) or _STATUS_BY_KIND.get(error.kind, 502)
    return parse_error(status, event.data)


class ChunkTranslator(ABC):
    """Turns the bytes of one OpenAI stream into those of one stream of another dialect.

    Call `feed` with what arrives, `end` after the source's end, or `fail` when it broke; after the
    first `fail` or the end nothing more comes out.

    Args:
        keepalive: what a comment becomes.
    """

    def __init__(self, keepalive: bytes) -> None:
        self._keepalive = keepalive
        self._splitter = SseSplitter()
        self._fault: UpstreamMalformedError | None = None
        self._finish: str | None = None

    def feed(self, data: bytes) -> bytes:
        """Return the events that arrived bytes become; often none.

        Raises:
            UpstreamMalformedError: they are not an OpenAI chunk stream. What was good before the
                fault comes out first; the error is then raised by the next call.
        """
        if self._is_over():
            return b""
        if self._fault is not None:
            raise self._fault
        out: list[bytes] = []
        try:
            for event in self._splitter.feed(data):
                self._translate(event, out)
        except UpstreamMalformedError as exc:
            if not out:
                raise
            self._fault = exc
        return b"".join(out)

    def end(self) -> bytes:
        """Return what the stream ends with; an error if its source stopped before it was done."""
        if self._is_over():
            return b""
        fault = self._fault
        if fault is None and self._finish is None:
            fault = UpstreamMalformedError("the answer stopped before it was complete")
        elif fault is None and self._has_nameless_call():
            fault = UpstreamMalformedError("the answer has a tool call without a name")
        if fault is not None:
            return self.fail(fault)
        out: list[bytes] = []
        self._close(out)
        return b"".join(out)

    @abstractmethod
    def fail(self, exc: CortexError) -> bytes:
        """Return what ends the stream with an error."""

    def _translate(self, event: SseEvent, out: list[bytes]) -> None:
        if self._is_over():
            return
        if event.is_comment:
            usage = read_usage_comment(event.data)
            if usage is None:
                out.append(self._keepalive)
            else:
                self._note_usage(usage)
            return
        if event.data == b"[DONE]":
            out.append(self.end())
            return
        try:
            chunk = decode_chunk(event.data)
        except NOT_DECODABLE as exc:
            error = told_error(event)
            if error is None:
                raise UpstreamMalformedError(f"an event is not a chat chunk: {exc}") from exc
            out.append(self.fail(error))
            return
        if chunk.usage is not None:
            self._note_usage(chunk.usage)
        self._start(chunk.id or "", out)
        for choice in chunk.choices:
            if not choice.index:
                self._take(choice, out)

    @abstractmethod
    def _is_over(self) -> bool:
        """Whether nothing of the source counts any more."""

    @abstractmethod
    def _has_nameless_call(self) -> bool:
        """Whether the name of a call has not come."""

    @abstractmethod
    def _note_usage(self, usage: Usage) -> None:
        """Take the tokens that it took so far."""

    @abstractmethod
    def _start(self, completion_id: str, out: list[bytes]) -> None:
        """Begin the stream, unless it has begun."""

    @abstractmethod
    def _take(self, choice: ChoicePiece, out: list[bytes]) -> None:
        """Take what a chunk adds to the first choice, and note why it ends."""

    @abstractmethod
    def _close(self, out: list[bytes]) -> None:
        """End the stream properly."""
