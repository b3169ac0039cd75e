"""Where a JSON value ends, found while its text is still coming."""

import re

_OUTSIDE = re.compile(r'["{}\[\]]')
_INSIDE = re.compile(r'["\\\x00-\x1f]')
_SCALAR = re.compile(r"[A-Za-z0-9+.\-]*")


class MalformedCallError(ValueError):
    """A text is no tool call."""


class JsonSpan:
    """Finds the end of one value by its quotes and brackets; whether it is valid is not checked.

    Attributes:
        is_complete: the end is found.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._is_string = False
        self._is_escaped = False
        self._is_scalar = False
        self._has_begun = False
        self.is_complete = False

    def scan(self, text: str) -> int:
        """Return how much of the text belongs to the value; without the end that is all of it.

        Args:
            text: what follows that which was scanned before.

        Raises:
            MalformedCallError: it cannot be JSON.
        """
        if not text:
            return 0
        if not self._has_begun:
            self._has_begun = True
            self._is_scalar = text[0] not in '"{['
            if self._is_scalar and not _SCALAR.match(text, 0, 1).group():  # type: ignore[union-attr]
                raise MalformedCallError
        if self._is_scalar:
            return self._scan_scalar(text)
        at = 0
        while at < len(text) and not self.is_complete:
            at = self._scan_string(text, at) if self._is_string else self._scan_brackets(text, at)
        return at

    def _scan_scalar(self, text: str) -> int:
        found = _SCALAR.match(text)
        assert found is not None
        self.is_complete = found.end() < len(text)
        return found.end()

    def _scan_string(self, text: str, at: int) -> int:
        if self._is_escaped:
            self._is_escaped = False
            return at + 1
        found = _INSIDE.search(text, at)
        if found is None:
            return len(text)
        if found.group() == "\\":
            self._is_escaped = True
        elif found.group() == '"':
            self._is_string = False
            self.is_complete = self._depth == 0
        else:
            raise MalformedCallError
        return found.end()

    def _scan_brackets(self, text: str, at: int) -> int:
        found = _OUTSIDE.search(text, at)
        if found is None:
            return len(text)
        mark = found.group()
        if mark == '"':
            self._is_string = True
        else:
            self._depth += 1 if mark in "{[" else -1
            self.is_complete = self._depth == 0
        return found.end()
