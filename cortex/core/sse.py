"""Split a byte stream into server-sent events, however it was cut in transit."""

from typing import NamedTuple

from cortex.core.errors import UpstreamMalformedError

MAX_EVENT_BYTES = 16 << 20


class SseEvent(NamedTuple):
    """One event. A comment has no data and `is_comment` set."""

    name: bytes
    data: bytes
    is_comment: bool = False


COMMENT = SseEvent(b"", b"", is_comment=True)


class SseSplitter:
    """An incremental splitter: bytes in, complete events out.

    Lines may end in LF, CRLF or CR; what follows the last blank line waits for more.
    """

    def __init__(self) -> None:
        self._rest = b""
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
        blocks = (self._rest + self._with_lf(chunk)).split(b"\n\n")
        self._rest = blocks.pop()
        if len(self._rest) > MAX_EVENT_BYTES:
            raise UpstreamMalformedError(f"an event is over {MAX_EVENT_BYTES} bytes")
        return [event for event in map(_parse, blocks) if event is not None]

    def _with_lf(self, chunk: bytes) -> bytes:
        if self._skip_lf and chunk.startswith(b"\n"):
            chunk = chunk[1:]
        if chunk:
            self._skip_lf = chunk.endswith(b"\r")
        if b"\r" in chunk:
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return chunk


def _parse(block: bytes) -> SseEvent | None:
    """Read one event's lines; None for a block of nothing but blank lines and unknown fields."""
    name = b""
    data: list[bytes] = []
    is_comment = False
    for line in block.split(b"\n"):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value
        elif not field and line:
            is_comment = True
    if data:
        return SseEvent(name, b"\n".join(data))
    return COMMENT if is_comment else None
