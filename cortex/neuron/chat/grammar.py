"""Grammars (llguidance's Lark syntax) that keep tool calls and JSON answers valid.

A tool call is free only where a value is: names of functions and parameters, enumerations,
numbers, nested JSON and all the syntax around them follow the declared tools.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import llguidance
import msgspec

from cortex.core.errors import BadRequestError
from cortex.core.openai import JsonSchemaFormat, Tool
from cortex.neuron.chat.output import END_THINK, END_TOOL_CALL, THINK, TOOL_CALL
from cortex.neuron.chat.schema import (
    Schema,
    TypesMemory,
    choices,
    excess,
    json_types,
    resolve,
)
from cortex.neuron.chat.tokenizer import ChatTokenizer
from cortex.neuron.engine.protocol import Constraint

MAX_GRAMMAR_CHARS = 512 << 10
MAX_PARAMETERS = 1024  # over all tools
MAX_PARAMETER_NAME_CHARS = 256
MAX_ENUM_VALUES = 256  # a longer enumeration is free text
MAX_FORCED_CALLS = 8
_CHECKED_GRAMMARS = 32
_CHECKED_VALUES = 64
_MAX_CHECKED_CHARS = 128 << 10  # over all tools
_TRIAL_STEPS = 256
# Parametric rules hold a set of at most 64 bits.
_MAX_UNORDERED = 60

# A parameter's name stands in `<parameter=..>` on a line of its own.
_UNWRITABLE = frozenset("<>\n")

_JSON_OPTIONS = {"whitespace_pattern": r"[ \n\t]{1,32}"}
_TYPES = frozenset(["array", "boolean", "integer", "null", "number", "object", "string"])
_BOOLEAN = '("true" | "false" | "True" | "False")'
_NULL = '("null" | "None")'
_COMMON = r"""
value_end: "\n</parameter>\n"
text[lazy]: /(?s:.*)\n<\/parameter>\n/
free_parameter: "<parameter=" FREE_NAME ">\n" text
FREE_NAME: /[^<>\n]{1,64}/
"""


class _UnfitError(Exception):
    """A grammar cannot be made; says why."""


Thinking = Literal["off", "open", "possible"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Markers:
    """How a model writes calls and thoughts; ids are None where no single token stands for it.

    Attributes:
        thinking: whether the prompt leaves a thinking block open, or the model may open one.
    """

    tokenizer_path: str
    is_xml: bool
    thinking: Thinking
    tool_call_id: int | None
    end_tool_call_id: int | None
    think_id: int | None
    end_think_id: int | None

    @classmethod
    def of(cls, tokenizer: ChatTokenizer, *, is_xml: bool, thinking: Thinking) -> "Markers":
        """Return the markers as this tokenizer spells them."""
        return cls(
            tokenizer_path=tokenizer.path,
            is_xml=is_xml,
            thinking=thinking,
            tool_call_id=tokenizer.marker_id(TOOL_CALL),
            end_tool_call_id=tokenizer.marker_id(END_TOOL_CALL),
            think_id=tokenizer.marker_id(THINK),
            end_think_id=tokenizer.marker_id(END_THINK),
        )


def optional_calls(tools: list[Tool], markers: Markers) -> Constraint | None:
    """Return what holds from each `<tool_call>` token on, or None if there is no such token.

    Raises:
        BadRequestError: the tools are too large for a grammar.
    """
    if markers.tool_call_id is None or markers.end_tool_call_id is None:
        return None
    block = f'"\\n" call "\\n" {_token(markers.end_tool_call_id, END_TOOL_CALL)}'
    lark = _tool_grammar(f"start: {block}\n", tools, markers)
    return Constraint(
        lark=lark, tokenizer_path=markers.tokenizer_path, trigger_id=markers.tool_call_id
    )


def forced_calls(
    tools: list[Tool],
    markers: Markers,
    *,
    is_single: bool = False,
    or_json: JsonSchemaFormat | None = None,
) -> Constraint:
    """Return what makes the whole answer one or more calls of these tools.

    Args:
        is_single: exactly one call.
        or_json: a JSON answer that is allowed instead of calls.

    Raises:
        BadRequestError: the tools are too large for a grammar, or the schema is not usable.
    """
    begin = _token(markers.tool_call_id, TOOL_CALL)
    end = _token(markers.end_tool_call_id, END_TOOL_CALL)
    more = "" if is_single else f' ("\\n" block){{0,{MAX_FORCED_CALLS - 1}}}'
    lead, rules, skip_until_id = _lead(markers)
    answer = f"block{more}"
    if or_json is not None:
        json_answer(or_json, markers)  # raises if the schema, and not the tools, is at fault
        answer = f"({answer} | answer)"
        rules += f"answer: {_answer(or_json)}\n"
    lark = _tool_grammar(
        f'start: {lead}{answer}\nblock: {begin} "\\n" call "\\n" {end}\n{rules}', tools, markers
    )
    return Constraint(lark=lark, tokenizer_path=markers.tokenizer_path, skip_until_id=skip_until_id)


def json_answer(schema: JsonSchemaFormat | None, markers: Markers) -> Constraint:
    """Return what makes the whole answer one JSON value of a schema, or any JSON object.

    Raises:
        BadRequestError: the schema is not usable; says why.
    """
    lead, rules, skip_until_id = _lead(markers)
    lark, problem = "", None
    try:
        answer = _answer(schema or JsonSchemaFormat())
        lark = f"start: {lead}answer\nanswer: {answer}\n{rules}"
        problem = _problem(lark) or _dead_end(answer)
    except _UnfitError as exc:
        problem = str(exc)
    if problem is not None:
        raise BadRequestError(
            f"response_format cannot be followed: {problem}", param="response_format"
        )
    return Constraint(lark=lark, tokenizer_path=markers.tokenizer_path, skip_until_id=skip_until_id)


def _lead(markers: Markers) -> tuple[str, str, int | None]:
    """Return what may stand before a forced answer: its use, its rules, the token to skip to."""
    if markers.thinking == "off":
        return "", "", None
    newlines = "NEWLINES: /\\n{1,2}/\n"
    if markers.thinking == "open" and markers.end_think_id is not None:
        return "NEWLINES? ", newlines, markers.end_think_id
    if markers.end_think_id is None:
        thought = "thought[lazy]: /(?s:.*)<\\/think>/\n"
        block = "thought"
    else:
        thought = "thought: /(?s:.*)/\n"
        block = f"thought {_token(markers.end_think_id, END_THINK)}"
    if markers.thinking == "open":
        return f"{block} NEWLINES? ", thought + newlines, None
    block = f"{_token(markers.think_id, THINK)} {block}"
    return f"({block} NEWLINES?)? ", thought + newlines, None


def _token(token_id: int | None, text: str) -> str:
    return _literal(text) if token_id is None else f"<[{token_id}]>"


def _literal(text: str) -> str:
    """Return a Lark string, which is written like a JSON one but without a raw DEL."""
    return msgspec.json.encode(text).decode().replace("\x7f", "\\u007f")


def _json(schema: Schema, *, is_lenient: bool = True) -> str:
    problem = excess(schema)
    if problem is not None:
        raise _UnfitError(problem)
    options: dict[str, Any] = {**_JSON_OPTIONS, "lenient": is_lenient}
    try:
        return f"%json {msgspec.json.encode({**schema, 'x-guidance': options}).decode()}"
    except RecursionError as exc:
        raise _UnfitError("it is nested too deep") from exc


def _answer(answer: JsonSchemaFormat) -> str:
    if answer.schema is None:
        return _json({"type": "object"})
    return _json(answer.schema, is_lenient=not answer.strict)


@lru_cache(maxsize=_CHECKED_GRAMMARS)
def _problem(lark: str) -> str | None:
    """Return why llguidance refuses a grammar, or None; agents send the same tools each turn."""
    if len(lark) > MAX_GRAMMAR_CHARS:
        return _too_long()
    is_error, messages = llguidance.LLMatcher.validate_grammar_with_warnings(lark)
    if not is_error:
        return None
    return _first_line(str(messages[0])) if messages else "it is not valid"


def _too_long() -> str:
    return f"it makes a grammar of over {MAX_GRAMMAR_CHARS} characters"


@lru_cache(maxsize=_CHECKED_VALUES)
def _dead_end(value: str) -> str | None:
    """Return why a JSON rule that compiles cannot be followed, or None if a short value can be.

    Some faults (a rule that only refers to itself, a state too large) show only while it is
    followed. It is tried byte by byte, which needs no model's tokenizer.
    """
    matcher = llguidance.LLMatcher(_byte_tokenizer(), f"start: {value}\n", log_level=0)
    for _ in range(_TRIAL_STEPS):
        if matcher.is_error():
            break
        allowed = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error() or matcher.is_accepting():
            break
        matcher.consume_token(_shortest_way(allowed))
    return _first_line(matcher.get_error()) if matcher.is_error() else None


@lru_cache(maxsize=1)
def _byte_tokenizer() -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer("byte")


def _shortest_way(allowed: int) -> int:
    """Return an allowed byte that is no white space and ends a string if it can."""
    if allowed >> ord('"') & 1:
        return ord('"')
    visible = allowed >> (ord(" ") + 1)
    return ord(" ") + (visible & -visible).bit_length()


def _first_line(message: str) -> str:
    return message.strip().split("\n", 1)[0][:300]


def _tool_grammar(start: str, tools: list[Tool], markers: Markers) -> str:
    """Return the grammar with the rules of all calls, or one with looser values if need be."""
    problem: str | None = None
    for is_loose in (False, True):
        rules = _ToolRules(is_loose=is_loose)
        try:
            lark = start + (rules.xml(tools) if markers.is_xml else rules.json(tools))
            problem = _problem(lark) or rules.dead_end()
        except _UnfitError as exc:
            problem = str(exc)
            continue
        if problem is None:
            return lark
    raise BadRequestError(f"tools cannot be used: {problem}", param="tools")


class _ToolRules:
    """Writes the rule `call` and those it needs.

    With `is_loose` nested values follow their type only: for schemas that say what llguidance
    cannot check, such as a reference to another document.
    """

    def __init__(self, *, is_loose: bool) -> None:
        self._is_loose = is_loose
        self._num_parameters = 0
        self._num_chars = 0
        self._values: list[str] = []
        self._types: TypesMemory = {}

    def dead_end(self) -> str | None:
        """Return why one of the JSON values written cannot be followed, or None."""
        num_chars = 0
        for value in dict.fromkeys(self._values):
            num_chars += len(value)
            if num_chars > _MAX_CHECKED_CHARS:
                break
            problem = _dead_end(value)
            if problem is not None:
                return problem
        return None

    def json(self, tools: list[Tool]) -> str:
        """Calls as `{"name": .., "arguments": {..}}`."""
        lines = [f"call: {' | '.join(f'call_{at}' for at in range(len(tools)))}"]
        for at, (name, root) in enumerate(_functions(tools)):
            arguments = {**({} if self._is_loose else root), "type": "object"}
            schema: Schema = {
                **({} if self._is_loose else _definitions(root)),
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            lines.append(f"call_{at}: {self._checked(schema)}")
        return "\n".join(lines) + "\n"

    def xml(self, tools: list[Tool]) -> str:
        """Calls as `<function=..>` with `<parameter=..>` blocks in any order."""
        lines = [f"call: {' | '.join(f'call_{at}' for at in range(len(tools)))}", _COMMON]
        for at, (name, root) in enumerate(_functions(tools)):
            lines.append(f"call_{at}: {_literal(f'<function={name}>' + chr(10))} body_{at}")
            lines.extend(self._body(f"body_{at}", name, root))
        return "\n".join(lines) + "\n"

    def _body(self, rule: str, tool: str, root: Schema) -> Iterator[str]:
        """A function's parameters and its end: each at most once, required ones always."""
        properties = root.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        self._check_names(tool, properties)
        named = root.get("required")
        named = frozenset(x for x in named if isinstance(x, str)) if isinstance(named, list) else ()
        required = [name for name in properties if name in named]
        optional = [name for name in properties if name not in named]
        names = required + optional
        close = '"</function>"'
        if not names:
            free = "free_parameter* " if root.get("additionalProperties") else ""
            yield f"{rule}: {free}{close}"
            return
        if len(names) > _MAX_UNORDERED:
            places = {name: at for at, name in enumerate(names)}
            declared = " ".join(
                f"{rule}_{places[name]}{'' if name in named else '?'}" for name in properties
            )
            yield f"{rule}: {declared} {close}"
        else:
            done = f" %if is_ones([0:{len(required)}])" if required else ""
            yield f"{rule}: {rule}_set::0x0"
            yield f"{rule}_set::_: {close}{done}"
            for at in range(len(names)):
                yield f"  | {rule}_{at} {rule}_set::set_bit({at}) %if bit_clear({at})"
        for at, name in enumerate(names):
            opening = _literal(f"<parameter={name}>\n")
            yield f"{rule}_{at}: {opening} {self._value(properties[name], root)}"

    def _check_names(self, tool: str, properties: Schema) -> None:
        self._num_parameters += len(properties)
        if self._num_parameters > MAX_PARAMETERS:
            raise BadRequestError(
                f"tools declare more than {MAX_PARAMETERS} parameters", param="tools"
            )
        for name in properties:
            if len(name) > MAX_PARAMETER_NAME_CHARS:
                problem = f"has a name of over {MAX_PARAMETER_NAME_CHARS} characters"
            elif not name:
                problem = "is without a name"
            elif _UNWRITABLE & set(name):
                problem = "has a newline, '<' or '>' in its name"
            else:
                continue
            raise BadRequestError(
                f"tool {tool!r}: parameter {name[:64]!r} {problem}, which this model cannot "
                "write in a call; rename it",
                param="tools",
            )

    def _value(self, declared: Any, root: Schema) -> str:
        schema = resolve(declared, root)
        values = choices(schema)
        if values is not None and len(values) <= MAX_ENUM_VALUES:
            options = " | ".join(dict.fromkeys(_spelling(value) for value in values))
            self._spend(options)
            return f"({options}) value_end"
        types = json_types(schema, root, self._types)
        if not types or "string" in types:
            return "text"
        if types <= {"boolean", "null"}:
            words = [_BOOLEAN] * ("boolean" in types) + [_NULL] * ("null" in types)
            return f"({' | '.join(words)}) value_end"
        if self._is_loose:
            known = sorted(types & _TYPES)
            if not known:
                return "text"
            return f"{self._checked({'type': known})} value_end"
        return f"{self._checked({**_definitions(root), **schema})} value_end"

    def _checked(self, schema: Schema) -> str:
        value = _json(schema)
        self._spend(value)
        self._values.append(value)
        return value

    def _spend(self, text: str) -> None:
        """Stop early: what parameters share is written once for each of them."""
        self._num_chars += len(text)
        if self._num_chars > MAX_GRAMMAR_CHARS:
            raise _UnfitError(_too_long())


def _functions(tools: list[Tool]) -> Iterator[tuple[str, Schema]]:
    for tool in tools:
        assert tool.function is not None
        yield tool.function.name, tool.function.parameters or {}


def _definitions(root: Schema) -> Schema:
    """What a schema's local references may point into."""
    return {key: root[key] for key in ("$defs", "definitions") if key in root}


def _spelling(value: Any) -> str:
    """An enumerated value as a template would write it."""
    if isinstance(value, str):
        return _literal(value)
    if isinstance(value, bool):
        return f"{_literal(str(value).lower())} | {_literal(str(value))}"
    return _NULL if value is None else _literal(msgspec.json.encode(value).decode())
