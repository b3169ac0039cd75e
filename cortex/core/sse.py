"""Split a byte stream into server-sent events, however it was cut in transit."""

from typing import NamedTuple

from cortex.core.errors import UpstreamMalformedError

MAX_EVENT_BYTES = 16 << 20


class SseEvent(NamedTuple):
    """One event; `data` of a comment is its whole line, `event_id` is empty where none came."""

    name: bytes
    data: bytes
    is_comment: bool = False
    event_id: bytes = b""


class SseSplitter:
    """An incremental splitter: bytes in, complete events out.

    Lines may end in LF, CRLF or CR; what follows the last blank line waits for more.
    """

    def __init__(self) -> None:
        self._rest = bytearray()
        self._skip_lf = False

    @property
    def has_rest(self) -> bool:
        """Whether an event has begun and not ended."""
        return bool(self._rest.strip())

    def feed(self, chunk: bytes) -> list[SseEvent]:
        """Return the events that `chunk` completes.

        Raises:
            UpstreamMalformedError: an event is over MAX_EVENT_BYTES.
        """
        if self._skip_lf or b"\r" in chunk:
            chunk = self._with_lf(chunk)
        rest = self._rest
        if rest:
            # Only what is new is searched, so that a large event in small pieces stays cheap.
            searched = len(rest) - 1
            rest += chunk
            if rest.find(b"\n\n", searched) < 0:
                chunk = b""
            else:
                chunk = bytes(rest)
                rest.clear()
        blocks = chunk.split(b"\n\n")
        rest += blocks.pop()
        if len(rest) > MAX_EVENT_BYTES:
            raise UpstreamMalformedError(f"an event is over {MAX_EVENT_BYTES} bytes")
        return [event for event in map(_parse, blocks) if event is not None]

    def _with_lf(self, chunk: bytes) -> bytes:
        """Return a chunk with its line ends as LF; a CRLF may have been cut in two."""
        if not chunk:
            return chunk
        is_second_half = self._skip_lf and chunk.startswith(b"\n")
        self._skip_lf = chunk.endswith(b"\r")
        if is_second_half:
            chunk = chunk[1:]
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _parse(block: bytes) -> SseEvent | None:
    """Read one event's lines; None for a block of nothing but blank lines and unknown fields."""
    if block.startswith(b"data: ") and b"\n" not in block:
        return SseEvent(b"", block[6:])
    name = event_id = b""
    data: list[bytes] = []
    comment = b""
    for line in block.split(b"\n"):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value
        elif field == b"id":
            event_id = value
        elif not field and line:
            comment = line
    if data:
        return SseEvent(name, b"\n".join(data), event_id=event_id)
    return SseEvent(b"", comment, is_comment=True) if comment else None
