"""What an external engine prints: a file of bounded size, and its last lines for error messages."""

import logging
from collections import deque
from pathlib import Path
from urllib.parse import quote

TAIL_LINES = 20
# A longer line is cut in the tail; the file has all of it.
MAX_TAIL_LINE_CHARS = 500
MAX_NAME_CHARS = 200

_logger = logging.getLogger(__name__)


class EngineLog:
    """The output of one model's engine: `FILE` and, once that was full, `FILE.1` before it.

    `write` blocks: call it in a thread. A file that cannot be written costs its lines and
    nothing else.

    Args:
        max_bytes: of both files together.

    Attributes:
        is_broken: whether something could not be written.
    """

    def __init__(self, folder: Path, model_id: str, *, max_bytes: int) -> None:
        self.path = folder / f"{quote(model_id, safe='')[:MAX_NAME_CHARS]}.log"
        self._max_file_bytes = max_bytes // 2
        self._lines: deque[str] = deque(maxlen=TAIL_LINES)
        self._partial = b""
        self.is_broken = False

    @property
    def tail(self) -> list[str]:
        """The last lines, oldest first."""
        return [*self._lines, *([_shown(self._partial)] if self._partial.strip() else [])]

    def note(self, data: bytes) -> None:
        """Remember the last lines of what came; cheap, and without a file."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        # A progress bar redraws one line for ever.
        self._partial = self._partial[-4 * MAX_TAIL_LINE_CHARS :]
        self._lines.extend(_shown(line) for line in lines[-TAIL_LINES:] if line.strip())

    def write(self, data: bytes) -> None:
        """Append to the file, beginning a new one where it would grow over its bound."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                if file.tell() and file.tell() + len(data) > self._max_file_bytes:
                    self.path.replace(self.path.with_name(f"{self.path.name}.1"))
                else:
                    file.write(data)
                    return
            self.path.write_bytes(data)
        except OSError as exc:
            if not self.is_broken:
                self.is_broken = True
                _logger.warning(
                    "the output of an engine cannot be kept",
                    extra={"file": str(self.path), "cause": str(exc)},
                )


def _shown(line: bytes) -> str:
    # Of a line that was redrawn, what stood there last.
    text = line.decode("utf-8", "replace").rstrip().rpartition("\r")[2]
    return text[-MAX_TAIL_LINE_CHARS:]
