"""The text inside a `<tool_call>` block, as a call with JSON arguments."""

import re
from typing import Any

import msgspec

from cortex.neuron.chat.schema import ToolTable, cast

_FUNCTION = "<function="
_END_FUNCTION = "</function>"
_PARAMETER = "<parameter="
# A value ends at the closing tag that another tag or the block's end follows: one inside a
# value, as in a text about this syntax, is part of it.
_END_PARAMETER = re.compile(r"</parameter>\s*(?=<parameter=|</function>|\Z)")


class ParsedCall(msgspec.Struct, kw_only=True, frozen=True):
    """A call; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


def parse_call(body: str, tools: ToolTable, *, is_closed: bool = True) -> ParsedCall | None:
    """Return the call in a block's text, or None if there is none that can be read.

    Args:
        body: what stands between `<tool_call>` and `</tool_call>`.
        is_closed: whether the block's end marker came; without it the call itself must be whole.
    """
    body = body.strip()
    if body.startswith(_FUNCTION):
        return _parse_xml(body, tools, is_closed=is_closed)
    return _parse_json(body)


def _parse_json(body: str) -> ParsedCall | None:
    try:
        call = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments: Any = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments)
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    return ParsedCall(name=call["name"], arguments=msgspec.json.encode(arguments).decode())


def _parse_xml(body: str, tools: ToolTable, *, is_closed: bool) -> ParsedCall | None:
    if not body.endswith(_END_FUNCTION):
        if not is_closed or _END_FUNCTION in body:
            return None
        body += _END_FUNCTION
    name, rest = _split_name(body[len(_FUNCTION) :], tools.names)
    if not name:
        return None
    root = tools.schemas.get(name, {})
    properties = tools.properties(name)
    known = sorted(properties, key=len, reverse=True)
    arguments: dict[str, Any] = {}
    rest = rest.strip()
    while rest.startswith(_PARAMETER):
        parameter, rest = _split_name(rest[len(_PARAMETER) :], known)
        end = _END_PARAMETER.search(rest)
        if not parameter or end is None:
            return None
        text = rest[: end.start()].removeprefix("\n").removesuffix("\n")
        arguments[parameter] = (
            cast(text, properties[parameter], root) if parameter in properties else text
        )
        rest = rest[end.end() :]
    if rest.strip() != _END_FUNCTION:
        return None
    return ParsedCall(name=name, arguments=msgspec.json.encode(arguments).decode())


def _split_name(text: str, known: list[str]) -> tuple[str, str]:
    """Split `NAME>rest`; declared names may hold `>` themselves. An empty name means none."""
    for name in known:
        if text.startswith(f"{name}>"):
            return name, text[len(name) + 1 :]
    name, mark, rest = text.partition(">")
    return (name.strip(), rest) if mark and "\n" not in name.strip() else ("", text)
