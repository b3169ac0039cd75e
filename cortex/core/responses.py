"""Wire structs of OpenAI's Responses API: requests, items, answers.

Requests are tolerant: unknown fields, tools and items decode. An input item is one struct for all
types, since clients send types that did not exist when this was written; `core.translate_responses`
refuses those that would be lost. Items and tools are kept as they came, to be stored and told
again.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from cortex.core.decode import decode_body
from cortex.core.errors import BadRequestError, MalformedJsonError, UnsupportedFieldError
from cortex.core.openai import (
    MAX_MESSAGES,
    MAX_STOPS,
    LogitBias,
    MinP,
    Penalty,
    RepetitionPenalty,
    Seed,
    StopString,
    Temperature,
    TokenLogprob,
    TopK,
    TopP,
)
from cortex.core.tool_choice import MAX_NAME_CHARS, MAX_TOOLS

MAX_ITEMS = MAX_MESSAGES
MAX_METADATA = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_CHARS = 512
MAX_ID_CHARS = 128
MAX_LOGPROBS = 20

RESPONSE_PREFIX = "resp_"
ENCRYPTED_REASONING = "reasoning.encrypted_content"
TEXT_LOGPROBS = "message.output_text.logprobs"

Status = Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class Content(msgspec.Struct, kw_only=True, frozen=True):
    """A piece of an item's content; `type` says which of the fields count."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: str | dict[str, Any] | None = None
    detail: str | None = None
    file_id: str | None = None
    file_data: str | None = None
    file_url: str | None = None
    filename: str | None = None
    input_audio: Any = None


class ToolParam(msgspec.Struct, kw_only=True, frozen=True):
    """A declared tool; a namespace holds further ones.

    Attributes:
        format: of a custom tool's input.
    """

    type: str = "function"
    name: Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARS)] | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    format: dict[str, Any] | None = None
    tools: "list[ToolParam] | None" = None

    def __post_init__(self) -> None:
        if self.type in ("function", "custom", "namespace") and self.name is None:
            raise ValueError("Object missing required field `name`")


class Item(msgspec.Struct, kw_only=True, frozen=True):
    """One item of the input; without a type it is a message."""

    type: str | None = None
    id: str | None = None
    role: str | None = None
    content: str | list[Content] | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: Any = None
    input: Any = None
    output: Any = None
    summary: list[Content] | None = None
    encrypted_content: str | None = None
    tools: list[ToolParam] | None = None

    @property
    def kind(self) -> str:
        """Its type, told or plain from what it has."""
        if self.type is not None:
            return self.type
        return "message" if self.role is not None else "item_reference"


class ToolChoice(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """`tool_choice` that says more than a word; `allowed_tools` has a mode and a list."""

    type: str
    name: str | None = None
    namespace: str | None = None
    mode: str | None = None
    tools: "list[ToolChoice] | None" = None


class TextFormat(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """What form the text has to have."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None

    def __post_init__(self) -> None:
        if self.type == "json_schema" and self.schema is None:
            raise ValueError("Object missing required field `schema`")


class TextConfig(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """`text`: its form, and for templates that read it how much to say."""

    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(msgspec.Struct, kw_only=True, frozen=True):
    """`reasoning`."""

    effort: str | None = None
    summary: str | None = None


class StreamOptions(msgspec.Struct, kw_only=True, frozen=True):
    """`stream_options`; nothing is padded here, so there is nothing to leave out."""

    include_obfuscation: bool | None = None


MetadataKey = Annotated[str, Meta(max_length=MAX_METADATA_KEY_CHARS)]
MetadataValue = Annotated[str, Meta(max_length=MAX_METADATA_CHARS)]


class ResponsesRequest(msgspec.Struct, kw_only=True, frozen=True):
    """Body of `POST /v1/responses`.

    The sampling fields that the vendor does not have are those of `/v1/chat/completions`.
    """

    model: str
    input: str | Annotated[list[msgspec.Raw], Meta(max_length=MAX_ITEMS)] | None = None
    instructions: str | None = None
    previous_response_id: Annotated[str, Meta(max_length=MAX_ID_CHARS)] | None = None
    stream: bool | None = False
    store: bool | None = True
    tools: Annotated[list[msgspec.Raw], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    max_output_tokens: Annotated[int, Meta(gt=0)] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    include: list[str] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Meta(max_length=MAX_METADATA)] | None = (
        None
    )
    prompt_cache_key: str | None = None
    truncation: Literal["auto", "disabled"] | None = None
    stream_options: StreamOptions | None = None
    # What chat completions have beside.
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: LogitBias | None = None
    seed: Seed | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Accepted and without effect here.
    user: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    max_tool_calls: int | None = None
    # What only another service can do: refused if given.
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    moderation: Any = None

    @property
    def wants_store(self) -> bool:
        """Whether the answer is to be kept, which it is unless the request says no."""
        return self.store is not False

    @property
    def wants_logprobs(self) -> bool:
        """Whether the text comes with log probabilities."""
        return bool(self.top_logprobs) or TEXT_LOGPROBS in (self.include or ())

    @property
    def wants_encrypted(self) -> bool:
        """Whether reasoning comes in a form that is sent back with the next turn."""
        return ENCRYPTED_REASONING in (self.include or ())

    @property
    def wants_summary(self) -> bool:
        """Whether reasoning is told as a summary."""
        return self.reasoning is not None and self.reasoning.summary not in (None, "none")


_REFUSED = {
    "background": "answers are not made in the background; leave it out and set stream",
    "conversation": "conversations are not kept under ids of their own; use previous_response_id",
    "prompt": "prompt templates are not kept here; send instructions and input",
    "moderation": "nothing is moderated here; leave it out",
}

_request_decoder = msgspec.json.Decoder(ResponsesRequest)
_item_decoder = msgspec.json.Decoder(Item)
_tool_decoder = msgspec.json.Decoder(ToolParam)


def parse_request(body: bytes) -> ResponsesRequest:
    """Decode a request.

    Raises:
        UnsupportedFieldError: it asks for what cannot be done here.
        CortexError: as `decode_body`.
    """
    request = decode_body(_request_decoder, body)
    try:
        # Items and tools come back in answers as they were sent, unknown fields of theirs unread.
        body.decode()
    except UnicodeDecodeError as exc:
        raise MalformedJsonError(f"the request body is not valid UTF-8: {exc}") from exc
    for name, why in _REFUSED.items():
        if getattr(request, name):
            raise UnsupportedFieldError(f"{name} is not supported: {why}", param=name)
    if not request.input and request.previous_response_id is None:
        raise BadRequestError(
            "invalid request: `input` is missing; send a text or a list of items", param="input"
        )
    return request


def parse_items(raws: list[msgspec.Raw], place: str = "input") -> list[Item]:
    """Decode items; raises as `decode_body`, with the item's place."""
    return [_placed(_item_decoder, raw, f"{place}[{at}]") for at, raw in enumerate(raws)]


def parse_tools(raws: list[msgspec.Raw]) -> list[ToolParam]:
    """Decode tools; raises as `decode_body`, with the tool's place."""
    return [_placed(_tool_decoder, raw, f"tools[{at}]") for at, raw in enumerate(raws)]


def _placed(decoder: Any, raw: msgspec.Raw, place: str) -> Any:
    try:
        return decode_body(decoder, bytes(raw))
    except BadRequestError as exc:
        param = f"{place}.{exc.param}" if exc.param else place
        raise BadRequestError(f"{place}: {exc.message}", param=param) from exc


class OutputText(msgspec.Struct, kw_only=True, frozen=True, tag="output_text"):
    """A piece of the answer's text."""

    text: str
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []


class ReasoningText(msgspec.Struct, kw_only=True, frozen=True, tag="reasoning_text"):
    """What the model thought."""

    text: str


class SummaryText(msgspec.Struct, kw_only=True, frozen=True, tag="summary_text"):
    """What the model thought, where the caller asked for a summary."""

    text: str


class OutputMessage(msgspec.Struct, kw_only=True, frozen=True, tag="message"):
    """The answer's text, an item of the output."""

    id: str
    status: ItemStatus
    role: Literal["assistant"] = "assistant"
    content: list[OutputText] = []


class ReasoningItem(msgspec.Struct, kw_only=True, frozen=True, tag="reasoning"):
    """What the model thought, an item of the output."""

    id: str
    summary: list[SummaryText] = []
    content: list[ReasoningText] = []
    encrypted_content: str | UnsetType = UNSET


class FunctionCallItem(msgspec.Struct, kw_only=True, frozen=True, tag="function_call"):
    """A call of a declared function, an item of the output."""

    id: str
    call_id: str
    name: str
    namespace: str | UnsetType = UNSET
    arguments: str
    status: ItemStatus


class CustomCallItem(msgspec.Struct, kw_only=True, frozen=True, tag="custom_tool_call"):
    """A call of a declared custom tool, an item of the output."""

    id: str
    call_id: str
    name: str
    namespace: str | UnsetType = UNSET
    input: str
    status: ItemStatus


OutputItem = OutputMessage | ReasoningItem | FunctionCallItem | CustomCallItem


class InputTokensDetails(msgspec.Struct, kw_only=True, frozen=True):
    """Part of `Usage`."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, kw_only=True, frozen=True):
    """Part of `Usage`."""

    reasoning_tokens: int = 0


class Usage(msgspec.Struct, kw_only=True, frozen=True):
    """Tokens in and out."""

    input_tokens: int
    input_tokens_details: InputTokensDetails = InputTokensDetails()
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int


class ResponseError(msgspec.Struct, kw_only=True, frozen=True):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(msgspec.Struct, kw_only=True, frozen=True):
    """Why a response ended before it was complete."""

    reason: str


class Response(msgspec.Struct, kw_only=True, frozen=True):
    """Answer of `POST /v1/responses`, at any moment of its making."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    background: bool = False
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = {}
    model: str
    output: list[OutputItem] = []
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    prompt_cache_key: str | None = None
    reasoning: Reasoning = Reasoning()
    service_tier: str = "default"
    store: bool = True
    temperature: float | None = None
    text: TextConfig = TextConfig(format=TextFormat(type="text"))
    tool_choice: str | ToolChoice = "auto"
    tools: list[msgspec.Raw] = []
    top_logprobs: int = 0
    top_p: float | None = None
    truncation: str = "disabled"
    usage: Usage | None = None
    user: str | None = None


class InputTokens(msgspec.Struct, kw_only=True, frozen=True):
    """Answer of `POST /v1/responses/input_tokens`."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


class Deleted(msgspec.Struct, kw_only=True, frozen=True):
    """Answer of `DELETE /v1/responses/{id}`."""

    id: str
    object: Literal["response"] = "response"
    deleted: bool = True
