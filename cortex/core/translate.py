"""Between the Anthropic and the OpenAI dialect: requests one way, answers and streams back.

Pure: no clock, no I/O. Nothing is added to a prompt; one thing is taken away on request, the
billing line that Claude Code puts first in its system text and that changes with every turn.
"""

import binascii
import uuid
from base64 import b64decode
from typing import Any

import msgspec

from cortex.core import anthropic
from cortex.core.anthropic import (
    Block,
    Conversation,
    MessageResponse,
    MessagesRequest,
    Source,
)
from cortex.core.errors import BadRequestError, UnsupportedFieldError, UpstreamMalformedError
from cortex.core.openai import (
    ChatCompletion,
    ChatRequest,
    FunctionCall,
    FunctionDef,
    ImagePart,
    JsonSchemaFormat,
    Message,
    Part,
    ResponseFormat,
    StreamOptions,
    TextPart,
    Tool,
    ToolCall,
    Usage,
)
from cortex.core.tool_choice import FunctionName, NamedToolChoice

BILLING_PREFIX = "x-anthropic-billing-header"
# Thinking blocks must carry a signature to be sent back. Nothing here is encrypted, so there is
# nothing to verify: the value only says where the block is from.
SIGNATURE = "Y29ydGV4"

# Blocks that may say nothing to a model here: the vendor's tools, hidden thoughts, found nothing.
_SILENT_TYPES = frozenset(
    [
        "text",
        "thinking",
        "redacted_thinking",
        "search_result",
        "server_tool_use",
        "container_upload",
        "tool_reference",
    ]
)

# Their only use is to find tools that are not in the prompt; here all of them are.
_TOOL_SEARCH = "tool_search_tool"
# Templates know three words; the dialect has more above them.
_EFFORTS = {"xhigh": "high", "max": "high"}

_STOP_REASONS = {"length": "max_tokens", "content_filter": "refusal"}


def to_openai(request: Conversation, *, drop_billing_header: bool = True) -> ChatRequest:
    """Return the OpenAI request that means the same.

    Raises:
        BadRequestError: the request has no equal in that dialect.
    """
    _refuse_unsupported(request)
    messages = _messages(request, drop_billing_header)
    tools = _tools(request)
    choice, parallel = _tool_choice(request, tools)
    try:
        chat = ChatRequest(
            model=request.model,
            messages=messages,
            tools=tools or None,
            tool_choice=choice,
            parallel_tool_calls=parallel,
            chat_template_kwargs=_template_kwargs(request),
            thinking_budget=_thinking_budget(request),
        )
    except ValueError as exc:
        raise BadRequestError(str(exc)) from exc
    if not isinstance(request, MessagesRequest):
        return chat
    return msgspec.structs.replace(
        chat,
        stream=bool(request.stream),
        stream_options=StreamOptions(include_usage=True) if request.stream else None,
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        stop=request.stop_sequences,
        response_format=_response_format(request),
        user=request.metadata.user_id if request.metadata else None,
    )


def _refuse_unsupported(request: Conversation) -> None:
    if request.mcp_servers:
        raise UnsupportedFieldError(
            "mcp_servers: no MCP server is called from here; connect to it yourself and declare "
            "its tools in tools",
            param="mcp_servers",
        )
    if request.container is not None:
        raise UnsupportedFieldError(
            "container: there are no containers to run code in here; leave it out",
            param="container",
        )


def _response_format(request: MessagesRequest) -> ResponseFormat | None:
    wanted = request.output_config.format if request.output_config else None
    wanted = wanted or request.output_format
    if wanted is None or wanted.type != "json_schema":
        return None
    schema = JsonSchemaFormat(name="answer", schema=wanted.schema)
    return ResponseFormat(type="json_schema", json_schema=schema)


def _messages(request: Conversation, drop_billing_header: bool) -> list[Message]:
    """All system text in one leading message, then the turns."""
    system = [_system_text(request.system, drop_billing_header, "system")]
    turns: list[Message] = []
    for index, turn in enumerate(request.messages):
        place = f"messages[{index}].content"
        if turn.role == "system":
            system.append(_system_text(turn.content, drop_billing_header, place))
        elif isinstance(turn.content, str):
            turns.append(Message(role=turn.role, content=turn.content))
        elif turn.role == "assistant":
            turns.append(_assistant_message(turn.content))
        else:
            turns += _user_messages(turn.content, place)
    text = "\n\n".join(part for part in system if part)
    return [Message(role="system", content=text), *turns] if text else turns


def _system_text(system: str | list[Block] | None, drop_billing_header: bool, place: str) -> str:
    if system is None:
        return ""
    if isinstance(system, str):
        texts = [system]
    else:
        texts = [_text_of(block, f"{place}[{index}]") for index, block in enumerate(system)]
    if drop_billing_header:
        texts = [_without_billing(text) for text in texts]
    return "\n".join(text for text in texts if text)


def _text_of(block: Block, place: str) -> str:
    if block.text is None:
        raise BadRequestError(
            f"{place}: system text is made of blocks of type 'text', not '{block.type[:64]}'",
            param=place,
        )
    return block.text


def _without_billing(text: str) -> str:
    if not text.startswith(BILLING_PREFIX):
        return text
    return text.partition("\n")[2]


def _assistant_message(blocks: list[Block]) -> Message:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for index, block in enumerate(blocks):
        if block.type == "text":
            texts.append(block.text or "")
        elif block.type == "thinking":
            thoughts.append(block.thinking or "")
        elif block.type == "tool_use":
            if not block.name:
                raise BadRequestError("a tool_use block needs a name", param=f"content[{index}]")
            arguments = msgspec.json.encode(block.input or {}).decode()
            calls.append(
                ToolCall(id=block.id, function=FunctionCall(name=block.name, arguments=arguments))
            )
    return Message(
        role="assistant",
        content="".join(texts) if texts or not calls else None,
        reasoning_content="".join(thoughts) or None,
        tool_calls=calls or None,
    )


def _user_messages(blocks: list[Block], place: str) -> list[Message]:
    """Tool results first, each a message of its own, then the rest of the turn as one."""
    results: list[Message] = []
    parts: list[Part] = []
    for index, block in enumerate(blocks):
        if block.type == "tool_result":
            message, images = _tool_message(block, f"{place}[{index}]")
            results.append(message)
            parts += images
        else:
            parts += _user_parts(block, f"{place}[{index}]")
    if not parts:
        return results or [Message(role="user", content="")]
    if all(isinstance(part, TextPart) for part in parts):
        text = "\n".join(part.text for part in parts if isinstance(part, TextPart))
        return [*results, Message(role="user", content=text)]
    return [*results, Message(role="user", content=parts)]


def _tool_message(block: Block, place: str) -> tuple[Message, list[Part]]:
    """Return a tool result's message, and the images in it, which go into the user's turn."""
    if not block.tool_use_id:
        raise BadRequestError("a tool_result block needs a tool_use_id", param="tool_use_id")
    inner = _content_parts(block.content, f"{place}.content")
    text = "\n".join(part.text for part in inner if isinstance(part, TextPart))
    images: list[Part] = [part for part in inner if not isinstance(part, TextPart)]
    if block.is_error:
        text = f"Error: {text}" if text else "Error"
    return Message(role="tool", tool_call_id=block.tool_use_id, content=text), images


def _user_parts(block: Block, place: str) -> list[Part]:
    """Return a block's content; a type that is not known counts by its text.

    Raises:
        BadRequestError: something is missing, or all that the block says would be lost.
    """
    if block.type == "image":
        return [_image_part(block.source, place)]
    if block.type == "document" and isinstance(block.source, Source):
        return _document_parts(block, block.source, place)
    if block.text is not None:
        return [TextPart(text=block.text)] if block.text else []
    if _is_silent(block.type):
        # What the vendor's tools found is of types of their own; what has a text is taken.
        inner = block.content if isinstance(block.content, list) else []
        return [TextPart(text=each.text) for each in inner if each.text]
    parts = _content_parts(block.content, f"{place}.content")
    if not parts:
        raise BadRequestError(
            f"{place}: a block of type '{block.type[:64]}' is not known here and has no text; a "
            "user turn is made of text, image (with a source), document and tool_result",
            param=place,
        )
    return parts


def _is_silent(block_type: str) -> bool:
    return (
        block_type in _SILENT_TYPES
        or block_type.startswith("mcp_")
        or block_type.endswith("_tool_result")
    )


def _content_parts(content: str | list[Block] | dict[str, Any] | None, place: str) -> list[Part]:
    if isinstance(content, str):
        return [TextPart(text=content)] if content else []
    if isinstance(content, list):
        return [
            part
            for index, each in enumerate(content)
            for part in _user_parts(each, f"{place}[{index}]")
        ]
    return []


def _image_part(source: Source | str | None, place: str) -> ImagePart:
    if not isinstance(source, Source) or not (source.url or source.data):
        raise BadRequestError(
            f"{place}: an image needs a source with base64 data or a url; stored files are not "
            "available",
            param=f"{place}.source",
        )
    # Of a type that is not told, the data themselves tell.
    url = source.url or f"data:{source.media_type or ''};base64,{source.data}"
    return ImagePart(image_url={"url": url})


def _document_parts(block: Block, source: Source, place: str) -> list[Part]:
    """Return a document's text under its title and context.

    Raises:
        UnsupportedFieldError: it is no text.
    """
    if source.type == "text":
        parts = _content_parts(source.data, f"{place}.source.data")
    elif source.type == "content":
        parts = _content_parts(source.content, f"{place}.source.content")
    elif source.type == "base64" and (source.media_type or "").startswith("text/"):
        parts = _content_parts(_decoded(source.data or "", place), f"{place}.source.data")
    else:
        raise UnsupportedFieldError(
            f"{place}: a document cannot be read from a source of type '{source.type[:64]}'"
            f"{f' and {source.media_type[:64]}' if source.media_type else ''} here; send its text, "
            "as a source of type 'text' or 'content'",
            param=f"{place}.source",
        )
    heads = [TextPart(text=head) for head in (block.title, block.context) if head]
    return [*heads, *parts]


def _decoded(data: str, place: str) -> str:
    try:
        return b64decode(data, validate=True).decode()
    except (binascii.Error, ValueError) as exc:
        raise BadRequestError(
            f"{place}: the data of the document is not text in UTF-8 and base64",
            param=f"{place}.source.data",
        ) from exc


def _tools(request: Conversation) -> list[Tool]:
    """Return the tools as functions.

    Raises:
        UnsupportedFieldError: one is run by the vendor, or known to the vendor's models alone.
    """
    tools: list[Tool] = []
    for index, tool in enumerate(request.tools or []):
        kind = tool.type or "custom"
        if kind.startswith(_TOOL_SEARCH):
            continue
        if tool.name is None or (tool.input_schema is None and kind != "custom"):
            raise UnsupportedFieldError(
                f"tools[{index}]: tools of type '{kind[:64]}' are the vendor's own and not "
                "available here; leave it out, or declare a tool with a name and an input_schema",
                param=f"tools[{index}].type",
            )
        tools.append(
            Tool(
                function=FunctionDef(
                    name=tool.name,
                    description=tool.description,
                    parameters=tool.input_schema or {"type": "object"},
                )
            )
        )
    return tools


def _tool_choice(request: Conversation, tools: list[Tool]) -> tuple[Any, bool | None]:
    """Return `tool_choice` and `parallel_tool_calls`."""
    choice = request.tool_choice
    if choice is not None and choice.type in ("any", "tool") and not tools:
        raise BadRequestError(
            f"tool_choice of type '{choice.type}' needs at least one tool in tools",
            param="tool_choice",
        )
    if choice is None or not tools:
        return None, None
    parallel = False if choice.disable_parallel_tool_use else None
    if choice.type == "tool":
        return NamedToolChoice(function=FunctionName(name=choice.name or "")), parallel
    return {"auto": "auto", "any": "required", "none": "none"}[choice.type], parallel


def _wants_thinking(request: Conversation) -> bool:
    return request.thinking is not None and request.thinking.type in ("enabled", "adaptive")


def _thinking_budget(request: Conversation) -> int | None:
    if request.thinking is None or not _wants_thinking(request):
        return None
    return request.thinking.budget_tokens


def _template_kwargs(request: Conversation) -> dict[str, Any]:
    """Return what the model's template is told; it reads of this what it knows."""
    kwargs: dict[str, Any] = {"enable_thinking": _wants_thinking(request)}
    budget = _thinking_budget(request)
    if budget is not None:
        kwargs["thinking_budget"] = budget
    effort = request.output_config.effort if request.output_config else None
    if effort is not None:
        kwargs["reasoning_effort"] = _EFFORTS.get(effort, effort)
    return kwargs


def from_openai(completion: ChatCompletion, model: str) -> MessageResponse:
    """Return a whole answer as a message.

    Args:
        model: the name the caller asked for.

    Raises:
        UpstreamMalformedError: the answer has no choice.
    """
    if not completion.choices:
        raise UpstreamMalformedError("the answer has no choices")
    choice = completion.choices[0]
    message = choice.message
    content: list[Any] = []
    # Other engines put the id of a stop token into the same field.
    stop_string = choice.stop_reason if isinstance(choice.stop_reason, str) else None
    thought = message.reasoning_content or message.reasoning
    if thought:
        content.append(anthropic.ThinkingBlock(thinking=thought, signature=SIGNATURE))
    if message.content:
        content.append(anthropic.TextBlock(text=message.content))
    content += [
        anthropic.ToolUseBlock(
            id=call.id or new_tool_id(),
            name=call.function.name,
            input=_tool_input(call.function.arguments),
        )
        for call in message.tool_calls or []
    ]
    return MessageResponse(
        id=message_id(completion.id),
        model=model,
        content=content,
        stop_reason=stop_reason(
            choice.finish_reason, stop_string, has_calls=bool(message.tool_calls)
        ),
        stop_sequence=stop_string,
        usage=usage_of(completion.usage),
    )


def message_id(completion_id: str) -> str:
    """Return the id of the message that a completion becomes."""
    return "msg_" + (completion_id.removeprefix("chatcmpl-") or uuid.uuid4().hex)


def stop_reason(finish_reason: str | None, stop_string: str | None, *, has_calls: bool) -> str:
    """Return the dialect's word for why an answer ended.

    What was called counts more than the source's word: a forced call ends with `stop` there.
    """
    if stop_string is not None:
        return "stop_sequence"
    return _STOP_REASONS.get(finish_reason or "", "tool_use" if has_calls else "end_turn")


def usage_of(usage: Usage | None) -> anthropic.Usage:
    """Return token counts in the dialect's split of fresh and cached input."""
    if usage is None:
        return anthropic.Usage()
    details = usage.prompt_tokens_details
    cached = (details.cached_tokens or 0) if details is not None else 0
    cached = min(cached, usage.prompt_tokens)
    return anthropic.Usage(
        input_tokens=usage.prompt_tokens - cached,
        output_tokens=usage.completion_tokens,
        cache_read_input_tokens=cached,
    )


def new_tool_id() -> str:
    """Return an id for a call that came without one."""
    return f"toolu_{uuid.uuid4().hex[:24]}"


def _tool_input(arguments: str | dict[str, Any] | None) -> dict[str, Any]:
    """Return a call's arguments as an object; text that is none is kept under a key of its own."""
    if isinstance(arguments, dict):
        return arguments
    if not arguments:
        return {}
    try:
        value = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        return {"arguments": arguments}
    return value if isinstance(value, dict) else {"arguments": value}
