"""Wire structs of the Anthropic Messages dialect: requests, answers, stream events, errors.

Requests are tolerant: unknown fields, betas and block types decode. A block is one struct for all
types, since clients send types that did not exist when this was written; `core.translate` refuses
those that would be lost.
"""

import datetime
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from cortex.core.decode import decode_query
from cortex.core.errors import ContextLengthExceededError, CortexError
from cortex.core.openai import (
    MAX_MESSAGES,
    MAX_STOPS,
    ModelCard,
    StopString,
)
from cortex.core.tool_choice import MAX_NAME_CHARS, MAX_TOOLS

MAX_PAGE_MODELS = 1000

PING = b'event: ping\ndata: {"type": "ping"}\n\n'

# What a client is told by status where the dialect has a type of its own.
_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
# The dialect's own status for a service that is short of something for the moment.
OVERLOADED = 529

_encoder = msgspec.json.Encoder()


class Source(msgspec.Struct, kw_only=True, frozen=True):
    """Where an image or document comes from: base64 data, a URL, plain text or blocks."""

    type: str
    media_type: str | None = None
    data: str | None = None
    url: str | None = None
    content: "str | list[Block] | None" = None


class Block(msgspec.Struct, kw_only=True, frozen=True):
    """One content block of a request; `type` says which of the fields count.

    A search result's `source` is a string, and a server tool's failure an object as `content`.
    """

    type: str
    text: str | None = None
    source: Source | str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: "str | list[Block] | dict[str, Any] | None" = None
    is_error: bool | None = None
    thinking: str | None = None
    title: str | None = None
    context: str | None = None

    def __post_init__(self) -> None:
        if self.type == "text" and self.text is None:
            raise ValueError("Object missing required field `text`")


class Turn(msgspec.Struct, kw_only=True, frozen=True):
    """One turn of the conversation; newer clients also send system turns here."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class ToolParam(msgspec.Struct, kw_only=True, frozen=True):
    """A declared tool; one of another type than `custom` is defined by the vendor."""

    name: Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARS)] | None = None
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.type in (None, "custom") and self.name is None:
            raise ValueError("Object missing required field `name`")


class ToolChoice(msgspec.Struct, kw_only=True, frozen=True):
    """`tool_choice`."""

    type: Literal["auto", "any", "none", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    def __post_init__(self) -> None:
        if self.type == "tool" and not self.name:
            raise ValueError("tool_choice of type tool needs a name")


class Thinking(msgspec.Struct, kw_only=True, frozen=True):
    """`thinking`."""

    type: str
    budget_tokens: Annotated[int, Meta(gt=0)] | None = None


class Metadata(msgspec.Struct, kw_only=True, frozen=True):
    """`metadata`."""

    user_id: str | None = None


class OutputFormat(msgspec.Struct, kw_only=True, frozen=True):
    """The `format` of an output configuration, or `output_format` as older clients call it."""

    type: str
    schema: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.type == "json_schema" and self.schema is None:
            raise ValueError("Object missing required field `schema`")


class OutputConfig(msgspec.Struct, kw_only=True, frozen=True):
    """`output_config`."""

    format: OutputFormat | None = None
    effort: str | None = None


class Conversation(msgspec.Struct, kw_only=True, frozen=True):
    """What a request for a message and one for its token count have in common."""

    model: str
    messages: Annotated[list[Turn], Meta(max_length=MAX_MESSAGES)]
    system: str | list[Block] | None = None
    tools: Annotated[list[ToolParam], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    # What only the vendor can do: refused if given.
    mcp_servers: list[Any] | None = None
    container: Any = None

    def __post_init__(self) -> None:
        if not any(turn.role != "system" for turn in self.messages):
            raise ValueError("messages must hold at least one user turn")


class MessagesRequest(Conversation, kw_only=True, frozen=True):
    """Body of `POST /v1/messages`."""

    max_tokens: Annotated[int, Meta(gt=0)]
    stream: bool | None = False
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 31)] | None = None
    stop_sequences: Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    metadata: Metadata | None = None


class CountTokensRequest(Conversation, kw_only=True, frozen=True):
    """Body of `POST /v1/messages/count_tokens`."""


class CountTokensResponse(msgspec.Struct, kw_only=True, frozen=True):
    """Its answer."""

    input_tokens: int


class Usage(msgspec.Struct, kw_only=True, frozen=True):
    """Tokens in and out; `input_tokens` leaves out those read from a cache."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0


class TextBlock(msgspec.Struct, kw_only=True, frozen=True, tag="text"):
    """A piece of the answer's text."""

    text: str


class ThinkingBlock(msgspec.Struct, kw_only=True, frozen=True, tag="thinking"):
    """What the model thought before it answered."""

    thinking: str
    signature: str


class ToolUseBlock(msgspec.Struct, kw_only=True, frozen=True, tag="tool_use"):
    """A tool call."""

    id: str
    name: str
    input: dict[str, Any]


class MessageResponse(msgspec.Struct, kw_only=True, frozen=True):
    """Answer of `POST /v1/messages`."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[ThinkingBlock | TextBlock | ToolUseBlock]
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: Usage = Usage()


class MessageStart(msgspec.Struct, kw_only=True, frozen=True, tag="message_start"):
    """First event of a stream."""

    message: MessageResponse


class StopDelta(msgspec.Struct, kw_only=True, frozen=True):
    """Why a message ended."""

    stop_reason: str
    stop_sequence: str | None = None


class MessageDelta(msgspec.Struct, kw_only=True, frozen=True, tag="message_delta"):
    """Last event but one: why the message ended, and what it took."""

    delta: StopDelta
    usage: Usage


class ModelInfo(msgspec.Struct, kw_only=True, frozen=True):
    """One entry of `/v1/models`."""

    type: Literal["model"] = "model"
    id: str
    display_name: str
    created_at: str
    lifecycle: Literal["active"] = "active"
    max_input_tokens: int | None = None
    max_tokens: int | None = None


class ModelsQuery(msgspec.Struct, kw_only=True, frozen=True):
    """Which part of the models a caller wants; without a limit it is as many as a page may have.

    Attributes:
        lifecycle: stages that are wanted; none means all.
    """

    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE_MODELS)] = MAX_PAGE_MODELS
    after_id: str | None = None
    before_id: str | None = None
    lifecycle: list[Literal["active", "deprecated", "retired"]] = []

    def __post_init__(self) -> None:
        if self.after_id is not None and self.before_id is not None:
            raise ValueError("before_id and after_id exclude each other; give one of them")


ALL_MODELS = ModelsQuery()


class ModelPage(msgspec.Struct, kw_only=True, frozen=True):
    """`/v1/models`.

    Attributes:
        has_more: whether there are further models in the direction that was asked for.
    """

    data: list[ModelInfo]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None


def model_info(card: ModelCard) -> ModelInfo:
    """Return a model's entry in this dialect."""
    created = datetime.datetime.fromtimestamp(card.created, datetime.UTC)
    return ModelInfo(
        id=card.id,
        display_name=card.id,
        created_at=created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        max_input_tokens=card.max_input_tokens or card.max_model_len,
        max_tokens=card.max_output_tokens,
    )


def parse_models_query(parameters: Iterable[tuple[str, str]]) -> ModelsQuery:
    """Decode the query of a listing; unknown parameters are ignored.

    Raises:
        BadRequestError: a parameter is out of bounds or contradicts another.
    """
    fields: dict[str, object] = {}
    stages: list[str] = []
    for name, value in parameters:
        if name in ("lifecycle", "lifecycle[]"):
            stages.append(value)
        else:
            fields[name] = value
    return decode_query(ModelsQuery, {**fields, "lifecycle": stages})


def model_list(cards: list[ModelCard], query: ModelsQuery = ALL_MODELS) -> ModelPage:
    """Return a page of models.

    Args:
        cards: all there are, sorted by id. A cursor need not be one of them: models come and go
            while somebody reads page by page.
    """
    # Whatever is listed can be used, so other stages have no models.
    listed = cards if not query.lifecycle or "active" in query.lifecycle else []
    begin, end = 0, len(listed)
    if query.after_id is not None:
        begin = bisect_right(listed, query.after_id, key=lambda card: card.id)
    if query.before_id is not None:
        end = bisect_left(listed, query.before_id, key=lambda card: card.id)
        page = listed[max(begin, end - query.limit) : end]
    else:
        page = listed[begin : begin + query.limit]
    data = [model_info(card) for card in page]
    return ModelPage(
        data=data,
        has_more=len(page) < end - begin,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
    )


class ErrorDetail(msgspec.Struct, kw_only=True, frozen=True):
    """What stands under `error`."""

    type: str
    message: str


class ErrorResponse(msgspec.Struct, kw_only=True, frozen=True, tag="error"):
    """The error envelope."""

    error: ErrorDetail


def status_of(exc: CortexError) -> int:
    """Return the HTTP status of an error in this dialect."""
    return OVERLOADED if exc.status == 503 else exc.status


def error_body(exc: CortexError) -> bytes:
    """Return an error in this dialect's envelope."""
    fallback = "api_error" if exc.status >= 500 else "invalid_request_error"
    kind = _ERROR_TYPES.get(exc.status, fallback)
    return _encoder.encode(ErrorResponse(error=ErrorDetail(type=kind, message=_message(exc))))


def _message(exc: CortexError) -> str:
    """Return what an error says; clients shorten a conversation of which they read `too long`."""
    if exc.code != ContextLengthExceededError.code:
        return exc.message
    match exc.extras:
        case {"prompt_len": int(num_tokens), "max": int(limit)}:
            return f"prompt is too long: {num_tokens} tokens > {limit} maximum; shorten it"
    return f"prompt is too long: {exc.message}"


def error_event(exc: CortexError) -> bytes:
    """Return the event that ends a stream which failed after its first byte."""
    return b"event: error\ndata: " + error_body(exc) + b"\n\n"
