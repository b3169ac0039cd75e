"""A stand-in for systemd's end of the notify socket."""

import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

WAIT_S = 60.0


class ServiceManager:
    """Takes what a service tells of itself.

    Args:
        abstract: listen under a name in the abstract namespace and not at a path.

    Attributes:
        messages: what has come, each as the values of its lines by name.
    """

    def __init__(self, *, abstract: bool = False) -> None:
        self.messages: list[dict[str, str]] = []
        # A socket's path is at most 107 bytes long, and pytest's directories are longer.
        self._folder = tempfile.TemporaryDirectory(prefix="notify-")
        path = str(Path(self._folder.name) / "notify")
        self.address = f"@{path}" if abstract else path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{path}" if abstract else path)

    def __enter__(self) -> "ServiceManager":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()
        self._folder.cleanup()

    def environment(self, **more: str) -> dict[str, str]:
        """What a service's process is given."""
        return {"NOTIFY_SOCKET": self.address, **more}

    def read(self) -> list[dict[str, str]]:
        """Take what is there, without waiting; return all that has come."""
        self._socket.setblocking(False)
        try:
            while True:
                self._take()
        except BlockingIOError:
            return self.messages

    def until(self, test: Callable[[dict[str, str]], object], limit_s: float = WAIT_S) -> None:
        """Read on until a message comes that passes."""
        deadline_s = time.monotonic() + limit_s
        while True:
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, self.messages
            self._socket.settimeout(left_s)
            if test(self._take()):
                return

    def _take(self) -> dict[str, str]:
        lines = self._socket.recv(4096).decode().split("\n")
        message = dict(line.split("=", 1) for line in lines)
        self.messages.append(message)
        return message
