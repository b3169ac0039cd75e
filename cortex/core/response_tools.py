"""The tools of a Responses request as functions of a chat request, and the way back by name.

Functions in a namespace are told under one name with it. A custom tool, whose input is plain text,
is told as a function with that text as its one parameter. Of what the vendor runs itself, tools
that a model may as well do without are left out; those that are the point of a request are refused.
"""

from dataclasses import dataclass
from typing import Any, Literal, cast

import msgspec

from cortex.core import tool_choice
from cortex.core.errors import BadRequestError, UnsupportedFieldError
from cortex.core.openai import FunctionDef, Tool
from cortex.core.responses import ResponsesRequest, ToolChoice, ToolParam, parse_tools
from cortex.core.tool_choice import (
    AllowedTool,
    AllowedTools,
    AllowedToolsChoice,
    FunctionName,
    NamedToolChoice,
)

CUSTOM_INPUT = "input"

_REFUSED_TYPES = frozenset(
    [
        "apply_patch",
        "code_interpreter",
        "computer",
        "computer_use",
        "computer_use_preview",
        "file_search",
        "local_shell",
        "mcp",
        "programmatic_tool_calling",
        "shell",
    ]
)
_CUSTOM_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {CUSTOM_INPUT: {"type": "string"}},
    "required": [CUSTOM_INPUT],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class ToolName:
    """What a caller calls a tool."""

    kind: Literal["function", "custom"]
    name: str
    namespace: str | None = None

    @property
    def chat_name(self) -> str:
        """What a model is told instead."""
        if self.namespace is None:
            return self.name
        joint = "" if self.namespace.endswith("__") else "__"
        return f"{self.namespace}{joint}{self.name}"


@dataclass(frozen=True, slots=True)
class ToolSet:
    """The tools that a model is offered.

    Attributes:
        tools: as it is told them.
        names: by the names it is told.
        raws: those of the request's own that are in effect, as they came.
        choice: `tool_choice` of the chat request.
    """

    tools: list[Tool]
    names: dict[str, ToolName]
    raws: list[msgspec.Raw]
    choice: tool_choice.ToolChoice | None


def tool_set(request: ResponsesRequest, further: list[ToolParam]) -> ToolSet:
    """Return what a request offers.

    Args:
        further: tools that came among the items of the input.

    Raises:
        BadRequestError: a tool, or a choice, is not possible here.
    """
    tools: dict[str, Tool] = {}
    names: dict[str, ToolName] = {}
    raws: list[msgspec.Raw] = []
    own = list(zip(parse_tools(request.tools or []), request.tools or [], strict=True))
    for at, (param, raw) in enumerate(own):
        found = _functions(param, f"tools[{at}]")
        if found:
            raws.append(raw)
        _add(found, tools, names, f"tools[{at}].name")
    for param in further:
        # A conversation tells them again and again.
        found = [each for each in _functions(param, "input") if each[0].chat_name not in names]
        _add(found, tools, names, "input")
    choice = request.tool_choice
    if isinstance(choice, ToolChoice) and choice.type == "allowed_tools":
        return ToolSet(list(tools.values()), names, raws, _allowed(choice, names))
    if isinstance(choice, ToolChoice):
        name = _declared(choice, names)
        named = NamedToolChoice(function=FunctionName(name=name))
        return ToolSet(list(tools.values()), names, raws, named)
    return ToolSet(list(tools.values()), names, raws, _mode(choice, tools))


def _functions(param: ToolParam, place: str) -> list[tuple[ToolName, Tool]]:
    """Return what a model is told of one tool: nothing of those that are left out."""
    if param.type == "namespace":
        return [
            (_in_namespace(name, param.name or ""), tool)
            for at, each in enumerate(param.tools or [])
            for name, tool in _functions(each, f"{place}.tools[{at}]")
        ]
    if param.type in _REFUSED_TYPES:
        raise UnsupportedFieldError(
            f"{place}: tools of type '{param.type}' are not available here; declare a function "
            "that does the same, and run it yourself",
            param=f"{place}.type",
        )
    if param.name is None or param.type not in ("function", "custom"):
        return []
    if param.type == "custom":
        function = FunctionDef(
            name=param.name,
            description=_custom_description(param),
            parameters=_CUSTOM_PARAMETERS,
        )
        return [(ToolName("custom", param.name), Tool(function=function))]
    function = FunctionDef(
        name=param.name,
        description=param.description,
        parameters=param.parameters or {"type": "object", "properties": {}},
        strict=param.strict,
    )
    return [(ToolName("function", param.name), Tool(function=function))]


def _custom_description(param: ToolParam) -> str | None:
    """Return a custom tool's description, with the grammar of its input where it has one."""
    grammar = param.format or {}
    if grammar.get("type") != "grammar" or not grammar.get("definition"):
        return param.description
    told = f"The input follows this {grammar.get('syntax', '')} grammar:\n{grammar['definition']}"
    return f"{param.description}\n\n{told}" if param.description else told


def _in_namespace(name: ToolName, namespace: str) -> ToolName:
    inner = namespace if name.namespace is None else f"{namespace}.{name.namespace}"
    return ToolName(name.kind, name.name, inner)


def _add(
    found: list[tuple[ToolName, Tool]],
    tools: dict[str, Tool],
    names: dict[str, ToolName],
    place: str,
) -> None:
    for name, tool in found:
        chat_name = name.chat_name
        if chat_name in names:
            raise BadRequestError(f"tools declares '{chat_name[:64]}' twice", param=place)
        assert tool.function is not None
        function = msgspec.structs.replace(tool.function, name=chat_name)
        names[chat_name] = name
        tools[chat_name] = Tool(function=function)


def _declared(choice: ToolChoice, names: dict[str, ToolName]) -> str:
    """Return a model's name of the tool that a choice names."""
    if choice.type not in ("function", "custom"):
        raise UnsupportedFieldError(
            f"tool_choice asks for a tool of type '{choice.type[:64]}', which is not available "
            "here; name a function or a custom tool",
            param="tool_choice",
        )
    for chat_name, each in names.items():
        is_same_place = choice.namespace is None or choice.namespace == each.namespace
        if (each.kind, each.name) == (choice.type, choice.name) and is_same_place:
            return chat_name
    raise BadRequestError(
        f"tool_choice names '{(choice.name or '')[:64]}', which tools does not declare",
        param="tool_choice",
    )


def _allowed(choice: ToolChoice, names: dict[str, ToolName]) -> tool_choice.ToolChoice:
    """Return what may be called; tools that are left out altogether may be on the list, too."""
    mode = choice.mode or "auto"
    if mode not in ("auto", "required"):
        raise BadRequestError("tool_choice.mode is auto or required", param="tool_choice.mode")
    allowed = [
        AllowedTool(function=FunctionName(name=_declared(each, names)))
        for each in choice.tools or []
        if each.type in ("function", "custom") or each.type in _REFUSED_TYPES
    ]
    if not allowed and mode == "required":
        raise _nothing_to_call()
    if not allowed:
        return "none"
    return AllowedToolsChoice(
        allowed_tools=AllowedTools(mode=cast(Literal["auto", "required"], mode), tools=allowed)
    )


def _mode(
    mode: Literal["none", "auto", "required"] | None, tools: dict[str, Tool]
) -> tool_choice.ToolChoice | None:
    if mode == "required" and not tools:
        raise _nothing_to_call()
    return mode if tools else None


def _nothing_to_call() -> BadRequestError:
    return BadRequestError(
        "tool_choice 'required' needs a tool that can be called here, a function or a custom one, "
        "in tools",
        param="tool_choice",
    )
