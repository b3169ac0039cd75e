"""The grammar rules of calls: declared names, declared parameters, values of their schemas."""

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from cortex.core.errors import BadRequestError
from cortex.core.openai import FunctionDef, Tool
from cortex.neuron.chat.grammarparts import (
    UnfitError,
    check_length,
    dead_end,
    json_rule,
    literal,
    problem_of,
)
from cortex.neuron.chat.schema import Schema, TypesMemory, choices, json_types, resolve

MAX_PARAMETERS = 1024  # over all tools
MAX_PARAMETER_NAME_CHARS = 256
MAX_ENUM_VALUES = 256  # a longer enumeration is free text
_MAX_CHECKED_CHARS = 128 << 10  # over all tools
# Parametric rules hold a set of at most 64 bits.
_MAX_UNORDERED = 60

# A parameter's name stands in `<parameter=..>` on a line of its own.
_UNWRITABLE = frozenset("<>\n")

_TYPES = frozenset(["array", "boolean", "integer", "null", "number", "object", "string"])
# Beside these, `properties` are not all that an object may have.
_COMPOSED = frozenset(["$ref", "allOf", "anyOf", "oneOf", "patternProperties", "if"])
_BOOLEAN = '("true" | "false" | "True" | "False")'
_NULL = '("null" | "None")'
_END_TEXT = "\n</parameter>\n"
_NO_END = r"~/(?s:.*)\n<\/parameter>(\n(?s:.*))?/"
_COMMON = r"""
value_end: "\n</parameter>\n"
text[lazy]: /(?s:.*)\n<\/parameter>\n/
free_parameter: "<parameter=" FREE_NAME ">\n" text
FREE_NAME: /[^<>\n]{1,64}/
"""


class ToolRules:
    """Writes the rule `call` and those it needs.

    With `is_loose` nested values follow their type only: for schemas that say what llguidance
    cannot check, such as a reference to another document.
    """

    def __init__(self, *, is_loose: bool) -> None:
        self._is_loose = is_loose
        self._num_parameters = 0
        self._num_chars = 0
        self._values: list[str] = []
        self._texts: list[str] = []
        self._types: TypesMemory = {}
        self._is_strict = False

    def dead_end(self) -> str | None:
        """Return why one of the JSON values written cannot be followed, or None."""
        num_chars = 0
        for value in dict.fromkeys(self._values):
            num_chars += len(value)
            if num_chars > _MAX_CHECKED_CHARS:
                break
            problem = dead_end(value)
            if problem is not None:
                return problem
        return None

    def json(self, tools: list[Tool], arguments_key: str, *, has_id: bool = False) -> str:
        """Calls as `{"name": .., "arguments": {..}}`.

        Args:
            arguments_key: what the model calls the arguments.
            has_id: a call may end with an id.
        """
        lines = [_any_call(tools)]
        call_id = {"id": {"type": "string", "pattern": "^[A-Za-z0-9]{9}$"}} if has_id else {}
        for at, tool in enumerate(self._each(tools)):
            arguments = self._arguments(tool)
            schema: Schema = {
                **_definitions(arguments),
                "type": "object",
                "properties": {"name": {"const": tool.name}, arguments_key: arguments, **call_id},
                "required": ["name", arguments_key],
                "additionalProperties": False,
            }
            lines.append(f"call_{at}: {self._checked(schema)}")
        return "\n".join(lines) + "\n"

    def named(self, tools: list[Tool], lead: str) -> str:
        """Calls as a name, then `lead`, then the arguments as JSON."""
        lines = [_any_call(tools)]
        for at, tool in enumerate(self._each(tools)):
            value = self._checked(self._arguments(tool))
            lines.append(f"call_{at}: {literal(tool.name)} {lead}{value}")
        return "\n".join(lines) + "\n"

    def xml(self, tools: list[Tool]) -> str:
        """Calls as `<function=..>` with `<parameter=..>` blocks in any order."""
        lines = [_any_call(tools), _COMMON]
        for at, tool in enumerate(self._each(tools)):
            opening = literal(f"<function={tool.name}>\n")
            lines.append(f"call_{at}: {opening} body_{at}")
            lines.extend(self._body(f"body_{at}", tool.name, tool.parameters or {}))
        return "\n".join([*lines, *self._texts]) + "\n"

    def _each(self, tools: list[Tool]) -> Iterator[FunctionDef]:
        for tool in tools:
            assert tool.function is not None
            self._is_strict = bool(tool.function.strict)
            yield tool.function

    @property
    def _drops_detail(self) -> bool:
        return self._is_loose and not self._is_strict

    def _arguments(self, tool: FunctionDef) -> Schema:
        """Return the schema of a call's arguments, which are an object of declared names."""
        root = tool.parameters or {"properties": {}}
        if self._drops_detail:
            return {"type": "object"}
        arguments: Schema = {**root, "type": "object"}
        properties, required = root.get("properties"), root.get("required", [])
        if isinstance(properties, dict) and isinstance(required, list):
            is_whole = properties.keys() >= set(map(str, required))
            if is_whole and not _COMPOSED & root.keys():
                arguments.setdefault("additionalProperties", False)
        return arguments

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
            opening = literal(f"<parameter={name}>\n")
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
            return self._text(schema, is_only=types == {"string"})
        if types <= {"boolean", "null"}:
            words = [_BOOLEAN] * ("boolean" in types) + [_NULL] * ("null" in types)
            return f"({' | '.join(words)}) value_end"
        if self._drops_detail:
            known = sorted(types & _TYPES)
            if not known:
                return "text"
            return f"{self._checked({'type': known})} value_end"
        return f"{self._checked({**_definitions(root), **schema})} value_end"

    def _text(self, schema: Schema, *, is_only: bool) -> str:
        """A text, up to its closing tag, with what its schema says of length and pattern."""
        least, most, pattern = (schema.get(key) for key in ("minLength", "maxLength", "pattern"))
        conditions: list[str] = []
        if isinstance(least, int) or isinstance(most, int):
            least, most = (each if isinstance(each, int) else None for each in (least, most))
            conditions.append(f"/(?s:.{{{least or 0},{'' if most is None else most}}})/")
        if isinstance(pattern, str) and (regex := whole_pattern(pattern)) is not None:
            conditions.append(f"/{regex}/")
        if not conditions or not is_only or self._drops_detail:
            return "text"
        # Where the first end is too early for the conditions, a later one would be no end either.
        conditions.append(_NO_END)
        at = len(self._texts)
        terminal = f"TEXT_{at}: ({' & '.join(conditions)}) {literal(_END_TEXT)}"
        self._spend(terminal)
        self._texts.append(f"{terminal}\ntext_{at}[lazy]: TEXT_{at}")
        return f"text_{at}"

    def _checked(self, schema: Schema) -> str:
        value = json_rule(schema, is_lenient=not self._is_strict)
        self._spend(value)
        self._values.append(value)
        return value

    def _spend(self, text: str) -> None:
        """Count: what parameters share is written once for each of them."""
        self._num_chars += len(text)
        check_length(self._num_chars)


def check_strict(tools: list[Tool]) -> None:
    """Refuse a strict tool whose schema says what no grammar can hold a call to.

    Raises:
        BadRequestError: there is one; names it and the keyword.
    """
    for at, tool in enumerate(tools):
        assert tool.function is not None
        if not tool.function.strict:
            continue
        problem: str | None
        try:
            schema = {**(tool.function.parameters or {}), "type": "object"}
            value = json_rule(schema, is_lenient=False)
            problem = problem_of(f"start: {value}\n") or dead_end(value)
        except UnfitError as exc:
            problem = str(exc)
        if problem is not None:
            raise BadRequestError(
                f"tool {tool.function.name!r} is strict, and its parameters cannot be followed: "
                f"{problem}; change them, or leave `strict` out",
                param=f"tools[{at}].function.parameters",
            )


def whole_pattern(pattern: str) -> str | None:
    """Return the regular expression of all texts that a schema's pattern is found in.

    None where anchors stand in places that this cannot tell.
    """
    inner = pattern.removeprefix("^")
    is_ended = inner.endswith("$") and not inner.endswith("\\$")
    inner = inner[:-1] if is_ended else inner
    if (inner != pattern and "|" in inner) or re.search(r"(?<![\\\[])[\^$]", inner):
        return None
    begin = "" if pattern.startswith("^") else "(?s:.*)"
    end = "" if is_ended else "(?s:.*)"
    return f"{begin}(?:{inner}){end}".replace("\\/", "/").replace("/", "\\/").replace("\n", "\\n")


def _any_call(tools: list[Tool]) -> str:
    return f"call: {' | '.join(f'call_{at}' for at in range(len(tools)))}"


def _definitions(root: Schema) -> Schema:
    """What a schema's local references may point into."""
    return {key: root[key] for key in ("$defs", "definitions") if key in root}


def _spelling(value: Any) -> str:
    """An enumerated value as a template would write it."""
    if isinstance(value, str):
        return literal(value)
    if isinstance(value, bool):
        return f"{literal(str(value).lower())} | {literal(str(value))}"
    return _NULL if value is None else literal(msgspec.json.encode(value).decode())
