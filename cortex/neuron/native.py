"""The harness of our own engine: the checkpoints of this host and of the hub, loaded by torch."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cortex.core.config import TorchHarness
from cortex.core.errors import (
    BadRequestError,
    CortexError,
    ModelNotFoundError,
    UnsupportedFieldError,
)
from cortex.core.neuron_api import LoadRequest
from cortex.neuron.chat.model import ChatModel
from cortex.neuron.engine.protocol import LoadModel
from cortex.neuron.engine_client import EngineClient
from cortex.neuron.harness import EngineLimits, ModelNotLoadedError
from cortex.neuron.hub import Hub, is_repo_id, parse_source
from cortex.neuron.jobs import Job
from cortex.neuron.library import Entry, Library
from cortex.neuron.memory import Placement, Size, Wish, cache_bytes, need_bytes
from cortex.neuron.models.source import ModelSource

NOT_LOADED_RETRY_S = 5.0

OpenChat = Callable[[Entry], ChatModel]
_logger = logging.getLogger(__name__)


class NativeHarness:
    """Finds checkpoints and makes engines that serve them.

    Args:
        engine_command: the program that becomes an engine process.
        environment: of the engine processes; None passes on this one's.
        open_chat: loads what turns messages into tokens; blocking, called in a thread.
        clock: monotonic seconds.
    """

    name = "torch"

    def __init__(
        self,
        *,
        config: TorchHarness,
        library: Library,
        hub: Hub,
        engine_command: Sequence[str],
        open_chat: OpenChat,
        clock: Callable[[], float],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._config = config
        self._library = library
        self._hub = hub
        self._engine_command = engine_command
        self._open_chat = open_chat
        self._clock = clock
        self._environment = environment
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="checkpoints")
        # A directory that hangs may hang this thread and no other.
        self._scanner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="library scan")
        self._scan: asyncio.Future[None] | None = None

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._scanner.shutdown(wait=False, cancel_futures=True)

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What the last look at the directories found, by id."""
        return self._library.entries

    def find(self, model_id: str) -> Entry | None:
        """Return the entry of an id."""
        return self._library.find(model_id)

    async def refresh(self, limit_s: float) -> None:
        """Look at the model directories again, unless that was done a moment ago.

        A look that takes longer than `limit_s` goes on without the caller.
        """
        if self._library.is_fresh:
            return
        if self._scan is None or self._scan.done():
            loop = asyncio.get_running_loop()
            self._scan = loop.run_in_executor(self._scanner, self._library.scan)
        # Unlike a timeout, this leaves the look to those who come after.
        done, _ = await asyncio.wait([self._scan], timeout=limit_s)
        if not done:
            _logger.warning("a model directory does not answer; using the last listing")

    def check(self, request: LoadRequest) -> None:
        """Raise for an option that cannot be met, or a model neither here nor on the hub.

        Raises:
            BadRequestError: an option is not supported.
            ModelNotFoundError: nothing goes by that name.
        """
        if (request.tensor_parallel or 1) != 1:
            raise UnsupportedFieldError(
                "tensor parallelism is not supported; a model runs on one device",
                param="tensor_parallel",
            )
        if request.max_model_len is not None and request.max_model_len < 1:
            raise BadRequestError("max_model_len must be at least 1", param="max_model_len")
        if request.source is not None:
            parse_source(request.source)
        elif self.find(request.model_id) is None and not self._is_on_hub(request.model_id):
            raise self.missing(request.model_id)

    def missing(self, model_id: str) -> CortexError:
        """Return what a request for a model that is not resident is told."""
        if self.find(model_id) is not None:
            return ModelNotLoadedError(
                f"model '{model_id}' is not loaded; POST /models/load loads it",
                param="model",
                retry_after_s=NOT_LOADED_RETRY_S,
            )
        hint = "GET /models lists what it can serve"
        if is_repo_id(model_id):
            on_hub = "POST /models/load fetches it" if self._config.hub else "the hub is off"
            hint += f"; if it is a repository on the hub, {on_hub}"
        return ModelNotFoundError(f"this neuron has no model '{model_id}'; {hint}", param="model")

    async def locate(self, request: LoadRequest, job: Job) -> Entry:
        """Return the checkpoint with its facts, fetching it if need be.

        Raises:
            CheckpointError: it cannot be read.
            UnsupportedFieldError: other weights are asked for than those that are stored.
            HubUnreachableError, ModelNotFoundError, LoadFailedError: it cannot be fetched.
        """
        entry = self.find(request.model_id)
        if entry is None:
            repo_id = parse_source(request.source or request.model_id)
            job.advance("download")

            def on_bytes(done: int, total: int) -> None:
                job.advance("download", done, total)

            path = await self._hub.fetch(repo_id, on_bytes=on_bytes)
            entry = Entry(id=request.model_id, source=ModelSource(kind="hf", path=str(path)))
        loop = asyncio.get_running_loop()
        entry = await loop.run_in_executor(self._threads, self._library.describe, entry)
        if entry.error is not None:
            raise entry.error.with_traceback(None)
        _check_quant(request, entry.source)
        return entry

    def wish(self, entry: Entry, request: LoadRequest) -> Wish | None:
        """Return what the load asks of memory; None before the checkpoint's facts are read."""
        if entry.facts is None:
            return None
        config = self._config
        size = Size(
            facts=entry.facts,
            dtype=config.dtype,
            max_model_len=request.max_model_len or config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            cache_bytes=self._cache_bytes,
        )
        return Wish(
            model_id=entry.id,
            gpu_bytes=need_bytes(size, on_gpu=True),
            host_bytes=need_bytes(size, on_gpu=False),
            gpu_cache_bytes=cache_bytes(size, on_gpu=True),
            host_cache_bytes=cache_bytes(size, on_gpu=False),
            devices=request.devices,
            dtype=size.dtype,
            max_model_len=size.max_model_len,
        )

    def make_engine(
        self,
        entry: Entry,
        request: LoadRequest,
        placement: Placement,
        on_end: Callable[[], None],
    ) -> EngineClient:
        """Return an engine that is not started yet."""
        config = self._config
        spec = LoadModel(
            source=entry.source,
            device=placement.engine_device,
            dtype=config.dtype,
            max_model_len=request.max_model_len or config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_batched_tokens=config.max_batched_tokens,
            cache_bytes=self._cache_bytes,
            prefix_cache=config.prefixes.enabled,
            snapshot_bytes=config.prefixes.budget_mb << 20,
            max_snapshots=config.prefixes.max_entries,
            num_threads=config.num_threads,
        )
        return EngineClient(
            entry.id,
            self._engine_command,
            spec,
            environment=self._environment,
            on_end=on_end,
            clock=self._clock,
        )

    def limits(self, _: Entry) -> EngineLimits:
        """Return what a model may take, the same for all."""
        admission = self._config.admission
        return EngineLimits(
            load_timeout_s=self._config.load_timeout_s,
            max_in_flight=admission.max_in_flight,
            max_queue_depth=admission.max_queue_depth,
            max_wait_s=admission.max_wait_secs,
        )

    async def open_chat(self, entry: Entry) -> ChatModel:
        """Return what turns messages into tokens."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._open_chat, entry)

    @property
    def _cache_bytes(self) -> int | None:
        return None if self._config.cache_mb is None else self._config.cache_mb << 20

    def _is_on_hub(self, model_id: str) -> bool:
        return self._config.hub and is_repo_id(model_id)


def _check_quant(request: LoadRequest, source: ModelSource) -> None:
    quant = request.quant
    if quant is not None and quant.lower() not in Path(source.path).name.lower():
        raise UnsupportedFieldError(
            f"quant '{quant}': weights are served as they are stored; name a GGUF file of that "
            "kind, or leave quant out",
            param="quant",
        )
