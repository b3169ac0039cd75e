"""One external engine of one model: its start, its health, its connections and its end."""

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import anyio
import msgspec

from cortex.core.command import CommandModel
from cortex.core.config import CommandHarness
from cortex.core.errors import CortexError, LoadFailedError, ServiceUnavailableError
from cortex.neuron.command.log import EngineLog
from cortex.neuron.command.process import EngineProcess
from cortex.neuron.command.upstream import Reply, Upstream
from cortex.neuron.engine.protocol import EngineStats, Progress

HOST = "127.0.0.1"
DEFAULT_MAX_IN_FLIGHT = 32
HEALTH_PATHS = ("/health", "/v1/models")
MODELS_PATH = "/v1/models"
# The first look at a starting engine comes soon, the later ones less often.
FIRST_LOOK_S = 0.1
LOOK_FACTOR = 1.5
MAX_LOOK_S = 2.0
HEALTH_EVERY_S = 5.0
HEALTH_LIMIT_S = 5.0
CLOSE_S = 2.0
# The weight of the newest request in the running rates.
RATE_WEIGHT = 0.2

_logger = logging.getLogger(__name__)


class _ListedModel(msgspec.Struct, kw_only=True, frozen=True):
    """One entry of a server's `/v1/models`."""

    id: str
    max_model_len: int | None = None


class _Listing(msgspec.Struct, kw_only=True, frozen=True):
    data: list[_ListedModel] = []


_listing = msgspec.json.Decoder(_Listing)


class CommandLoaded(msgspec.Struct, kw_only=True, frozen=True):
    """What is known of the model that an external engine holds; it meets `LoadedModel`."""

    max_model_len: int
    max_num_seqs: int
    device: str
    num_kv_blocks: int = 0
    weight_bytes: int = 0
    cache_bytes: int = 0
    prefix_match: Literal["block", "snapshot"] | None = None


class CommandEngine:
    """One external engine; it meets `neuron.harness.Engine`.

    Args:
        devices: the GPUs it is placed on; empty for none.
        environment: of the process, before what the placement and `spec.env` add.
        log_dir: where its output is kept.
        max_model_len: tokens of the longest sequence, as the load asked; None: as configured.

    Attributes:
        ended: set when nothing is left of it; `on_end` is called then.
        stats: seats that are free and measured rates.
    """

    def __init__(
        self,
        model_id: str,
        spec: CommandModel,
        *,
        harness: CommandHarness,
        devices: tuple[int, ...],
        environment: Mapping[str, str],
        log_dir: Path,
        clock: Callable[[], float],
        on_end: Callable[[], None] | None = None,
        max_model_len: int | None = None,
    ) -> None:
        self.model_id = model_id
        self.spec = spec
        self.ended = asyncio.Event()
        self.upstream_model = spec.upstream_model or spec.source or model_id
        self._max_in_flight = (
            spec.max_in_flight or harness.admission.max_in_flight or DEFAULT_MAX_IN_FLIGHT
        )
        self.stats = EngineStats(free_slots=self._max_in_flight)
        self._harness = harness
        self._devices = devices
        self._environment = environment
        self._log = EngineLog(log_dir, model_id, max_bytes=harness.log_mb << 20)
        self._clock = clock
        self._on_end = on_end
        self._max_model_len = max_model_len or spec.context
        self._process: EngineProcess | None = None
        self._upstream: Upstream | None = None
        self._health_path: str | None = spec.health_path
        self._alive_s = clock()
        self._is_loaded = False
        self._stopping = False
        self._is_hung = False
        self._num_open = 0
        self._farewell: CortexError | None = None

    @property
    def pid(self) -> int | None:
        """The keeper, under which everything of the engine runs; None before the start."""
        return None if self._process is None else self._process.pid

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Start the command on a free port; `tasks` keeps the task that owns it.

        Raises:
            LoadFailedError: the program is not there or no process can be started.
        """
        port = _free_port()
        values = self._values(port)
        devices = values["devices"]
        environment = {
            **self._environment,
            # NVML counts the cards by their place on the bus; so must the engine.
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": devices,
            **self.spec.environment(values),
        }
        process = EngineProcess(
            self.model_id,
            self.spec.arguments(values),
            environment=environment,
            cwd=self.spec.cwd,
            grace_s=self.spec.stop_timeout_s,
            log=self._log,
        )
        await process.start()
        self._process = process
        self._upstream = Upstream(
            self.model_id, f"http://{HOST}:{port}", connect_s=self._harness.connect_s
        )
        tasks.create_task(self._own(process, self._upstream), name=f"engine {self.model_id}")
        _logger.info(
            "external engine started",
            extra={"model": self.model_id, "port": port, "log": str(self._log.path)},
        )

    def _values(self, port: int) -> dict[str, str]:
        return {
            "model": self.spec.source or self.model_id,
            "host": HOST,
            "port": str(port),
            "devices": ",".join(map(str, self._devices)),
            "num_devices": str(max(1, len(self._devices))),
            "max_model_len": str(self._max_model_len),
        }

    async def load(
        self, *, on_progress: Callable[[Progress], None], timeout_s: float
    ) -> CommandLoaded:
        """Wait until it answers its health check.

        Raises:
            LoadFailedError: it ended first, or did not answer in time; with its last words.
        """
        assert self._process is not None
        on_progress(Progress(phase="starting"))
        try:
            async with asyncio.timeout(timeout_s):
                await self._wait_healthy(self._process)
        except TimeoutError as exc:
            raise LoadFailedError(
                f"model '{self.model_id}' cannot be loaded: the engine did not answer "
                f"{self._health_path or ' or '.join(HEALTH_PATHS)} with 200 within {timeout_s:g} s "
                f"(start_timeout_s){self._process.last_words}"
            ) from exc
        if self._process.ended.is_set():
            raise LoadFailedError(
                f"model '{self.model_id}' cannot be loaded: {self._process.cause_of_death}"
            )
        listed = await self._listed()
        self._alive_s = self._clock()
        self._is_loaded = True
        context = self._max_model_len or (listed.max_model_len if listed else None)
        return CommandLoaded(
            max_model_len=context or 0,
            max_num_seqs=self._max_in_flight,
            device=",".join(f"cuda:{index}" for index in self._devices) or "cpu",
        )

    @property
    def can_serve(self) -> bool:
        """Whether it has answered its health check and has not ended since."""
        return self._is_loaded and not self._stopping and not self.ended.is_set()

    @property
    def cause_of_death(self) -> str:
        """How it ended and what it printed last."""
        assert self._process is not None
        if self._is_hung:
            return (
                f"the engine gave no sign of life for {self.spec.hang_s:g} s (hang_s) and was ended"
                f"{self._process.last_words}"
            )
        return self._process.cause_of_death

    def silent_s(self) -> float:
        """Return 0: its own health check ends an engine that hangs."""
        return 0.0

    async def stop(self, *, grace_s: float, error: CortexError | None = None) -> None:
        """End it; requests in hand end with `error`. It has its own `stop_timeout_s` for that."""
        self._stopping = True
        self._farewell = error
        if error is not None and self._upstream is not None:
            # Many servers would otherwise go on with what they have, SIGTERM or not.
            await self._upstream.close()
        if self._process is not None:
            await self._process.stop()
            await self.ended.wait()

    async def kill(self) -> None:
        """End it now; return when nothing is left of it."""
        self._stopping = True
        if self._process is not None:
            await self._process.kill()
            await self.ended.wait()

    async def post(self, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> Reply:
        """Hand a request on; the answer's head has come.

        Raises:
            UpstreamConnectionError, EngineDiedError: the engine cannot be reached, or hung up.
            ServiceUnavailableError: it is being stopped.
        """
        assert self._upstream is not None
        if self._stopping:
            raise self._farewell or ServiceUnavailableError(
                f"the engine of model '{self.model_id}' is being stopped"
            )
        return await self._upstream.post(path, body, headers)

    @property
    def farewell(self) -> CortexError | None:
        """What requests that a wanted end has cut off are told; None if it was not wanted."""
        return self._farewell

    def note_life(self) -> None:
        """Note that a token came from it."""
        self._alive_s = self._clock()

    def note_open(self, change: int) -> None:
        """Note that a request began (1) or ended (-1)."""
        self._num_open += change
        self.stats = msgspec.structs.replace(
            self.stats,
            num_running=self._num_open,
            free_slots=max(0, self._max_in_flight - self._num_open),
        )

    def note_rates(self, prefill_tok_s: float, decode_tok_s: float) -> None:
        """Add a request's rates to the running ones; 0 says nothing."""
        stats = self.stats
        self.stats = msgspec.structs.replace(
            stats,
            tok_s_prefill=_running(stats.tok_s_prefill, prefill_tok_s),
            tok_s_decode=_running(stats.tok_s_decode, decode_tok_s),
        )

    async def _own(self, process: EngineProcess, upstream: Upstream) -> None:
        try:
            async with asyncio.TaskGroup() as own:
                health = own.create_task(
                    self._watch_health(process), name=f"engine health {self.model_id}"
                )
                await process.own()
                health.cancel()
        finally:
            with anyio.move_on_after(CLOSE_S, shield=True):
                await upstream.close()
            if not self._stopping:
                _logger.warning("engine ended", extra={"model": self.model_id})
            self.ended.set()
            if self._on_end is not None:
                self._on_end()

    async def _wait_healthy(self, process: EngineProcess) -> None:
        pause_s = FIRST_LOOK_S
        while not process.ended.is_set() and not await self._is_healthy():
            try:
                async with asyncio.timeout(pause_s):
                    await process.ended.wait()
            except TimeoutError:
                pause_s = min(pause_s * LOOK_FACTOR, MAX_LOOK_S)

    async def _is_healthy(self) -> bool:
        assert self._upstream is not None
        if self._health_path is not None:
            status, _ = await self._upstream.get(self._health_path, HEALTH_LIMIT_S)
            return status == 200
        for path in HEALTH_PATHS:
            status, _ = await self._upstream.get(path, HEALTH_LIMIT_S)
            if status == 200:
                self._health_path = path
                return True
            if status != 404:
                return False
        return False

    async def _watch_health(self, process: EngineProcess) -> None:
        """End an engine that gives no sign of life: no health, and no tokens either."""
        every_s = min(HEALTH_EVERY_S, self.spec.hang_s / 4)
        while True:
            await asyncio.sleep(every_s)
            if not self._is_loaded or self._stopping:
                continue
            if await self._is_healthy():
                self._alive_s = self._clock()
            elif self._clock() - self._alive_s > self.spec.hang_s:
                _logger.error("external engine hangs; ending it", extra={"model": self.model_id})
                self._is_hung = True
                await process.kill()
                return

    async def _listed(self) -> _ListedModel | None:
        """Return the server's own entry of the model, and take its name over if it is alone."""
        assert self._upstream is not None
        _, body = await self._upstream.get(MODELS_PATH, HEALTH_LIMIT_S)
        try:
            models = _listing.decode(body).data
        except msgspec.DecodeError:
            return None
        by_id = {each.id: each for each in models}
        if self.spec.upstream_model is None and len(models) == 1:
            self.upstream_model = models[0].id
        return by_id.get(self.upstream_model)


def _free_port() -> int:
    """Return a port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _running(average: float, newest: float) -> float:
    if newest <= 0:
        return average
    return newest if average == 0 else (1 - RATE_WEIGHT) * average + RATE_WEIGHT * newest
