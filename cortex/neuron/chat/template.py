"""A checkpoint's chat template: messages and tools to the prompt's text."""

import hashlib
import json  # noqa: TID251 - models are trained on json.dumps' exact spacing
import re
import string
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import msgspec

from cortex.core.errors import (
    BadRequestError,
    CheckpointError,
    TemplateRenderError,
    UnsupportedFieldError,
)
from cortex.core.neuron_api import ToolFormat
from cortex.core.openai import (
    ImagePart,
    Message,
    Part,
    RefusalPart,
    TextPart,
    Tool,
    ToolCall,
)
from cortex.neuron.chat.formats import (
    CALL_ID,
    ThinkMarkers,
    think_markers_of,
    tool_format_of,
)
from cortex.neuron.chat.sandbox import Clock, Sandbox, budget

MAX_TEMPLATE_CHARS = 1 << 20
MAX_PROMPT_CHARS = 16 << 20

_TOOLS = re.compile(r"\btools\b")
# A template that refuses a turn with other than one call.
_ONE_CALL = re.compile(r"tool_calls\s*\|\s*length\s*(?:!=\s*1|==\s*1|>\s*1)\b")
# A template that refuses a call whose id has another length.
_SHORT_IDS = re.compile(r"\bid\s*(?:\|\s*length|\.__len__\(\))\s*(?:!=|==)\s*9\b")
_SHORT_ID_CHARS = 9
_ALNUM = string.ascii_letters + string.digits
_RESERVED = frozenset(["messages", "tools"])
_PART_NAMES = {"ImagePart": "images", "AudioPart": "sound", "FilePart": "files"}

_PROBE = "probe of a template"
_PROBE_PART = {"type": "text", "text": _PROBE}
# How parts and objects look that a template prints without reading them.
_UNREAD = re.compile(r"['\"](?:type|probe)['\"]: ['\"]")
_UNREAD_OBJECT = "{'probe': 'a'}"

Now = Callable[[], datetime]


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The `tojson` of chat templates: unlike jinja2's own it escapes nothing for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _environment(now: Now) -> Sandbox:
    environment = Sandbox()
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: now().strftime(layout)
    return environment


class ChatTemplate:
    """A compiled chat template and what its source tells about the model.

    Args:
        takes_images: whether the model has eyes; its template is then shown where images stand.

    Attributes:
        takes_tools: it renders `tools`.
        tool_format: how the model writes calls; None where the source does not say.
        has_call_ids: the model writes an id into each of its calls.
        is_single_call: a turn may hold one call only.
        supports_thinking: it knows thoughts, which stand between `think`'s markers.
    """

    def __init__(
        self,
        source: str,
        *,
        model_id: str,
        bos_token: str = "",
        eos_token: str = "",
        takes_images: bool = False,
        now: Now = datetime.now,
        clock: Clock = time.monotonic,
    ) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise CheckpointError(
                f"the chat template of {model_id!r} is over {MAX_TEMPLATE_CHARS} characters"
            )
        try:
            self._template = _environment(now).template(source)
        except (jinja2.TemplateError, RecursionError) as exc:
            raise CheckpointError(f"the chat template of {model_id!r} is not valid: {exc}") from exc
        self._clock = clock
        self._model_id = model_id
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self.think: ThinkMarkers = think_markers_of(source)
        self.supports_thinking = self.think.opening in source or "enable_thinking" in source
        self.takes_tools = bool(_TOOLS.search(source))
        self.tool_format: ToolFormat | None = tool_format_of(source)
        self.has_call_ids = CALL_ID in source
        self.is_single_call = bool(_ONE_CALL.search(source))
        self._short_ids = bool(_SHORT_IDS.search(source))
        self._wants_parts = self._takes_parts = False
        self._takes_objects = True
        self._find_forms()
        self._takes_images = takes_images and self._takes_parts

    def _find_forms(self) -> None:
        """Try in which forms the template takes contents, and arguments of calls."""
        takes_text = _PROBE in self._try(_PROBE)
        parts = self._try([_PROBE_PART])
        self._takes_parts = _PROBE in parts and not _UNREAD.search(parts)
        self._wants_parts = self._takes_parts and not takes_text
        content = [_PROBE_PART] if self._wants_parts else _PROBE
        # An object that is neither walked over nor made JSON shows as Python writes it.
        as_object = self._try(content, {"probe": "a"})
        if not as_object or _UNREAD_OBJECT in as_object:
            self._takes_objects = not self._try(content, '{"probe": "a"}')

    def _try(self, content: str | list[dict[str, str]], arguments: Any = None) -> str:
        """Return what becomes of a question, and of a call if there are arguments; or nothing."""
        turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if arguments is not None:
            function = {"name": "a", "arguments": arguments}
            call = {"id": "a" * _SHORT_ID_CHARS, "type": "function", "function": function}
            turns.append({"role": "assistant", "content": "", "tool_calls": [call]})
        try:
            return self._generate(turns, self._context(None, {}, add_generation_prompt=False))
        except BadRequestError:
            return ""

    def render(
        self,
        messages: list[Message],
        tools: list[Tool] | None = None,
        *,
        template_kwargs: dict[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the prompt's text.

        Args:
            template_kwargs: further names the template may read, such as `enable_thinking`.

        Raises:
            UnsupportedFieldError: the messages carry what the model cannot read, or tools are
                given to a template that has no place for them.
            TemplateRenderError: the template refused the messages, or takes too long over
                them; quotes why.
            BadRequestError: the prompt is over `MAX_PROMPT_CHARS` characters.
        """
        if tools and not self.takes_tools:
            raise UnsupportedFieldError(
                f"model {self._model_id!r} cannot use tools: its chat template has no place for "
                "them; leave `tools` out or choose another model",
                param="tools",
            )
        kwargs = dict(template_kwargs or {})
        taken = sorted(_RESERVED & kwargs.keys())
        if taken:
            raise BadRequestError(
                f"chat_template_kwargs must not set {taken[0]!r}", param="chat_template_kwargs"
            )
        turns = [self._turn(at, message) for at, message in enumerate(messages)]
        context = self._context(tools, kwargs, add_generation_prompt=add_generation_prompt)
        try:
            return self._generate(turns, context)
        except TemplateRenderError:
            folded = _fold_neighbours(turns)
            if folded is None:
                raise
            return self._generate(folded, context)

    def _context(
        self, tools: list[Tool] | None, kwargs: dict[str, Any], *, add_generation_prompt: bool
    ) -> dict[str, Any]:
        return {
            **self._tokens,
            "tools": [_plain_tool(tool) for tool in tools] if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **kwargs,
        }

    def _generate(self, turns: list[dict[str, Any]], context: dict[str, Any]) -> str:
        pieces: list[str] = []
        size = 0
        try:
            limits = budget(self._clock)
            for piece in self._template.generate(messages=turns, **context, **limits):
                size += len(piece)
                if size > MAX_PROMPT_CHARS:
                    raise BadRequestError(
                        f"the prompt is over {MAX_PROMPT_CHARS} characters; shorten the messages",
                        param="messages",
                    )
                pieces.append(piece)
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as exc:
            raise TemplateRenderError(
                f"the chat template of {self._model_id!r} refused the messages: {exc}",
                param="messages",
            ) from exc
        return "".join(pieces)

    def _turn(self, at: int, message: Message) -> dict[str, Any]:
        """Return a message as the dict that templates expect."""
        turn: dict[str, Any] = {"role": _ROLES.get(message.role, message.role)}
        turn["content"] = self._content(at, message)
        if message.name is not None:
            turn["name"] = message.name
        if message.thinking is not None:
            turn["reasoning_content"] = message.thinking
        if message.tool_calls:
            turn["tool_calls"] = [self._call(call) for call in message.tool_calls]
        if message.tool_call_id is not None:
            turn["tool_call_id"] = self._call_id(message.tool_call_id)
        return turn

    def _call(self, call: ToolCall) -> dict[str, Any]:
        plain: dict[str, Any] = {} if call.id is None else {"id": self._call_id(call.id)}
        arguments = _arguments(call) if self._takes_objects else _arguments_text(call)
        function = {"name": call.function.name, "arguments": arguments}
        return plain | {"type": "function", "function": function}

    def _call_id(self, call_id: str) -> str:
        """Return an id as the template takes it: it may come from another model."""
        is_short = len(call_id) == _SHORT_ID_CHARS and call_id.isascii() and call_id.isalnum()
        return call_id if is_short or not self._short_ids else _short_id(call_id)

    def _content(self, at: int, message: Message) -> str | list[dict[str, str]]:
        if message.content is None or isinstance(message.content, str):
            text = message.content or ""
            return _text_parts(text) if self._wants_parts and text else text
        if self._takes_parts:
            return [self._plain_part(at, i, part) for i, part in enumerate(message.content)]
        return "\n".join(self._part_text(at, i, part) for i, part in enumerate(message.content))

    def _plain_part(self, at: int, part_at: int, part: Part) -> dict[str, str]:
        if self._takes_images and isinstance(part, ImagePart):
            return {"type": "image"}
        return {"type": "text", "text": self._part_text(at, part_at, part)}

    def _part_text(self, at: int, part_at: int, part: Part) -> str:
        if isinstance(part, TextPart):
            return part.text
        if isinstance(part, RefusalPart):
            return part.refusal
        kind = _PART_NAMES[type(part).__name__]
        raise UnsupportedFieldError(
            f"model {self._model_id!r} cannot take {kind}; "
            "remove that part or choose another model",
            param=f"messages[{at}].content[{part_at}]",
        )


_ROLES = {"developer": "system", "function": "tool"}


def _plain_tool(tool: Tool) -> dict[str, Any]:
    """A tool in the key order that models are trained on, without what is not for them."""
    assert tool.function is not None
    function: dict[str, Any] = {"name": tool.function.name}
    if tool.function.description is not None:
        function["description"] = tool.function.description
    if tool.function.parameters is not None:
        function["parameters"] = tool.function.parameters
    return {"type": "function", "function": function}


def _arguments(call: ToolCall) -> Any:
    """A call's arguments as an object: templates walk over their items."""
    arguments: Any = call.function.arguments
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    if not isinstance(arguments, str):
        return arguments
    try:
        return msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        # What the model once wrote need not be JSON; the template decides about the text.
        return arguments


def _arguments_text(call: ToolCall) -> str:
    """A call's arguments as JSON text: some templates put it into the prompt as it is."""
    arguments = call.function.arguments
    if isinstance(arguments, str):
        return arguments if arguments.strip() else "{}"
    return _to_json(arguments or {})


def _short_id(call_id: str) -> str:
    """Return an id of few characters that stands for another one, always the same."""
    number = int.from_bytes(hashlib.blake2b(call_id.encode(), digest_size=16).digest(), "big")
    return "".join(
        _ALNUM[number // len(_ALNUM) ** at % len(_ALNUM)] for at in range(_SHORT_ID_CHARS)
    )


def _fold_neighbours(turns: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Join turns of one role that follow each other, or return None where there are none.

    Templates that want one system turn, or users and assistants in turn, refuse them apart.
    """
    folded: list[dict[str, Any]] = []
    for turn in turns:
        if folded and _may_join(folded[-1], turn):
            content = _joined(folded[-1]["content"], turn["content"])
            folded[-1] = {**folded[-1], "content": content}
        else:
            folded.append(turn)
    return folded if len(folded) < len(turns) else None


def _may_join(first: dict[str, Any], second: dict[str, Any]) -> bool:
    plain = {"role", "content"}
    is_plain = first.keys() <= plain and second.keys() <= plain
    return is_plain and first["role"] == second["role"]


def _joined(
    first: str | list[dict[str, str]], second: str | list[dict[str, str]]
) -> str | list[dict[str, str]]:
    if isinstance(first, str) and isinstance(second, str):
        return "\n\n".join(text for text in (first, second) if text)
    parts = [_text_parts(content) for content in (first, second)]
    return [*parts[0], *_text_parts("\n\n"), *parts[1]]


def _text_parts(content: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
