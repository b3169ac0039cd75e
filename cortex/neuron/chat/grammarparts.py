"""Pieces of grammars in llguidance's Lark syntax, and whether they can be followed."""

from functools import lru_cache
from typing import Any

import llguidance
import msgspec

from cortex.neuron.chat.schema import Schema, excess

MAX_GRAMMAR_CHARS = 512 << 10
_CHECKED_GRAMMARS = 32
_CHECKED_VALUES = 64
_TRIAL_STEPS = 256

_JSON_OPTIONS = {"whitespace_pattern": r"[ \n\t]{1,32}"}


class UnfitError(Exception):
    """A grammar cannot be made; says why."""


def token_or_text(token_id: int | None, text: str) -> str:
    """Return what matches a token, or its text where no single token stands for it."""
    return literal(text) if token_id is None else f"<[{token_id}]>"


def literal(text: str) -> str:
    """Return a Lark string, which is written like a JSON one but without a raw DEL."""
    return msgspec.json.encode(text).decode().replace("\x7f", "\\u007f")


def json_rule(schema: Schema, *, is_lenient: bool = True) -> str:
    """Return what matches the JSON values of a schema.

    Args:
        is_lenient: leave out what llguidance cannot check; else that is a problem of the grammar.

    Raises:
        UnfitError: the schema is too large.
    """
    problem = excess(schema)
    if problem is not None:
        raise UnfitError(problem)
    options: dict[str, Any] = {**_JSON_OPTIONS, "lenient": is_lenient}
    try:
        return f"%json {msgspec.json.encode({**schema, 'x-guidance': options}).decode()}"
    except RecursionError as exc:
        raise UnfitError("it is nested too deep") from exc


@lru_cache(maxsize=_CHECKED_GRAMMARS)
def problem_of(lark: str) -> str | None:
    """Return why llguidance refuses a grammar, or None; agents send the same tools each turn."""
    if len(lark) > MAX_GRAMMAR_CHARS:
        return _too_long()
    is_error, messages = llguidance.LLMatcher.validate_grammar_with_warnings(lark)
    if not is_error:
        return None
    return _first_line(str(messages[0])) if messages else "it is not valid"


def check_length(num_chars: int) -> None:
    """Stop early with a grammar that becomes too long.

    Raises:
        UnfitError: it is over `MAX_GRAMMAR_CHARS`.
    """
    if num_chars > MAX_GRAMMAR_CHARS:
        raise UnfitError(_too_long())


def _too_long() -> str:
    return f"it makes a grammar of over {MAX_GRAMMAR_CHARS} characters"


@lru_cache(maxsize=_CHECKED_VALUES)
def dead_end(value: str) -> str | None:
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
