"""The neuron's side of one engine process: its birth, its frames and its end.

The neuron listens on a Unix socket in a directory only its user can enter; the engine connects.
One task owns the process: it relays what the engine prints to the log, reads frames and deals
them to `Generation`s, and when the process is gone fails what is still open.
"""

import asyncio
import logging
import os
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import msgspec

from cortex.core.errors import (
    CheckpointError,
    CortexError,
    EngineDiedError,
    InsufficientMemoryError,
    LoadFailedError,
    ModelRecoveringError,
    ServiceUnavailableError,
)
from cortex.neuron.engine.protocol import (
    EVENTS,
    LENGTH_BYTES,
    MAX_FRAME_BYTES,
    Cancel,
    Command,
    Embed,
    EngineStats,
    Event,
    ImagePixels,
    Loaded,
    LoadFailed,
    LoadModel,
    Progress,
    Shutdown,
    StepDone,
    Submit,
    TokenEvent,
    encode_frame,
)
from cortex.neuron.scratch import ScratchFolder

# Importing torch on a cold and busy machine takes tens of seconds.
CONNECT_S = 120.0
# From the end of the socket to the end of the process, before it is killed.
EXIT_S = 5.0
TERM_S = 5.0
KILL_S = 10.0
# Events a request may have waiting for its reader; more end it.
MAX_QUEUED_EVENTS = 8192
MAX_LOG_LINE_BYTES = 64 << 10
LAST_LINES = 20
RECOVERING_RETRY_S = 2.0
SOCKET_NAME = "engine.sock"

_logger = logging.getLogger(__name__)
_output = logging.getLogger("cortex.engine")


def recovering_error(model_id: str) -> ModelRecoveringError:
    """Return what a request for a model whose engine has just ended is told."""
    return ModelRecoveringError(
        f"the engine of model '{model_id}' ended unexpectedly and is being restarted",
        param="model",
        retry_after_s=RECOVERING_RETRY_S,
    )


class Generation:
    """The token events of one request's sequences as they come; iterate, then `close`.

    Each item is the index of the sequence and its event; the end follows the last sequence's
    event with a finish reason, or the cancellation of what was left.
    """

    def __init__(self, client: "EngineClient", request_ids: Sequence[int]) -> None:
        self._client = client
        self._request_ids = request_ids
        self._open = set(range(len(request_ids)))
        self._events: deque[tuple[int, TokenEvent]] = deque()
        self._wake = asyncio.Event()
        self._error: CortexError | None = None

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> tuple[int, TokenEvent]:
        """Return the next event.

        Raises:
            EngineDiedError: the engine ended.
            ServiceUnavailableError: the engine was stopped on purpose, or the events were not
                taken fast enough.
        """
        while not self._events:
            if self._error is not None:
                raise self._error.with_traceback(None)
            if not self._open:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        return self._events.popleft()

    def cancel(self, choice_idx: int) -> None:
        """Give one sequence up: the engine is told at once. Harmless after its end."""
        if choice_idx in self._open:
            self._open.discard(choice_idx)
            self._client._cancel(self._request_ids[choice_idx])  # noqa: SLF001  two halves of one
        self._wake.set()

    def close(self) -> None:
        """Give up all sequences that have not ended."""
        for choice_idx in list(self._open):
            self.cancel(choice_idx)

    def _push(self, choice_idx: int, event: TokenEvent) -> None:
        if choice_idx not in self._open:
            return
        if len(self._events) >= MAX_QUEUED_EVENTS:
            self.close()
            self._fail(
                ServiceUnavailableError(
                    f"the answer was not read: {MAX_QUEUED_EVENTS} pieces of it were waiting"
                )
            )
            return
        self._events.append((choice_idx, event))
        if event.finish is not None:
            self._open.discard(choice_idx)
        self._wake.set()

    def _fail(self, error: CortexError) -> None:
        self._open.clear()
        self._events.clear()
        self._error = error
        self._wake.set()


class EngineClient:
    """One engine process and the requests it works on.

    Args:
        command: the program that becomes the process.
        spec: what it is to load.

    Attributes:
        ended: set when the process is gone and nothing is left of it; `on_end` is called then.
        stats: what the last step reported.
        loaded: what the engine said when it could serve; None before.
        pid: the process, None before it is started.
    """

    def __init__(
        self,
        model_id: str,
        command: Sequence[str],
        spec: LoadModel,
        *,
        environment: Mapping[str, str] | None = None,
        clock: Callable[[], float],
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self.model_id = model_id
        self.ended = asyncio.Event()
        self.stats = EngineStats()
        self.loaded: Loaded | None = None
        self.pid: int | None = None
        self._command = command
        self._spec = spec
        self._environment = environment
        self._on_end = on_end
        self._clock = clock
        self._heard_s = clock()
        self._on_progress: Callable[[Progress], None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._connected = asyncio.Event()
        self._outcome: asyncio.Future[Loaded] | None = None
        self._generations: dict[int, tuple[Generation, int]] = {}
        self._next_id = 1
        self._stopping = False
        self._farewell: CortexError | None = None
        self._hung_up = False
        self._last_lines: deque[str] = deque(maxlen=LAST_LINES)

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Start the process; `tasks` keeps the task that owns it from here on.

        Raises:
            LoadFailedError: no socket could be made or no process started.
        """
        server, folder = await self._listen()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                "--socket",
                str(folder.path / SOCKET_NAME),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                limit=MAX_LOG_LINE_BYTES,
                env=self._environment,
                # A session of its own: a Ctrl-C in the terminal is not for it, and one signal
                # reaches whatever it started.
                start_new_session=True,
            )
        except OSError as exc:
            server.close()
            folder.close()
            raise LoadFailedError(f"no engine process could be started: {exc}") from exc
        except BaseException:
            server.close()
            folder.close()
            raise
        self.pid = self._process.pid
        tasks.create_task(self._own(self._process, server, folder), name=f"engine {self.model_id}")

    async def _listen(self) -> tuple[asyncio.Server, ScratchFolder]:
        """Return a server for the engine to connect to, and the folder its socket lies in."""
        folder = None
        try:
            folder = ScratchFolder()
            path = str(folder.path / SOCKET_NAME)
            return await asyncio.start_unix_server(self._accept, path, backlog=1), folder
        except OSError as exc:
            if folder is not None:
                folder.close()
            raise LoadFailedError(
                f"no socket for an engine can be made in the temporary directory: {exc}; "
                "free room there or set TMPDIR to a short path that can be written"
            ) from exc

    async def load(self, *, on_progress: Callable[[Progress], None], timeout_s: float) -> Loaded:
        """Have the engine load its model and wait until it can serve.

        Raises:
            CheckpointError: the checkpoint is unreadable or not of a supported family.
            InsufficientMemoryError: the device has no room for it.
            LoadFailedError: the engine ended, never connected or took too long.
        """
        self._outcome = asyncio.get_running_loop().create_future()
        self._on_progress = on_progress
        if self.ended.is_set():
            raise self._load_error()
        try:
            async with asyncio.timeout(timeout_s):
                await self._connect_or_end()
                self._send(self._spec)
                self.loaded = await self._outcome
        except TimeoutError as exc:
            raise LoadFailedError(
                f"model '{self.model_id}' was not loaded within {timeout_s:g} s; "
                "raise load_timeout_s"
            ) from exc
        return self.loaded

    def submit(
        self, requests: Sequence[Submit | Embed], pixels: Sequence[bytes] = ()
    ) -> Generation:
        """Hand the sequences of a request to the engine, under request ids of this client's.

        Args:
            pixels: of the images that each of the sequences has.

        Raises:
            ModelRecoveringError: the engine has ended.
            ServiceUnavailableError: it was stopped on purpose.
        """
        if not self.can_serve:
            # Nothing was begun, so the caller may simply come again.
            raise self._farewell or recovering_error(self.model_id)
        request_ids = range(self._next_id, self._next_id + len(requests))
        self._next_id += len(requests)
        generation = Generation(self, request_ids)
        if not self._generations:
            self._heard_s = self._clock()
        for choice_idx, (request_id, request) in enumerate(zip(request_ids, requests, strict=True)):
            self._generations[request_id] = (generation, choice_idx)
            for each in pixels:
                self._send(ImagePixels(request_id=request_id, pixels=each))
            self._send(msgspec.structs.replace(request, request_id=request_id))
        return generation

    @property
    def can_serve(self) -> bool:
        """Whether the engine has loaded its model and its connection stands."""
        return self.loaded is not None and not self._stopping and self._is_linked()

    def silent_s(self) -> float:
        """Return how long an engine with open requests has reported nothing; 0 without any."""
        return self._clock() - self._heard_s if self._generations else 0.0

    async def stop(self, *, grace_s: float, error: CortexError | None = None) -> None:
        """End the process: ask, then SIGTERM, then SIGKILL; return when it is gone.

        Args:
            error: what requests that are still open end with.
        """
        self._stopping = True
        self._farewell = error
        if error is not None:
            self._fail_all(error)
        if self._process is None:
            return
        if self._is_linked():
            self._send(Shutdown())
            if await self._ended_within(grace_s):
                return
        self._signal(signal.SIGTERM)
        if not await self._ended_within(TERM_S):
            await self.kill()

    async def kill(self) -> None:
        """End the process now; return when it is gone."""
        self._stopping = True
        if self._process is None:
            return
        self._signal(signal.SIGKILL)
        if not await self._ended_within(KILL_S):
            _logger.error("engine process does not die", extra=self._fields())

    @property
    def cause_of_death(self) -> str:
        """How the process ended and what it printed last."""
        code = None if self._process is None else self._process.returncode
        if code is None:
            how = "closed its connection"
        elif code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        else:
            how = f"ended with exit code {code}"
        said = next((line for line in reversed(self._last_lines) if line.strip()), "")
        return f"the engine process {how}" + (f"; its last words: {said[:300]}" if said else "")

    async def _ended_within(self, limit_s: float) -> bool:
        try:
            async with asyncio.timeout(limit_s):
                await self.ended.wait()
        except TimeoutError:
            return False
        return True

    async def _connect_or_end(self) -> None:
        try:
            async with asyncio.timeout(CONNECT_S):
                # `_finish` sets it too, so that an early death is seen at once.
                await self._connected.wait()
        except TimeoutError as exc:
            raise LoadFailedError(
                f"the engine of '{self.model_id}' did not come up within {CONNECT_S:g} s"
            ) from exc
        if self._writer is None:
            raise self._load_error()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._writer is not None:
            writer.close()
            return
        self._reader = reader
        self._writer = writer
        self._connected.set()

    async def _own(
        self, process: asyncio.subprocess.Process, server: asyncio.Server, folder: ScratchFolder
    ) -> None:
        try:
            async with asyncio.TaskGroup() as own:
                output = own.create_task(
                    self._relay_output(process), name=f"engine output {self.model_id}"
                )
                frames = own.create_task(
                    self._read_frames(process), name=f"engine frames {self.model_id}"
                )
                await process.wait()
                # Nothing it started may outlive it.
                self._signal_group(process.pid, signal.SIGKILL)
                if self._writer is None:
                    frames.cancel()
                # Frames and lines sent just before the end still count.
                late = asyncio.get_running_loop().call_later(EXIT_S, _cancel_all, output, frames)
            late.cancel()
        finally:
            if process.returncode is None:
                self._signal_group(process.pid, signal.SIGKILL)
            server.close()
            if self._writer is not None:
                self._writer.close()
            folder.close()
            self._finish()

    def _finish(self) -> None:
        if not self._stopping:
            _logger.warning("engine ended", extra={**self._fields(), "cause": self.cause_of_death})
        self._fail_all(self._death())
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_exception(self._load_error())
            # Whoever loads may have seen the end already, and then asks for no outcome.
            self._outcome.exception()
        self.ended.set()
        self._connected.set()
        if self._on_end is not None:
            self._on_end()

    async def _relay_output(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while True:
            try:
                line = await process.stdout.readuntil()
            except asyncio.IncompleteReadError as exc:
                line = exc.partial
                if not line:
                    return
            except asyncio.LimitOverrunError as exc:
                line = await process.stdout.read(exc.consumed or MAX_LOG_LINE_BYTES)
            text = line.decode("utf-8", "replace").rstrip()
            if text:
                self._last_lines.append(text)
                _output.info("%s", text, extra={"model": self.model_id})

    async def _read_frames(self, process: asyncio.subprocess.Process) -> None:
        await self._connected.wait()
        try:
            while True:
                head = await self._reader.readexactly(LENGTH_BYTES)
                size = int.from_bytes(head, "little")
                if size > MAX_FRAME_BYTES:
                    _logger.error("engine sent an oversized frame", extra=self._fields())
                    self._signal(signal.SIGKILL)
                    break
                self._take(EVENTS.decode(await self._reader.readexactly(size)))
        except (asyncio.IncompleteReadError, OSError):
            pass
        except msgspec.DecodeError:
            _logger.exception("engine sent a frame that is none", extra=self._fields())
            self._signal(signal.SIGKILL)
        # Whoever waits for tokens need not wait for the process to be reaped.
        self._hung_up = True
        self._fail_all(self._death())
        try:
            async with asyncio.timeout(EXIT_S):
                await process.wait()
        except TimeoutError:
            self._signal(signal.SIGKILL)

    def _take(self, event: Event) -> None:
        self._heard_s = self._clock()
        match event:
            case StepDone():
                self.stats = event.stats
                for each in event.events:
                    self._deal(each)
            case Progress():
                if self._on_progress is not None:
                    self._on_progress(event)
            case Loaded():
                self.stats = EngineStats(
                    free_slots=event.max_num_seqs, free_blocks=event.num_kv_blocks
                )
                if self._outcome is not None and not self._outcome.done():
                    self._outcome.set_result(event)
            case LoadFailed():
                if self._outcome is not None and not self._outcome.done():
                    self._outcome.set_exception(_load_failure(self.model_id, event))

    def _deal(self, event: TokenEvent) -> None:
        found = self._generations.get(event.request_id)
        if found is None:
            return
        if event.finish is not None:
            del self._generations[event.request_id]
        generation, choice_idx = found
        generation._push(choice_idx, event)  # noqa: SLF001  two halves of one

    def _cancel(self, request_id: int) -> None:
        if self._generations.pop(request_id, None) is not None:
            self._send(Cancel(request_id=request_id))

    def _fail_all(self, error: CortexError) -> None:
        failed, self._generations = self._generations, {}
        for generation, _ in failed.values():
            generation._fail(error)  # noqa: SLF001  two halves of one

    def _death(self) -> EngineDiedError:
        return EngineDiedError(
            f"the engine of model '{self.model_id}' ended while it served the request"
        )

    def _load_error(self) -> LoadFailedError:
        return LoadFailedError(f"model '{self.model_id}' cannot be loaded: {self.cause_of_death}")

    def _is_linked(self) -> bool:
        if self._writer is None or self._hung_up:
            return False
        return not self._writer.is_closing()

    def _send(self, command: Command) -> None:
        if self._writer is not None and self._is_linked():
            self._writer.write(encode_frame(command))

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            self._signal_group(self._process.pid, number)

    @staticmethod
    def _signal_group(pid: int, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, number)

    def _fields(self) -> dict[str, object]:
        return {"model": self.model_id, "pid": self.pid}


def _cancel_all(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()


def _load_failure(model_id: str, event: LoadFailed) -> CortexError:
    message = f"model '{model_id}' cannot be loaded: {event.message}"
    match event.code:
        case "unreadable_checkpoint" | "unsupported_model":
            return CheckpointError(message)
        case "out_of_memory":
            return InsufficientMemoryError(message)
        case "internal":
            return LoadFailedError(message)
