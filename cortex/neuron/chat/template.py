"""A checkpoint's chat template: messages and tools to the prompt's text."""

import json  # noqa: TID251 - models are trained on json.dumps' exact spacing
import re
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import msgspec

from cortex.core.errors import (
    BadRequestError,
    CheckpointError,
    TemplateRenderError,
    UnsupportedFieldError,
)
from cortex.core.openai import (
    Message,
    Part,
    RefusalPart,
    TextPart,
    Tool,
    ToolCall,
)
from cortex.neuron.chat.sandbox import Clock, Sandbox, budget
from cortex.neuron.models.gguf_file import GgufValue
from cortex.neuron.models.hf_files import read_json

MAX_TEMPLATE_CHARS = 1 << 20
MAX_PROMPT_CHARS = 16 << 20

# A loop over a message's content: the template reads parts itself.
_READS_PARTS = re.compile(
    r"\bin\s+\w+(?:\.content\b|\[\s*['\"]content['\"]\s*\])|\bcontent\s+is\s+(?:string|iterable)"
)
_TESTS_STRING = re.compile(r"\bis\s+string\b")
_TOOLS = re.compile(r"\btools\b")
_RESERVED = frozenset(["messages", "tools"])
_PART_NAMES = {"ImagePart": "images", "AudioPart": "sound", "FilePart": "files"}

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

    Attributes:
        supports_tools: it renders `tools` and knows `<tool_call>` blocks.
        supports_thinking: it knows `<think>` blocks.
        writes_xml_calls: calls are `<function=..>` blocks; otherwise JSON objects.
    """

    def __init__(
        self,
        source: str,
        *,
        model_id: str,
        bos_token: str = "",
        eos_token: str = "",
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
        self.supports_thinking = "<think>" in source or "enable_thinking" in source
        self.writes_xml_calls = "<function=" in source
        self.supports_tools = bool(_TOOLS.search(source)) and "<tool_call>" in source
        reads_parts = bool(_READS_PARTS.search(source))
        self._wants_parts = reads_parts and not _TESTS_STRING.search(source)
        self._takes_parts = reads_parts

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
        if tools and not self.supports_tools:
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
        context: dict[str, Any] = {
            **self._tokens,
            "tools": [_plain_tool(tool) for tool in tools] if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **kwargs,
        }
        try:
            return self._generate(turns, context)
        except TemplateRenderError:
            folded = _fold_leading_system(turns)
            if folded is None:
                raise
            return self._generate(folded, context)

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
            turn["tool_calls"] = [_plain_call(call) for call in message.tool_calls]
        if message.tool_call_id is not None:
            turn["tool_call_id"] = message.tool_call_id
        return turn

    def _content(self, at: int, message: Message) -> str | list[dict[str, str]]:
        if message.content is None or isinstance(message.content, str):
            text = message.content or ""
            return [{"type": "text", "text": text}] if self._wants_parts and text else text
        texts = [self._part_text(at, i, part) for i, part in enumerate(message.content)]
        if self._takes_parts:
            return [{"type": "text", "text": text} for text in texts]
        return "\n".join(texts)

    def _part_text(self, at: int, part_at: int, part: Part) -> str:
        if isinstance(part, TextPart):
            return part.text
        if isinstance(part, RefusalPart):
            return part.refusal
        kind = _PART_NAMES[type(part).__name__]
        raise UnsupportedFieldError(
            f"model {self._model_id!r} reads text only and cannot take {kind}; "
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


def _plain_call(call: ToolCall) -> dict[str, Any]:
    """A call with its arguments as an object: templates walk over their items."""
    arguments: Any = call.function.arguments
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    elif isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments)
        except (msgspec.DecodeError, RecursionError):
            # What the model once wrote need not be JSON; the template decides about the text.
            arguments = call.function.arguments
    plain: dict[str, Any] = {"id": call.id} if call.id is not None else {}
    plain |= {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}
    return plain


def _joined(content: str | list[dict[str, str]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content)


def _fold_leading_system(turns: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Join several leading system turns into one, or return None where there is nothing to join.

    Templates that allow one system turn, at the beginning, refuse a second one.
    """
    lead = 0
    while lead < len(turns) and turns[lead]["role"] == "system":
        lead += 1
    if lead < 2:
        return None
    text = "\n\n".join(_joined(turn["content"]) for turn in turns[:lead])
    return [{"role": "system", "content": text}, *turns[lead:]]


class _NamedTemplate(msgspec.Struct, kw_only=True, frozen=True):
    name: str
    template: str


class _TemplateConfig(msgspec.Struct, kw_only=True, frozen=True):
    chat_template: str | list[_NamedTemplate] | None = None


def template_in_directory(directory: Path) -> str | None:
    """Return the template text of a Hugging Face layout directory, or None where it has none.

    chat_template.jinja goes before tokenizer_config.json's field, which is a text or a list of
    named ones, of which `default` is taken.

    Raises:
        CheckpointError: a file is there and cannot be read.
    """
    own_file = directory / "chat_template.jinja"
    if own_file.exists():
        try:
            return own_file.read_text("utf-8")
        except (OSError, UnicodeError) as exc:
            raise CheckpointError(f"cannot read {own_file}: {exc}") from exc
    config_file = directory / "tokenizer_config.json"
    if not config_file.exists():
        return None
    config = read_json(config_file, _TemplateConfig)
    if not isinstance(config.chat_template, list):
        return config.chat_template
    by_name = {entry.name: entry.template for entry in config.chat_template}
    return by_name.get("default", next(iter(by_name.values()), None))


def template_in_gguf(keys: Mapping[str, GgufValue]) -> str | None:
    """Return the template text in a GGUF file's metadata, or None where it has none."""
    value = keys.get("tokenizer.chat_template")
    return value if isinstance(value, str) and value else None
