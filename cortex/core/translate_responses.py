"""A Responses request as a chat request: items become messages, nothing is added.

Pure: no clock, no I/O. What the model said in one turn are several items there and one message
here, so neighbouring items of the assistant are joined.
"""

import base64
import binascii
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from cortex.core.errors import BadRequestError
from cortex.core.openai import (
    AudioPart,
    ChatRequest,
    FilePart,
    FunctionCall,
    ImagePart,
    JsonSchemaFormat,
    Message,
    Part,
    ResponseFormat,
    StreamOptions,
    TextPart,
    ToolCall,
)
from cortex.core.response_tools import CUSTOM_INPUT, ToolName, ToolSet, tool_set
from cortex.core.responses import Content, Item, ResponsesRequest, ToolParam

# Nothing here is encrypted: the prefix only tells our own from what other services wrote.
_OWN_REASONING = "cortex:"
_TEXT_TYPES = frozenset(["input_text", "output_text", "text", "summary_text", "reasoning_text"])
# What the vendor's own tools did; the answer to it stands in the messages that follow.
_SILENT_TYPES = frozenset(
    [
        "web_search_call",
        "file_search_call",
        "image_generation_call",
        "tool_search_call",
        "tool_search_output",
        "mcp_list_tools",
        "mcp_approval_request",
        "mcp_approval_response",
        "configuration_update",
    ]
)
_SAME_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "stop",
    "chat_template_kwargs",
    "user",
)

_contents = list[Content]


@dataclass(frozen=True, slots=True)
class PlacedItem:
    """An item, and where in the request it stands."""

    item: Item
    place: str


@dataclass(frozen=True, slots=True)
class Translated:
    """A request in the other dialect, and what takes its answer back."""

    chat: ChatRequest
    tools: ToolSet


def placed(items: Iterable[Item], place: str = "input") -> list[PlacedItem]:
    """Return items with their places in a list."""
    return [PlacedItem(item, f"{place}[{at}]") for at, item in enumerate(items)]


def to_chat(request: ResponsesRequest, items: list[PlacedItem]) -> Translated:
    """Return the chat request that means the same.

    Args:
        items: what came before and the request's own input, no item being a mere reference; a
            request whose input is a text has none of its own.

    Raises:
        BadRequestError: the request has no equal in that dialect.
    """
    turns = _Turns()
    if request.instructions:
        turns.add(Message(role="system", content=request.instructions))
    for each in items:
        turns.take(each)
    if isinstance(request.input, str):
        turns.flush()
        turns.add(Message(role="user", content=request.input))
    turns.flush()
    offered = tool_set(request, turns.tools)
    text = request.text.format if request.text else None
    try:
        chat = ChatRequest(
            model=request.model,
            messages=turns.messages,
            stream=bool(request.stream),
            stream_options=StreamOptions(include_usage=True) if request.stream else None,
            max_completion_tokens=request.max_output_tokens,
            tools=offered.tools or None,
            tool_choice=offered.choice,
            parallel_tool_calls=request.parallel_tool_calls if offered.tools else None,
            response_format=None
            if text is None or text.type == "text"
            else ResponseFormat(
                type=text.type,
                json_schema=None
                if text.schema is None
                else JsonSchemaFormat(
                    name=text.name,
                    description=text.description,
                    schema=text.schema,
                    strict=text.strict,
                ),
            ),
            verbosity=request.text.verbosity if request.text else None,
            reasoning_effort=request.reasoning.effort if request.reasoning else None,
            logprobs=True if request.wants_logprobs else None,
            top_logprobs=request.top_logprobs if request.wants_logprobs else None,
            **{name: getattr(request, name) for name in _SAME_FIELDS},
        )
    except ValueError as exc:
        raise BadRequestError(str(exc).replace("messages", "input"), param="input") from exc
    return Translated(chat, offered)


@dataclass(slots=True)
class _Turn:
    """What the assistant said between two turns of others."""

    thoughts: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)

    def message(self) -> Message:
        return Message(
            role="assistant",
            content="".join(self.texts) if self.texts or not self.calls else None,
            reasoning_content="\n".join(self.thoughts) or None,
            tool_calls=self.calls or None,
        )


class _Turns:
    """Messages in the making.

    Attributes:
        tools: those that came among the items.
    """

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.tools: list[ToolParam] = []
        self._turn: _Turn | None = None
        # Of the results of tools: a tool's own message holds text alone.
        self._images: list[Part] = []

    def add(self, message: Message) -> None:
        """Take a message as it is."""
        self.messages.append(message)

    def flush(self) -> None:
        """End what is under way."""
        if self._turn is not None:
            self.messages.append(self._turn.message())
            self._turn = None
        if self._images:
            self.messages.append(Message(role="user", content=self._images))
            self._images = []

    def take(self, each: PlacedItem) -> None:
        """Take the next item."""
        item, place = each.item, each.place
        kind = item.kind
        if kind == "message":
            self._message(item, place)
        elif kind == "reasoning":
            self._thought(item)
        elif kind in ("function_call", "custom_tool_call"):
            self._call(item, place)
        elif kind in ("function_call_output", "custom_tool_call_output"):
            self._output(item, place)
        elif kind == "additional_tools":
            self.tools += item.tools or []
        elif kind not in _SILENT_TYPES:
            raise BadRequestError(
                f"{place}: items of type '{kind[:64]}' are not known here; an input is made of "
                "message, reasoning, function_call, function_call_output, custom_tool_call, "
                "custom_tool_call_output and item_reference",
                param=f"{place}.type",
            )

    def _message(self, item: Item, place: str) -> None:
        if item.content is None:
            raise BadRequestError(f"{place}: a message needs content", param=f"{place}.content")
        parts = _parts(item.content, f"{place}.content")
        if item.role == "assistant":
            turn = self._turn
            if turn is not None and turn.texts and not turn.calls:
                self.flush()
            self._assistant().texts.append(_text(parts))
            return
        if item.role not in ("user", "system", "developer"):
            raise BadRequestError(
                f"{place}: a message's role is user, assistant, system or developer",
                param=f"{place}.role",
            )
        self.flush()
        is_plain = len(parts) < 2 and all(isinstance(part, TextPart) for part in parts)
        content = _text(parts) if is_plain else parts
        self.add(Message(role=item.role, content=content))  # type: ignore[arg-type]  # narrowed

    def _thought(self, item: Item) -> None:
        text = _thought_of(item)
        if not text:
            return
        turn = self._turn
        if turn is not None and turn.texts and not turn.calls:
            self.flush()
        self._assistant().thoughts.append(text)

    def _call(self, item: Item, place: str) -> None:
        if not item.name or not item.call_id:
            raise BadRequestError(f"{place}: a {item.kind} needs name and call_id", param=place)
        if item.kind == "custom_tool_call":
            name = ToolName("custom", item.name, item.namespace)
            arguments = _encode({CUSTOM_INPUT: item.input or ""})
        else:
            name = ToolName("function", item.name, item.namespace)
            told = item.arguments
            arguments = told if isinstance(told, str) else _encode(told or {})
        function = FunctionCall(name=name.chat_name, arguments=arguments)
        self._assistant().calls.append(ToolCall(id=item.call_id, function=function))

    def _output(self, item: Item, place: str) -> None:
        if not item.call_id:
            raise BadRequestError(f"{place}: a {item.kind} needs a call_id", param=place)
        images, self._images = self._images, []
        self.flush()
        parts = _output_parts(item.output, f"{place}.output")
        texts: list[Part] = [part for part in parts if isinstance(part, TextPart)]
        content = "\n".join(part.text for part in texts if isinstance(part, TextPart))
        self.add(Message(role="tool", tool_call_id=item.call_id, content=content))
        self._images = images + [part for part in parts if not isinstance(part, TextPart)]

    def _assistant(self) -> _Turn:
        if self._turn is None:
            self.flush()
            self._turn = _Turn()
        return self._turn


def _parts(content: str | list[Content], place: str) -> list[Part]:
    if isinstance(content, str):
        return [TextPart(text=content)]
    return [_part(each, f"{place}[{at}]") for at, each in enumerate(content)]


def _part(content: Content, place: str) -> Part:
    if content.type == "input_image":
        return _image_part(content, place)
    if content.type == "input_file":
        return FilePart(file={"filename": content.filename, "file_data": content.file_data})
    if content.type == "input_audio":
        return AudioPart(input_audio=content.input_audio)
    text = content.refusal if content.type == "refusal" else content.text
    if text is None:
        known = "needs a text" if content.type in _TEXT_TYPES else "is not known here"
        raise BadRequestError(
            f"{place}: content of type '{content.type[:64]}' {known}", param=f"{place}.type"
        )
    return TextPart(text=text)


def _image_part(content: Content, place: str) -> ImagePart:
    url = content.image_url
    if isinstance(url, str):
        image = {"url": url, "detail": content.detail} if content.detail else {"url": url}
        return ImagePart(image_url=image)
    if isinstance(url, dict):
        return ImagePart(image_url=url)
    raise BadRequestError(
        f"{place}: an image needs an image_url; stored files are not available",
        param=f"{place}.image_url",
    )


def _text(parts: list[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, TextPart))


def _output_parts(output: Any, place: str) -> list[Part]:
    """Return a tool's result; what is neither text nor content goes on as its JSON."""
    if output is None:
        return []
    if isinstance(output, str):
        return [TextPart(text=output)]
    try:
        content = msgspec.convert(output, _contents)
    except msgspec.ValidationError:
        return [TextPart(text=_encode(output))]
    return _parts(content, place)


def _thought_of(item: Item) -> str:
    """Return what a reasoning item holds; what other services encrypted cannot be read."""
    content = item.content if isinstance(item.content, list) else []
    if content:
        return "\n".join(each.text or "" for each in content)
    thought = _read_reasoning(item.encrypted_content)
    if thought is not None:
        return thought
    return "\n".join(each.text or "" for each in item.summary or [])


def pack_reasoning(text: str) -> str:
    """Return reasoning in the form in which a client carries it to the next turn."""
    return _OWN_REASONING + base64.b64encode(text.encode()).decode()


def _read_reasoning(packed: str | None) -> str | None:
    if packed is None or not packed.startswith(_OWN_REASONING):
        return None
    try:
        return base64.b64decode(packed.removeprefix(_OWN_REASONING), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None


def _encode(value: object) -> str:
    return msgspec.json.encode(value).decode()
