"""Decode JSON bodies; what is wrong with one comes out as an error that names the field."""

import re
from collections.abc import Mapping
from typing import TypeVar

import msgspec

from cortex.core.errors import BadRequestError, MalformedJsonError, MissingModelError

T = TypeVar("T")

_PATH = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$")
_MISSING = re.compile(r"missing required field `([^`]+)`")
# Half of a character outside the basic plane, as a client sends it that cut a text in an emoji.
_LONE_SURROGATE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
# A cross-field check says which field it is about by beginning with its name.
_FIRST_WORD = re.compile(
    r"([a-z]+(?:_[a-z]+)+|messages|prompt|input(?:\[\d+\])?|stop|n|tools)(?!\w)"
)


def decode_body(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """Decode a JSON body; halves of surrogate pairs are read as the replacement character.

    Raises:
        MissingModelError: the object has no `model`.
        BadRequestError: a field is missing, of the wrong type or out of bounds; `param` is its
            path.
        MalformedJsonError: it is not JSON.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as exc:
        raise _bad_request(str(exc)) from exc
    except (msgspec.DecodeError, UnicodeError, RecursionError) as exc:
        whole = _LONE_SURROGATE.sub(rb"\\ufffd", body)
        if whole != body:
            return decode_body(decoder, whole)
        reason = str(exc) or "it is nested too deeply"
        what = "is empty" if not body.strip() else f"is not valid JSON: {reason}"
        raise MalformedJsonError(f"the request body {what}") from exc


def decode_query(kind: type[T], fields: Mapping[str, object]) -> T:
    """Convert the parameters of a query, which come as text.

    Raises:
        BadRequestError: one is of the wrong type or out of bounds; `param` names it.
    """
    try:
        return msgspec.convert(fields, kind, strict=False)
    except msgspec.ValidationError as exc:
        raise _bad_request(str(exc)) from exc


def _bad_request(text: str) -> BadRequestError:
    found = _PATH.search(text)
    param = found.group(1) if found else None
    message = _PATH.sub("", text)
    missing = _MISSING.search(message)
    if missing:
        param = f"{param}.{missing.group(1)}" if param else missing.group(1)
        if param == "model":
            return MissingModelError("the request names no model; set `model`", param=param)
        return BadRequestError(f"invalid request: `{param}` is missing", param=param)
    if param:
        return BadRequestError(f"invalid request: {param}: {message}", param=param)
    word = _FIRST_WORD.match(message)
    return BadRequestError(f"invalid request: {message}", param=word.group(1) if word else None)
