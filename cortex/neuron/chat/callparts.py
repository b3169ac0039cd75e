"""What all readers of tool calls share: their text, their events, and how they wait for more."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import msgspec

from cortex.neuron.chat.jsonspan import MalformedCallError

MAX_NAME_CHARS = 1024


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins; `id` is what the model itself calls it, if it does."""

    name: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class CallText:
    """More of the arguments' JSON text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call is complete."""


CallEvent = CallStart | CallText | CallEnd
Reading = Generator[CallEvent | None, None, None]
Finding = Generator[CallEvent | None, None, str]


class Source:
    """The text of a call.

    Attributes:
        ahead: what is not read yet.
        taken: what was read.
        is_ended: nothing will follow what is ahead.
    """

    def __init__(self) -> None:
        self.ahead = ""
        self.taken: list[str] = []
        self.is_ended = False

    def take(self, length: int) -> str:
        """Return the next characters, which count as read then."""
        piece, self.ahead = self.ahead[:length], self.ahead[length:]
        self.taken.append(piece)
        return piece


def close(source: Source, closing: str) -> Reading:
    """Read the closing marker; at the end of all text it may be missing."""
    if not closing:
        return
    yield from skip_space(source)
    if source.is_ended and not source.ahead:
        return
    yield from next_is(source, closing)
    source.take(len(closing))


def skip_space(source: Source) -> Reading:
    """Read white space, up to something else or the end of all text."""
    while True:
        source.take(len(source.ahead) - len(source.ahead.lstrip()))
        if source.ahead or source.is_ended:
            return
        yield None


def skip_newline(source: Source) -> Reading:
    """Read one newline if there is one."""
    while not source.ahead:
        yield from more(source)
    if source.ahead[0] == "\n":
        source.take(1)


def next_is(source: Source, *marks: str) -> Finding:
    """Return which of some marks is next, without reading it; none may begin another.

    Raises:
        MalformedCallError: another text is next.
    """
    while True:
        for mark in marks:
            if source.ahead.startswith(mark):
                return mark
        if not any(mark.startswith(source.ahead) for mark in marks):
            raise MalformedCallError
        yield from more(source)


def more(source: Source) -> Reading:
    """Wait for more text.

    Raises:
        MalformedCallError: there is none.
    """
    if source.is_ended:
        raise MalformedCallError
    yield None


def decoded(text: str) -> Any:
    """Return a JSON text's value.

    Raises:
        MalformedCallError: it is no JSON.
    """
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as exc:
        raise MalformedCallError from exc


def encoded(value: Any) -> str:
    """Return a value's JSON text."""
    return msgspec.json.encode(value).decode()


def overlap(text: str, marker: str) -> int:
    """Return the length of the longest end of `text` that begins `marker` but is not all of it."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0
