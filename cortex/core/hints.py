"""Where in a file a wrong key is, and which one was meant; pure."""

import difflib
import re

from msgspec import inspect

# Tables with more keys than this are not listed in a message.
MAX_LISTED = 12

_UNKNOWN = re.compile(r"unknown field `([^`]*)`")
_AT = re.compile(r" - at `(?:key in )?\$\.?([^`]*)`")


def key_path(message: str) -> str | None:
    """Return the key that a msgspec error is about, such as `gateway.listen`, if any."""
    at = _AT.search(message)
    unknown = _UNKNOWN.search(message)
    parts = [at[1] if at else "", unknown[1] if unknown else ""]
    return ".".join(part for part in parts if part) or None


def suggest(message: str, kind: type) -> str | None:
    """Return which key of a struct was meant where a msgspec error is about an unknown one."""
    unknown = _UNKNOWN.search(message)
    if unknown is None:
        return None
    at = _AT.search(message)
    names = _fields_at(inspect.type_info(kind), at[1] if at else "")
    close = difflib.get_close_matches(unknown[1], names, n=1)
    if close:
        return f"did you mean `{close[0]}`?"
    if 0 < len(names) <= MAX_LISTED:
        return f"known here: {', '.join(names)}"
    return None


def _fields_at(kind: inspect.Type, path: str) -> list[str]:
    for part in filter(None, re.split(r"\.|(?=\[)", path)):
        kind = _inside(kind, part)
    options = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    fields = [each.fields for each in options if isinstance(each, inspect.StructType)]
    return sorted(field.encode_name for field in fields[0]) if fields else []


def _inside(kind: inspect.Type, part: str) -> inspect.Type:
    """Return the type of what is under a key, or of the elements where `part` is an index."""
    options = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    for option in options:
        if isinstance(option, inspect.ListType) and part.startswith("["):
            return option.item_type
        if isinstance(option, inspect.DictType) and part.startswith("["):
            return option.value_type
        if isinstance(option, inspect.StructType):
            for field in option.fields:
                if field.encode_name == part:
                    return field.type
    return inspect.AnyType()
