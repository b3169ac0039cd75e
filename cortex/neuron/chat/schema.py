"""What a tool's JSON schema says about its parameters: their types, and casting text to them."""

from typing import Any

import msgspec

from cortex.core.openai import Tool

MAX_SCHEMA_NODES = 20_000
MAX_OBJECT_PROPERTIES = 1000
# Levels of objects and lists, with those that references lead to: a grammar's compiler goes down
# them on a thread's stack, and its overflow would end the process.
MAX_SCHEMA_LEVELS = 1000
_MAX_REF_CHARS = 1024
_MAX_REF_DEPTH = 16
_JSON_TYPES: dict[type, str] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
    type(None): "null",
}
_WORDS: dict[str, bool | None] = {"true": True, "false": False, "null": None, "none": None}

Schema = dict[str, Any]


def resolve(schema: Any, root: Schema) -> Schema:
    """Follow local `$ref`s; what is no schema object, or refers outside, reads as `{}`."""
    for _ in range(_MAX_REF_DEPTH):
        if not isinstance(schema, dict):
            return {}
        ref = schema.get("$ref")
        if not isinstance(ref, str):
            return schema
        schema = _at_pointer(ref, root)
    return {}


def _at_pointer(ref: str, root: Schema) -> Any:
    if not ref.startswith("#") or len(ref) > _MAX_REF_CHARS:
        return {}
    place: Any = root
    for key in ref[1:].split("/")[1:]:
        name = key.replace("~1", "/").replace("~0", "~")
        place = place.get(name) if isinstance(place, dict) else None
    return place


def excess(schema: Schema) -> str | None:
    """Say what makes a schema too large to compile, or None; takes time by its size only."""
    nodes: list[Any] = []
    waiting: list[Any] = [schema]
    refs: set[str] = set()
    while waiting:
        node = waiting.pop()
        nodes.append(node)
        if len(nodes) > MAX_SCHEMA_NODES:
            return f"it has over {MAX_SCHEMA_NODES} objects and lists"
        if isinstance(node, dict):
            if len(node) > MAX_OBJECT_PROPERTIES:
                return f"it has an object of over {MAX_OBJECT_PROPERTIES} entries"
            if isinstance(ref := node.get("$ref"), str):
                refs.add(ref)
        waiting += _nested(node)
    levels: dict[int, int] = {}
    for node in reversed(nodes):  # children come after their parents
        levels[id(node)] = 1 + max((levels[id(each)] for each in _nested(node)), default=0)
    whole = levels[id(schema)]
    # At worst each reference leads on to the next one.
    num_levels = whole + sum(levels.get(id(_at_pointer(ref, schema)), whole) for ref in refs)
    if num_levels > MAX_SCHEMA_LEVELS:
        return f"it and its references are nested over {MAX_SCHEMA_LEVELS} levels deep"
    return None


def _nested(node: Any) -> list[Any]:
    values = node.values() if isinstance(node, dict) else node
    return [each for each in values if isinstance(each, dict | list)]


TypesMemory = dict[int, frozenset[str]]


def json_types(schema: Any, root: Schema, known: TypesMemory | None = None) -> frozenset[str]:
    """Return the JSON types a schema allows; empty means any.

    Args:
        known: what calls for other schemas of the same live `root` found out.
    """
    return _json_types(schema, root, {} if known is None else known, 0)


def _json_types(schema: Any, root: Schema, known: TypesMemory, depth: int) -> frozenset[str]:
    """As `json_types`; `known` has what was looked at already, so that each schema costs once."""
    schema = resolve(schema, root)
    if not schema:
        return frozenset()
    if id(schema) not in known:
        # A schema that refers to itself reads as any in there.
        known[id(schema)] = frozenset()
        known[id(schema)] = _types_of(schema, root, known, depth)
    return known[id(schema)]


def _types_of(schema: Schema, root: Schema, known: TypesMemory, depth: int) -> frozenset[str]:
    declared = schema.get("type")
    if isinstance(declared, str):
        return frozenset([declared])
    if isinstance(declared, list):
        return frozenset(name for name in declared if isinstance(name, str))
    values = choices(schema)
    if values is not None:
        return frozenset(_JSON_TYPES[type(value)] for value in values)
    for key in ("anyOf", "oneOf"):
        options = schema.get(key)
        if isinstance(options, list) and options and depth < _MAX_REF_DEPTH:
            found = [_json_types(option, root, known, depth + 1) for option in options]
            return frozenset[str]().union(*found) if all(found) else frozenset()
    if isinstance(schema.get("properties"), dict):
        return frozenset(["object"])
    return frozenset(["array"]) if "items" in schema else frozenset()


def choices(schema: Schema) -> list[Any] | None:
    """Return the values of `enum` or `const`, or None where any value is allowed."""
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) and values else None


def cast(text: str, schema: Any, root: Schema) -> Any:
    """Return a parameter's text as a value of its schema's type; what does not fit stays text."""
    types = json_types(schema, root)
    if "string" in types:
        return _cast_loosely(text, types)
    value = _parsed(text.strip())
    if value is _NOT_JSON or (types and not _is_of(value, types)):
        return text
    if isinstance(value, float) and value.is_integer() and types == {"integer"}:
        return int(value)
    return value


def _cast_loosely(text: str, types: frozenset[str]) -> Any:
    """Where a string is allowed only a plain null, list or object is read as anything else."""
    stripped = text.strip()
    if "null" in types and stripped in ("null", "None"):
        return None
    if stripped[:1] in ("[", "{"):
        value = _parsed(stripped)
        if value is not _NOT_JSON and _is_of(value, types):
            return value
    return text


_NOT_JSON = object()


def _parsed(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        # Templates write Python's True, False and None as often as JSON's words.
        return _WORDS.get(text.lower(), _NOT_JSON)


def _is_of(value: Any, types: frozenset[str]) -> bool:
    name = _JSON_TYPES[type(value)]
    if name == "integer":
        return "integer" in types or "number" in types
    if name == "number":
        return "number" in types or ("integer" in types and value.is_integer())
    return name in types


class ToolTable:
    """The declared tools by name, with the schemas of their parameters."""

    def __init__(self, tools: list[Tool]) -> None:
        self.schemas: dict[str, Schema] = {
            tool.function.name: tool.function.parameters or {}
            for tool in tools
            if tool.function is not None
        }
        # Longest first: a name may begin another one.
        self.names = sorted(self.schemas, key=len, reverse=True)

    def properties(self, name: str) -> Schema:
        """Return the declared parameters of a tool with their schemas; empty if unknown."""
        found = self.schemas.get(name, {}).get("properties")
        return found if isinstance(found, dict) else {}
