"""Wire structs of the OpenAI chat dialect: requests, completions, chunks, errors, model listing.

Requests are tolerant: unknown fields are ignored and null equals absent. What a field's type
cannot say is checked in `__post_init__`; what a model cannot do is refused later, where the
model is known.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from cortex.core.decode import decode_body
from cortex.core.errors import CortexError, RemoteError, UnsupportedFieldError
from cortex.core.neuron_api import Cost, Limit
from cortex.core.tool_choice import MAX_NAME_CHARS, MAX_TOOLS, CustomToolChoice, ToolChoice

MAX_MESSAGES = 16384
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_CHOICES = 8
MAX_LOGIT_BIAS = 4096

SSE_DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": keep-alive\n\n"
# The code of an error that came without an envelope: whoever sent it was no Cortex process.
NO_ENVELOPE = "upstream_error"
USAGE_COMMENT = b": usage "

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


def kept(value: object) -> Any:
    """Return a default that `omit_defaults` never leaves out of the encoded object."""
    return msgspec.field(default_factory=lambda: value)


def _empty_list() -> list[Any]:
    # Not `list` itself: `omit_defaults` would leave the empty list out.
    return []


class RequestHead(msgspec.Struct, kw_only=True, frozen=True):
    """The few fields a gateway needs of any request body; everything else is skipped unread."""

    model: str | None = None
    stream: bool | None = False
    stream_options: "StreamOptions | None" = None


class StreamOptions(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """`stream_options`."""

    include_usage: bool | None = None


class TextPart(msgspec.Struct, kw_only=True, frozen=True, tag="text"):
    """A piece of text in a message."""

    text: str


class RefusalPart(msgspec.Struct, kw_only=True, frozen=True, tag="refusal"):
    """An earlier refusal of the assistant; carried as its text."""

    refusal: str


class ImagePart(msgspec.Struct, kw_only=True, frozen=True, tag="image_url"):
    """An image; well-formed, and refused where the model has no vision."""

    image_url: Any = None


class AudioPart(msgspec.Struct, kw_only=True, frozen=True, tag="input_audio"):
    """A sound; well-formed, and refused where the model cannot hear."""

    input_audio: Any = None


class FilePart(msgspec.Struct, kw_only=True, frozen=True, tag="file"):
    """A file; well-formed, and refused where the model cannot read it."""

    file: Any = None


Part = TextPart | RefusalPart | ImagePart | AudioPart | FilePart


class FunctionCall(msgspec.Struct, kw_only=True, frozen=True):
    """The call inside a `ToolCall`. Some clients send `arguments` as an object."""

    name: str
    arguments: str | dict[str, Any] | None = "{}"


class ToolCall(msgspec.Struct, kw_only=True, frozen=True):
    """A complete tool call, in a request's history or in a completion."""

    id: str | None = None
    type: str = "function"
    function: FunctionCall


class Message(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # another name of the same field

    @property
    def thinking(self) -> str | None:
        """The turn's reasoning text, whichever of the two names it came under."""
        return self.reasoning_content if self.reasoning_content is not None else self.reasoning


class FunctionDef(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """A tool's name, purpose and JSON schema of its arguments."""

    name: Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARS)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True, frozen=True):
    """A declared tool; only those of type `function` are usable."""

    type: str = "function"
    function: FunctionDef | None = None


class JsonSchemaFormat(msgspec.Struct, kw_only=True, frozen=True):
    """The `json_schema` part of a response format."""

    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, frozen=True):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def __post_init__(self) -> None:
        if self.type == "json_schema" and (
            self.json_schema is None or self.json_schema.schema is None
        ):
            raise ValueError("response_format of type json_schema needs json_schema.schema")


StopString = Annotated[str, Meta(max_length=MAX_STOP_CHARS)]
# Sampling, of this and of other routes.
Temperature = Annotated[float, Meta(ge=0, le=2)]
TopP = Annotated[float, Meta(gt=0, le=1)]
TopK = Annotated[int, Meta(ge=-1, le=1 << 31)]  # -1 and 0 switch it off
MinP = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
# Logits are divided by it: far smaller ones leave no finite numbers.
RepetitionPenalty = Annotated[float, Meta(ge=0.01, le=10)]
LogitBias = Annotated[
    dict[int, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_LOGIT_BIAS)
]
Seed = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Positive = Annotated[int, Meta(gt=0)]


class GenerationRequest(msgspec.Struct, kw_only=True, frozen=True):
    """What requests for chat and for text completions have in common."""

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: LogitBias | None = None
    seed: Seed | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    user: str | None = None  # accepted and without effect here

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def num_choices(self) -> int:
        """How many answers are made."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer, each once."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(dict.fromkeys(stop for stop in stops if stop))


class ChatRequest(GenerationRequest, kw_only=True, frozen=True):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(max_length=MAX_MESSAGES)]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    # How much to think and to say, for templates that read it.
    reasoning_effort: str | None = None
    verbosity: str | None = None
    thinking_budget: Positive | None = None  # tokens of thinking; an extension others have too
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: list[str] | None = None
    # The older spelling of tools, and what only another service can do: refused if given.
    functions: list[Any] | None = None
    function_call: Any = None
    audio: Any = None
    web_search_options: Any = None
    # Accepted and without effect here.
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prediction: Any = None  # makes an answer faster elsewhere, and never another one

    def __post_init__(self) -> None:
        if not self.messages:
            raise ValueError("messages must hold at least one message")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.tool_choice == "required" and not self.tools:
            raise ValueError("tool_choice 'required' needs at least one entry in tools")


_chat_decoder = msgspec.json.Decoder(ChatRequest)
_head_decoder = msgspec.json.Decoder(RequestHead)


def parse_chat_request(body: bytes) -> ChatRequest:
    """Decode a chat request.

    Raises:
        UnsupportedFieldError: it asks for what no model here can do.
        CortexError: as `decode_body`.
    """
    request = decode_body(_chat_decoder, body)
    _refuse_unsupported(request)
    return request


def _refuse_unsupported(request: ChatRequest) -> None:
    # Without functions, to call none of them or any asks for nothing.
    if request.functions or request.function_call not in (None, "none", "auto"):
        raise UnsupportedFieldError(
            "functions and function_call are not supported; use tools and tool_choice",
            param="functions" if request.functions else "function_call",
        )
    if request.audio is not None or any(kind != "text" for kind in request.modalities or ()):
        param = "modalities" if request.audio is None else "audio"
        raise UnsupportedFieldError(
            f"{param}: only text can be generated; leave it out", param=param
        )
    if request.web_search_options is not None:
        raise UnsupportedFieldError(
            "web_search_options: nothing is searched from here; leave it out, or declare a tool",
            param="web_search_options",
        )
    if isinstance(request.tool_choice, CustomToolChoice):
        raise UnsupportedFieldError(
            "tool_choice of type 'custom' is not supported; declare a function and name that",
            param="tool_choice",
        )


def parse_head(body: bytes) -> RequestHead:
    """Decode only what routing needs; raises as `decode_body` does."""
    return decode_body(_head_decoder, body)


class TopLogprob(msgspec.Struct, kw_only=True, frozen=True):
    """A likely token at one position. `bytes` is its UTF-8."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(msgspec.Struct, kw_only=True, frozen=True):
    """The chosen token at one position and its likeliest rivals."""

    token: str
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: list[TopLogprob] = []


class ChoiceLogprobs(msgspec.Struct, kw_only=True, frozen=True):
    """Log probabilities of a choice, one entry per token."""

    content: list[TokenLogprob] | None = None


class PromptTokensDetails(msgspec.Struct, kw_only=True, frozen=True):
    """Part of `Usage`."""

    cached_tokens: int | None = 0


class CompletionTokensDetails(msgspec.Struct, kw_only=True, frozen=True):
    """Part of `Usage`."""

    reasoning_tokens: int | None = 0


class Usage(msgspec.Struct, kw_only=True, frozen=True):
    """Tokens in and out."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails | None = PromptTokensDetails()
    completion_tokens_details: CompletionTokensDetails | None = CompletionTokensDetails()


class AssistantMessage(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """The answer; `content` is null when there are only tool calls."""

    role: str = kept("assistant")
    content: str | None = kept(None)
    reasoning_content: str | None = None
    reasoning: str | None = None  # other engines' name of the field above; never sent
    tool_calls: list[ToolCall] | None = None


class Choice(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """One answer of a completion."""

    index: int = kept(0)
    message: AssistantMessage
    finish_reason: str | None = kept(None)
    # The stop string that ended it, as other engines say it too; theirs may be a token's id.
    stop_reason: str | int | None = None
    logprobs: ChoiceLogprobs | None = None


class ChatCompletion(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """Answer of a chat request that does not stream."""

    id: str
    object: str = kept("chat.completion")
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class FunctionDelta(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """Part of a `ToolCallDelta`; `arguments` is a piece of JSON text."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """A piece of a tool call; the first one of an index carries id, type and name."""

    index: int = kept(0)
    id: str | None = None
    type: str | None = None
    function: FunctionDelta | None = None


class Delta(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """What a chunk adds to the answer."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # other engines' name of the field above; never sent
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """One choice of a chunk; `delta` and `finish_reason` are always sent."""

    index: int = kept(0)
    delta: Delta = kept(Delta())
    finish_reason: str | None = kept(None)
    stop_reason: str | None = None  # the stop string that ended it; an extension others have too
    logprobs: ChoiceLogprobs | None = None


class ChatCompletionChunk(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """One event of a stream; `choices` is empty in the usage chunk."""

    id: str = kept("")
    object: str = kept("chat.completion.chunk")
    created: int = kept(0)
    model: str = kept("")
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ModelLocation(msgspec.Struct, kw_only=True, frozen=True):
    """Where a model is, or is on its way."""

    node: str
    status: str
    vram_estimate_mb: int | None = None


class ModelCard(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """One entry of `/v1/models`; what is unknown is left out."""

    id: str
    object: str = kept("model")
    created: int = kept(0)
    owned_by: str = kept("cortex")
    loaded: bool = kept(False)
    status: str | None = None
    feasible_on: list[str] = msgspec.field(default_factory=_empty_list)
    locations: list[ModelLocation] = msgspec.field(default_factory=_empty_list)
    capabilities: list[str] = msgspec.field(default_factory=_empty_list)
    limit: Limit | None = None
    cost: Cost | None = None
    tool_call: bool | None = None
    reasoning: bool | None = None
    max_model_len: int | None = None
    max_input_tokens: int | None = None
    max_output_tokens: int | None = None


class ModelList(msgspec.Struct, kw_only=True, frozen=True):
    """`/v1/models`."""

    object: str = "list"
    data: list[ModelCard] = []


class ErrorObject(msgspec.Struct, kw_only=True, frozen=True):
    """What stands under `error`. Other engines send numbers as `code`; extras are kept aside."""

    message: str = ""
    type: str | None = None
    code: str | int | None = None
    param: str | None = None


class ErrorBody(msgspec.Struct, kw_only=True, frozen=True):
    """The error envelope."""

    error: ErrorObject


_encoder = msgspec.json.Encoder()
_usage_decoder = msgspec.json.Decoder(Usage)
_ERROR_FIELDS = frozenset(["message", "type", "code", "param"])


def error_body(exc: CortexError) -> bytes:
    """Return `{"error": {...}}` of one error, its extras inside."""
    error = {"message": exc.message, "type": exc.kind, "code": exc.code, "param": exc.param}
    extras = {k: v for k, v in exc.extras.items() if k not in _ERROR_FIELDS}
    return _encoder.encode({"error": error | extras})


def parse_error(status: int, body: bytes, *, retry_after_s: float | None = None) -> RemoteError:
    """Return the error that another server's non-2xx answer stands for, extras included.

    A body without the envelope gives an error that quotes its first 200 characters.
    """
    try:
        envelope = msgspec.json.decode(body)
        raw = envelope["error"]
        error = msgspec.convert(raw, ErrorObject)
    except (msgspec.DecodeError, RecursionError, UnicodeError, KeyError, TypeError):
        text = body[:800].decode("utf-8", "replace").strip()[:200]
        return RemoteError(
            f"status {status}: {text}" if text else f"status {status} without a message",
            status=status,
            code=NO_ENVELOPE,
            retry_after_s=retry_after_s,
        )
    return RemoteError(
        error.message or f"status {status} without a message",
        status=status,
        code=str(error.code) if error.code is not None else NO_ENVELOPE,
        kind=error.type or "api_error",
        param=error.param,
        retry_after_s=retry_after_s,
        extras={k: v for k, v in raw.items() if k not in _ERROR_FIELDS},
    )


def sse_event(data: msgspec.Struct | bytes) -> bytes:
    """Return one server-sent event with `data` (JSON bytes, or a struct to encode)."""
    body = data if isinstance(data, bytes) else _encoder.encode(data)
    return b"data: " + body + b"\n\n"


def usage_comment(usage: Usage) -> bytes:
    """Return the comment in which a neuron tells its gateway the usage of a stream.

    It comes with the first chunk and before the end, whether the caller asked for usage or not;
    to clients it is a comment like any other.
    """
    return USAGE_COMMENT + _encoder.encode(usage) + b"\n\n"


def read_usage_comment(line: bytes) -> Usage | None:
    """Return what a usage comment says; None for any other line, or a damaged one."""
    if not line.startswith(USAGE_COMMENT):
        return None
    try:
        return _usage_decoder.decode(line[len(USAGE_COMMENT) :])
    except msgspec.DecodeError:
        return None


def error_event(exc: CortexError) -> bytes:
    """Return the event that ends a stream which failed after its first byte."""
    return sse_event(error_body(exc))
