"""Calls that are written as `<function=..>` with `<parameter=..>` blocks, typed by the schema."""

import json  # noqa: TID251 - msgspec refuses numbers that no float holds
from typing import Any

from cortex.neuron.chat.callparts import (
    MAX_NAME_CHARS,
    CallEnd,
    CallStart,
    CallText,
    Finding,
    Reading,
    Source,
    close,
    encoded,
    more,
    next_is,
    overlap,
    skip_newline,
    skip_space,
)
from cortex.neuron.chat.jsonspan import MalformedCallError
from cortex.neuron.chat.schema import ToolTable, cast, json_types

FUNCTION, _END_FUNCTION = "<function=", "</function>"
_PARAMETER, _END_PARAMETER = "<parameter=", "</parameter>"
# What the grammar ends a value with; inside of one, other text may look like an end.
_END_VALUE = f"\n{_END_PARAMETER}\n"


def xml_call(source: Source, tools: ToolTable, closing: str, *, is_certain: bool) -> Reading:
    """Read a `<function=..>` block, which is next, and the closing marker.

    Args:
        is_certain: values end as the grammar has it, and are told piece by piece.
    """
    source.take(len(FUNCTION))
    name = yield from _tag_name(source, tools.names)
    yield CallStart(name)
    properties = tools.properties(name)
    known = sorted(properties, key=len, reverse=True)
    lead = "{"
    while True:
        yield from skip_space(source)
        mark = yield from next_is(source, _PARAMETER, _END_FUNCTION, closing)
        source.take(len(mark))
        if mark != _PARAMETER:
            break
        parameter = yield from _tag_name(source, known)
        yield CallText(f"{lead}{encoded(parameter)}:")
        lead = ","
        if is_certain:
            yield from _certain_value(source, parameter, name, tools)
        else:
            text = yield from _likely_value(source, closing)
            yield CallText(encoded(_typed(text, parameter, name, tools)))
    yield CallText("}" if lead == "," else "{}")
    if mark == _END_FUNCTION:
        yield from close(source, closing)
    yield CallEnd()


def _typed(text: str, parameter: str, name: str, tools: ToolTable) -> Any:
    properties = tools.properties(name)
    if parameter not in properties:
        return text
    return cast(text, properties[parameter], tools.schemas.get(name, {}))


def _certain_value(source: Source, parameter: str, name: str, tools: ToolTable) -> Reading:
    """A value that the grammar ends; of a text, each piece is told as it comes."""
    properties = tools.properties(name)
    root = tools.schemas.get(name, {})
    types = json_types(properties.get(parameter), root)
    is_text = parameter not in properties or types == {"string"}
    yield from skip_newline(source)
    pieces: list[str] = []
    if is_text:
        yield CallText('"')
    while (at := source.ahead.find(_END_VALUE)) < 0:
        held = overlap(source.ahead, _END_VALUE)
        piece = source.take(len(source.ahead) - held)
        if is_text and piece:
            yield CallText(encoded(piece)[1:-1])
        elif piece:
            pieces.append(piece)
        yield from more(source)
    pieces.append(source.take(at))
    source.take(len(_END_VALUE))
    if is_text:
        yield CallText(encoded(pieces[0])[1:-1] + '"')
    else:
        text = "".join(pieces)
        value = _typed(text, parameter, name, tools)
        # JSON of the schema's type that no value here can stand for is passed on as it is.
        is_json = value == text and bool(types) and "string" not in types and _is_json(text)
        yield CallText(text if is_json else encoded(value))


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(word: str) -> None:
    raise ValueError(word)


def _likely_value(source: Source, closing: str) -> Finding:
    """A value ends at the closing tag that another tag follows: one inside a value, as in a text
    about this syntax, is part of it. The end of the whole block is not."""
    yield from skip_newline(source)
    begin = 0
    while True:
        at = source.ahead.find(_END_PARAMETER, begin)
        block_end = source.ahead.find(closing)
        if block_end >= 0 and (at < 0 or block_end < at):
            raise MalformedCallError
        if at < 0:
            begin = max(begin, len(source.ahead) - len(_END_PARAMETER) + 1)
            yield from more(source)
            continue
        after = source.ahead[at + len(_END_PARAMETER) :].lstrip()
        marks = (_PARAMETER, _END_FUNCTION, closing)
        if after.startswith(marks):
            break
        if any(mark.startswith(after) for mark in marks):
            begin = at
            yield from more(source)
        else:
            begin = at + 1
    text = source.take(at)
    source.take(len(_END_PARAMETER))
    return text.removesuffix("\n")


def _tag_name(source: Source, known: list[str]) -> Finding:
    """The rest of a tag up to its `>`; declared names, longest first, may hold that themselves."""
    while True:
        ahead = source.ahead
        found = next((name for name in known if ahead.startswith(f"{name}>")), None)
        may_come = any(len(name) >= len(ahead) and name.startswith(ahead) for name in known)
        if not may_come and found is not None:
            source.take(len(found) + 1)
            return found
        if not may_come:
            name, mark, _ = ahead.partition(">")
            if "\n" in name.strip() or len(name) > MAX_NAME_CHARS or (mark and not name.strip()):
                raise MalformedCallError
            if mark:
                source.take(len(name) + 1)
                return name.strip()
        yield from more(source)
