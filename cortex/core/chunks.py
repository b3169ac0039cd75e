"""The few fields of a chat chunk that count when a stream is translated.

Read leniently: this runs once per token, and other engines send null, or nothing, where ours sends
a value.
"""

import msgspec

from cortex.core import errors
from cortex.core.errors import CortexError, RemoteError
from cortex.core.openai import ChoiceLogprobs, FunctionDelta, Usage, parse_error
from cortex.core.sse import SseEvent

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
