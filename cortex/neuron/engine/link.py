"""The engine's end of the socket to its neuron: a thread that reads, a bounded way to send."""

import contextlib
import logging
import os
import queue
import socket
import struct
import threading
from collections.abc import Callable
from typing import Literal

import msgspec

from cortex.neuron.engine.protocol import (
    COMMANDS,
    LENGTH_BYTES,
    MAX_FRAME_BYTES,
    Command,
    Event,
    Shutdown,
    encode_frame,
)

_log = logging.getLogger(__name__)

# Commands read but not yet taken; beyond it the neuron has to wait with sending.
MAX_COMMANDS = 1024
# A neuron that takes nothing for so long is wedged, and its engine ends.
SEND_LIMIT_S = 10.0
SEND_BUFFER_BYTES = 1 << 20
# What the engine may still do once its neuron is gone, before the process is ended under it.
GRACE_S = 0.5
EXIT_ORPHANED = 3


_Note = Literal["wake", "end"]


class LinkClosedError(Exception):
    """The neuron asked for the end, closed the socket, died or stopped reading."""


class NeuronLink:
    """Commands from and events to the neuron, over a connected stream socket.

    The reading thread starts at once. When the socket ends it wakes `receive`, and ends the
    process itself if the main thread does not within `GRACE_S`: a step or a load may be long,
    and an engine must never outlive its neuron.

    Args:
        connection: connected Unix stream socket, blocking.
        send_limit_s: how long the neuron may take nothing before `send` gives up.
        end_process: called with an exit code; ends the process without cleaning up.
    """

    def __init__(
        self,
        connection: socket.socket,
        *,
        send_limit_s: float = SEND_LIMIT_S,
        end_process: Callable[[int], object] = os._exit,
    ) -> None:
        seconds, fraction = divmod(send_limit_s, 1)
        limit = struct.pack("ll", int(seconds), int(fraction * 1e6))  # a C timeval
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self._connection = connection
        self._end_process = end_process
        self._commands: queue.Queue[Command | _Note] = queue.Queue(MAX_COMMANDS)
        self._ended = threading.Event()
        self._done = threading.Event()
        self._reader = threading.Thread(target=self._read, name="neuron reader", daemon=True)
        self._reader.start()

    def receive(self, *, wait: bool) -> list[Command]:
        """Return the commands that have come; with `wait`, at least one unless `wake` is called.

        Raises:
            LinkClosedError: the neuron asked for the end or is gone.
        """
        self.check()
        commands: list[Command] = []
        if wait:
            commands += self._checked(self._commands.get())
        with contextlib.suppress(queue.Empty):
            while len(commands) < MAX_COMMANDS:
                commands += self._checked(self._commands.get_nowait())
        return commands

    def wake(self) -> None:
        """Let `receive` return without a command; may be called from any thread."""
        # A full queue wakes it as well.
        with contextlib.suppress(queue.Full):
            self._commands.put_nowait("wake")

    def check(self) -> None:
        """Raise LinkClosedError if the neuron asked for the end or is gone."""
        if self._ended.is_set():
            raise LinkClosedError("the neuron ended this engine or is gone")

    def send(self, event: Event) -> None:
        """Send one event.

        Raises:
            LinkClosedError: the neuron is gone, or has read nothing for too long.
        """
        try:
            self._connection.sendall(encode_frame(event))
        except BlockingIOError as exc:
            raise LinkClosedError("the neuron stopped reading") from exc
        except OSError as exc:
            raise LinkClosedError(f"the neuron is gone: {exc}") from exc

    def close(self) -> None:
        """Close the socket; the main thread is done."""
        self._done.set()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        self._reader.join(GRACE_S)

    def _checked(self, command: Command | _Note) -> list[Command]:
        if command == "end":
            raise LinkClosedError("the neuron ended this engine or is gone")
        return [] if command == "wake" else [command]

    def _read(self) -> None:
        try:
            with self._connection.makefile("rb") as stream:
                while True:
                    command = _read_command(stream.read)
                    if command is None:
                        break
                    if isinstance(command, Shutdown):
                        self._end()
                        continue
                    self._commands.put(command)
        except (OSError, ValueError, msgspec.MsgspecError) as exc:
            if not self._done.is_set():
                _log.error("the neuron's commands cannot be read: %s", exc)
        self._end()
        if not self._done.wait(GRACE_S):
            self._end_process(EXIT_ORPHANED)

    def _end(self) -> None:
        self._ended.set()
        # A full queue wakes the main thread as well, which then sees the event.
        with contextlib.suppress(queue.Full):
            self._commands.put_nowait("end")


def _read_command(read: Callable[[int], bytes]) -> Command | None:
    """Read one frame; None at the end of the stream.

    Raises:
        ValueError: the frame is over MAX_FRAME_BYTES or breaks off.
        MsgspecError: its body is not a command.
    """
    prefix = read(LENGTH_BYTES)
    if not prefix:
        return None
    size = int.from_bytes(prefix, "little")
    if size > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {size} bytes")
    body = read(size)
    if len(body) < size:
        raise ValueError("a frame broke off")
    command: Command = COMMANDS.decode(body)
    return command
