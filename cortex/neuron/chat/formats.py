"""How models write tool calls and thoughts, as their chat templates tell."""

from dataclasses import dataclass

from cortex.core.neuron_api import ToolFormat

TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
TOOL_CALLS, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSyntax:
    """What stands around calls of one format.

    Attributes:
        opening: the marker before a call.
        closing: the marker after it; empty where a call ends by itself.
        inner: further markers inside of it.
        is_bare: an answer that begins with a JSON object is a call too, without the marker.
        arguments_key: what the arguments are called in JSON.
        id_chars: letters and digits of a call's id; None for OpenAI's own form.
    """

    name: ToolFormat
    opening: str
    closing: str = ""
    inner: tuple[str, ...] = ()
    is_bare: bool = False
    arguments_key: str = "arguments"
    id_chars: int | None = None

    @property
    def markers(self) -> tuple[str, ...]:
        """All markers; tokens of these names are syntax even where they are special."""
        return tuple(mark for mark in (self.opening, self.closing, *self.inner) if mark)


SYNTAXES: dict[ToolFormat, CallSyntax] = {
    each.name: each
    for each in (
        CallSyntax(name="qwen_xml", opening=TOOL_CALL, closing=END_TOOL_CALL),
        CallSyntax(name="hermes", opening=TOOL_CALL, closing=END_TOOL_CALL),
        CallSyntax(name="llama3", opening=PYTHON_TAG, is_bare=True, arguments_key="parameters"),
        CallSyntax(name="mistral", opening=TOOL_CALLS, inner=(ARGS, CALL_ID), id_chars=9),
        CallSyntax(name="mistral_list", opening=TOOL_CALLS, inner=(ARGS, CALL_ID), id_chars=9),
    )
}


@dataclass(frozen=True, slots=True)
class ThinkMarkers:
    """What stands before and after a thought."""

    opening: str
    closing: str


THINK_TAGS = ThinkMarkers("<think>", "</think>")
THINK_BRACKETS = ThinkMarkers("[THINK]", "[/THINK]")


def tool_format_of(source: str) -> ToolFormat | None:
    """Return how a template's source writes calls, or None where it does not say."""
    if TOOL_CALLS in source:
        return "mistral" if ARGS in source else "mistral_list"
    if TOOL_CALL in source:
        return "qwen_xml" if "<function=" in source else "hermes"
    is_llama = "<|start_header_id|>" in source and '"parameters"' in source
    return "llama3" if is_llama or PYTHON_TAG in source else None


def think_markers_of(source: str) -> ThinkMarkers:
    """Return the markers of thoughts that a template's source knows."""
    return THINK_BRACKETS if THINK_BRACKETS.opening in source else THINK_TAGS
