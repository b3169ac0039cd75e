"""Calls that are written as JSON: an object with name and arguments, or arguments after a name."""

import re

from cortex.neuron.chat.callparts import (
    MAX_NAME_CHARS,
    CallEnd,
    CallStart,
    CallText,
    Finding,
    Reading,
    Source,
    close,
    decoded,
    more,
    next_is,
    skip_space,
)
from cortex.neuron.chat.formats import ARGS, CALL_ID
from cortex.neuron.chat.jsonspan import JsonSpan, MalformedCallError
from cortex.neuron.chat.schema import ToolTable

_ARGUMENTS = frozenset(["arguments", "parameters"])
_NAMES = frozenset(["name", "function"])
# What else may stand in the object of a call.
_OTHERS = frozenset(["id", "type"])
_NAME_END = re.compile(r"[\[{\s]")
_ID_END = re.compile(r"[\[{]")


def bracketed_calls(source: Source, tools: ToolTable) -> Reading:
    """Read a list of calls as JSON, or one as a name and its arguments."""
    yield from skip_space(source)
    if not source.ahead.startswith("["):
        yield from _named_call(source)
        return
    source.take(1)
    while True:
        yield from skip_space(source)
        mark = yield from next_is(source, "{", ",", "]")
        if mark == "{":
            yield from json_call(source, tools)
            continue
        source.take(1)
        if mark == "]":
            return


def _named_call(source: Source) -> Reading:
    name = yield from _up_to(source, _NAME_END)
    if not name:
        raise MalformedCallError
    call_id = None
    yield from skip_space(source)
    mark = yield from next_is(source, "{", ARGS, CALL_ID)
    if mark == CALL_ID:
        source.take(len(CALL_ID))
        call_id = (yield from _up_to(source, _ID_END)).strip() or None
        mark = yield from next_is(source, "{", ARGS)
    if mark == ARGS:
        source.take(len(ARGS))
        yield from skip_space(source)
        yield from next_is(source, "{")
    yield CallStart(name, call_id)
    yield from _json_text(source)
    yield CallEnd()


def _up_to(source: Source, end: re.Pattern[str]) -> Finding:
    """Take the text before what matches."""
    while (found := end.search(source.ahead)) is None:
        if len(source.ahead) > MAX_NAME_CHARS:
            raise MalformedCallError
        yield from more(source)
    if found.start() > MAX_NAME_CHARS:
        raise MalformedCallError
    return source.take(found.start())


def json_call(
    source: Source, tools: ToolTable, closing: str = "", *, is_bare: bool = False
) -> Reading:
    """Read an object with a name and arguments, in either order.

    Args:
        is_bare: no marker says that this is a call, so what names no declared tool is none.
    """
    yield from skip_space(source)
    yield from next_is(source, "{")
    source.take(1)
    name: str | None = None
    arguments: str | None = None
    is_told = False
    while True:
        yield from skip_space(source)
        mark = yield from next_is(source, '"', ",", "}")
        if mark != '"':
            source.take(1)
            if mark == "}":
                break
            continue
        key = decoded((yield from _json_value(source)))
        yield from skip_space(source)
        yield from next_is(source, ":")
        source.take(1)
        yield from skip_space(source)
        if key in _ARGUMENTS and name is not None and source.ahead.startswith("{"):
            if is_told:
                raise MalformedCallError
            is_told = True
            yield CallStart(name)
            yield from _json_text(source)
        elif key in _ARGUMENTS:
            arguments = yield from _json_value(source)
        elif key in _NAMES:
            name = _name_in((yield from _json_value(source)))
            if is_bare and name not in tools.schemas:
                raise MalformedCallError
        elif is_bare and key not in _OTHERS:
            raise MalformedCallError
        else:
            yield from _json_value(source)
    if not is_told:
        if name is None:
            raise MalformedCallError
        yield CallStart(name)
        yield CallText(_object_text(arguments))
    yield from close(source, closing)
    yield CallEnd()


def _name_in(text: str) -> str:
    name = decoded(text)
    if not isinstance(name, str) or not name:
        raise MalformedCallError
    return name


def _object_text(text: str | None) -> str:
    """The text of an object; models may put it into a string, or leave it out."""
    if text is None:
        return "{}"
    value = decoded(text)
    if isinstance(value, str):
        text, value = value, decoded(value)
    if not isinstance(value, dict):
        raise MalformedCallError
    return text


def _json_text(source: Source) -> Reading:
    """A JSON value as pieces of text, as they come."""
    span = JsonSpan()
    while not span.is_complete:
        length = span.scan(source.ahead)
        if length:
            yield CallText(source.take(length))
        if not span.is_complete:
            yield from more(source)


def _json_value(source: Source) -> Finding:
    """A JSON value's whole text."""
    span = JsonSpan()
    pieces: list[str] = []
    while not span.is_complete:
        pieces.append(source.take(span.scan(source.ahead)))
        if not span.is_complete:
            yield from more(source)
    return "".join(pieces)
