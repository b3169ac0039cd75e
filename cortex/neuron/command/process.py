"""An external engine as a process: started under its keeper, its output kept, ended whole."""

import asyncio
import logging
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from cortex.core.errors import LoadFailedError
from cortex.neuron.command.log import EngineLog

KEEPER = Path(__file__).with_name("keeper.py")
OUTPUT_BYTES = 1 << 16
# From the keeper's end to the end of its output.
EXIT_S = 5.0
# How much longer than its own limits the keeper may take.
KEEPER_S = 15.0
MAX_TAIL_CHARS = 2000

_logger = logging.getLogger(__name__)


class EngineProcess:
    """One start of a command.

    Args:
        environment: of the command, all of it.
        grace_s: how long it may take to end after SIGTERM.
    """

    def __init__(
        self,
        model_id: str,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        cwd: str | None,
        grace_s: float,
        log: EngineLog,
    ) -> None:
        self.model_id = model_id
        self.ended = asyncio.Event()
        self.log = log
        self._arguments = list(arguments)
        self._environment = environment
        self._cwd = cwd
        self._grace_s = grace_s
        self._process: asyncio.subprocess.Process | None = None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine log")

    @property
    def pid(self) -> int | None:
        """The keeper's process id; None before the start."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start the command; `own` has to be awaited from then on.

        Raises:
            LoadFailedError: the program is not there or no process can be started.
        """
        program = self._arguments[0]
        if not self._is_there(program):
            raise LoadFailedError(
                f"model '{self.model_id}' cannot be loaded: the program '{program}' of its command "
                "was not found; install it or write its whole path"
            )
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(KEEPER), str(self._grace_s)),
                *self._arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=self._environment,
                cwd=self._cwd,
                start_new_session=True,
            )
        except OSError as exc:
            raise LoadFailedError(
                f"model '{self.model_id}' cannot be loaded: its command cannot be started: {exc}"
            ) from exc

    def _is_there(self, program: str) -> bool:
        if "/" in program:
            return os.access(Path(self._cwd or ".") / program, os.X_OK)
        return shutil.which(program, path=self._environment.get("PATH")) is not None

    async def own(self) -> None:
        """Keep its output until it has ended; a cancelled owner ends it at once."""
        assert self._process is not None
        process = self._process
        try:
            async with asyncio.TaskGroup() as own:
                output = own.create_task(
                    self._keep_output(process), name=f"engine output {self.model_id}"
                )
                await process.wait()
                # Lines printed just before the end still count.
                late = asyncio.get_running_loop().call_later(EXIT_S, output.cancel)
            late.cancel()
        finally:
            if process.stdin is not None:
                # To the keeper this is the end of the neuron, so that it ends what is left.
                process.stdin.close()
            self._writer.shutdown(wait=False)
            self.ended.set()

    async def stop(self) -> None:
        """End it: SIGTERM, the grace, SIGKILL; return when nothing is left of it."""
        self._ask(b"t")
        if not await self._ended_within(self._grace_s + KEEPER_S):
            await self.kill()

    async def kill(self) -> None:
        """End it now; return when nothing is left of it."""
        self._ask(b"k")
        if await self._ended_within(KEEPER_S):
            return
        _logger.error("an engine's keeper does not end", extra={"model": self.model_id})
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)
        await self._ended_within(KEEPER_S)

    @property
    def cause_of_death(self) -> str:
        """How it ended and what it printed last."""
        code = None if self._process is None else self._process.returncode
        if code is None:
            how = "the engine is gone"
        elif code > 128 and code - 128 in set(signal.Signals):
            how = f"the engine was ended by {signal.Signals(code - 128).name}"
        else:
            how = f"the engine ended with exit code {code}"
        return how + self.last_words

    @property
    def last_words(self) -> str:
        """What it printed last, as the end of a message; empty if it printed nothing."""
        text = "\n".join(self.log.tail)[-MAX_TAIL_CHARS:]
        if not text:
            return ""
        where = "" if self.log.is_broken else f"\n(all of it: {self.log.path})"
        return f"; its output ends with:\n{text}{where}"

    def _ask(self, word: bytes) -> None:
        process = self._process
        if process is None or process.returncode is not None or process.stdin is None:
            return
        if not process.stdin.is_closing():
            process.stdin.write(word)

    async def _ended_within(self, limit_s: float) -> bool:
        if self._process is None:
            return True
        try:
            async with asyncio.timeout(limit_s):
                await self.ended.wait()
        except TimeoutError:
            return False
        return True

    async def _keep_output(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        loop = asyncio.get_running_loop()
        # Not for the tail: what a start has to say is what the engine says.
        title = f"--- {shlex.join(self._arguments)}\n".encode()
        await loop.run_in_executor(self._writer, self.log.write, title)
        while data := await process.stdout.read(OUTPUT_BYTES):
            self.log.note(data)
            await loop.run_in_executor(self._writer, self.log.write, data)
