"""What a chat request may say of its tools: none, any, one of them, some of them.

A choice that is a word (`none`, `auto`, `required`) needs no struct; see `openai.ChatRequest`.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

MAX_TOOLS = 1024
MAX_NAME_CHARS = 256


class FunctionName(msgspec.Struct, kw_only=True, frozen=True):
    """The name of a declared function."""

    name: Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARS)]


class NamedToolChoice(msgspec.Struct, kw_only=True, frozen=True, tag="function"):
    """`tool_choice` that asks for one tool."""

    function: FunctionName


class AllowedTool(msgspec.Struct, kw_only=True, frozen=True):
    """One tool that may be called; only those of type `function` are usable."""

    type: str = "function"
    function: FunctionName | None = None


class AllowedTools(msgspec.Struct, kw_only=True, frozen=True):
    """The declared tools that may be called, and whether one of them has to be."""

    mode: Literal["auto", "required"] = "auto"
    tools: Annotated[list[AllowedTool], Meta(min_length=1, max_length=MAX_TOOLS)]


class AllowedToolsChoice(msgspec.Struct, kw_only=True, frozen=True, tag="allowed_tools"):
    """`tool_choice` that leaves some of the tools; the prompt shows all of them."""

    allowed_tools: AllowedTools


class CustomToolChoice(msgspec.Struct, kw_only=True, frozen=True, tag="custom"):
    """`tool_choice` that asks for a tool without a schema; well-formed, and refused."""

    custom: Any = None


ToolChoice = (
    Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolsChoice | CustomToolChoice
)
