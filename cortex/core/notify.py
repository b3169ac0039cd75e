"""Tell the service manager how this service is: ready, reloading, ending, alive.

The protocol is systemd's `sd_notify`: datagrams of `NAME=value` lines to the Unix socket that
`NOTIFY_SOCKET` names. Without that variable everything here does nothing.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping

# What `systemctl status` shows; longer texts are cut.
MAX_STATUS_CHARACTERS = 300

_logger = logging.getLogger(__name__)


class Notifier:
    """Sends a service's state to its manager; a manager that does not read is no obstacle.

    Args:
        environment: the variables that the manager sets (`core.config.service_environment`).
        pid: of this process; a watchdog that is meant for another one is not fed.
        clock_ns: CLOCK_MONOTONIC, which the manager compares with its own.

    Attributes:
        watchdog_s: after how long without a sign of life the manager ends the service; None
            where it does not ask for any.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        *,
        pid: int | None = None,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self._clock_ns = clock_ns
        self._socket: socket.socket | None = None
        self._has_failed = False
        meant_for = environment.get("WATCHDOG_PID", "")
        is_mine = not meant_for or meant_for == str(pid if pid is not None else os.getpid())
        limit_us = environment.get("WATCHDOG_USEC", "")
        self.watchdog_s: float | None = None
        if self._address is not None and is_mine and limit_us.isdigit() and int(limit_us) > 0:
            self.watchdog_s = int(limit_us) / 1e6

    @property
    def is_listened_to(self) -> bool:
        """Whether there is a manager to tell."""
        return self._address is not None

    def ready(self, status: str) -> None:
        """The service can be used; also the end of a reload."""
        self._send("READY=1", _status(status))

    def reloading(self) -> None:
        """The configuration is being read again; `ready` tells the end of it."""
        now_us = self._clock_ns() // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now_us}", _status("reading the configuration"))

    def stopping(self, status: str) -> None:
        """The service has begun to end."""
        self._send("STOPPING=1", _status(status))

    def extend(self, more_s: float) -> None:
        """Have the manager wait for the end for `more_s` from now on at least."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(more_s * 1e6)}")

    def alive(self) -> None:
        """Feed the watchdog."""
        self._send("WATCHDOG=1")

    def close(self) -> None:
        """Close the socket; a later message opens it again."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, *lines: str) -> None:
        if self._address is None:
            return
        try:
            if self._socket is None:
                self._socket = socket.socket(
                    socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
                )
                # A manager that is behind must not hold up the event loop.
                self._socket.setblocking(False)
            self._socket.sendto("\n".join(lines).encode(), self._address)
        except OSError as exc:
            if not self._has_failed:
                _logger.warning(
                    "the service manager cannot be told of this service's state",
                    extra={"cause": str(exc)},
                )
            self._has_failed = True
        else:
            self._has_failed = False


def _address(text: str) -> str | None:
    """Return the socket's address as the kernel wants it; a leading `@` stands for a NUL byte."""
    if not text:
        return None
    if text.startswith("@"):
        return "\0" + text[1:]
    if text.startswith("/"):
        return text
    _logger.warning(
        "NOTIFY_SOCKET is neither a path nor an abstract name; the service manager is not told "
        "of this service's state",
        extra={"notify_socket": text},
    )
    return None


def _status(text: str) -> str:
    return f"STATUS={' '.join(text.split())[:MAX_STATUS_CHARACTERS]}"
