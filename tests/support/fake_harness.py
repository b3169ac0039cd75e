"""Engines without processes, for tests that explore what may happen to a lifecycle.

Time is the loop's, which a test may let jump. The harness watches what no caller can: that no
model ever has two engines, that devices are never overbooked, and who ends an engine.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cortex.core.errors import CortexError, LoadFailedError, ModelNotFoundError
from cortex.core.neuron_api import LoadRequest
from cortex.neuron.chat.model import ChatModel
from cortex.neuron.devices import HOST, DeviceMemory, Hardware, Reading
from cortex.neuron.engine.protocol import EngineStats, Loaded, Progress
from cortex.neuron.harness import EngineLimits
from cortex.neuron.jobs import Job
from cortex.neuron.library import Entry
from cortex.neuron.memory import Placement, Wish
from cortex.neuron.models.source import ModelSource

GIB = 1 << 30
STOP_S = 0.5


@dataclass(kw_only=True)
class FakeModel:
    """A model of some size, and what its engines do.

    Attributes:
        load_s: how long a load takes.
        failures: how many of the next loads fail.
        is_silent: its engine reports nothing although it has work in hand.
    """

    id: str
    gib: int
    load_s: float = 2.0
    failures: int = 0
    is_silent: bool = False
    engines: list["FakeEngine"] = field(default_factory=list)


class FakeHost:
    """GPUs of some size; what engines hold of them is what a reading shows."""

    def __init__(self, *gpus_gib: int) -> None:
        self.total = {index: gib * GIB for index, gib in enumerate(gpus_gib)}
        self.used = dict.fromkeys(self.total, 0)
        self.foreign = dict.fromkeys(self.total, 0)
        self.hardware = Hardware()
        self.pids: frozenset[int] = frozenset()

    def take(self, device: int, num_bytes: int) -> None:
        """Hold memory; a device has no more than it has."""
        self.used[device] += num_bytes
        assert 0 <= self.used[device] <= self.total[device], f"GPU {device} is overbooked"

    @property
    def reading(self) -> Reading:
        """The devices of this moment."""
        memory = [DeviceMemory(index=HOST, total_bytes=64 * GIB, free_bytes=64 * GIB)]
        for index, total in self.total.items():
            free = total - self.used[index] - self.foreign[index]
            memory.append(DeviceMemory(index=index, total_bytes=total, free_bytes=max(0, free)))
        return Reading(memory=memory)


class FakeEngine:
    """One engine; `crash` ends it unasked."""

    def __init__(
        self, harness: "FakeHarness", model: FakeModel, device: int, on_end: Callable[[], None]
    ) -> None:
        self.ended = asyncio.Event()
        self.stats = EngineStats()
        self.pid = None
        self.cause_of_death = "it crashed"
        self.device = device
        self.is_loaded = False
        self._harness = harness
        self._model = model
        self._on_end = on_end
        self._lost = asyncio.Event()

    @property
    def can_serve(self) -> bool:
        return self.is_loaded and not self.ended.is_set()

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        assert not any(not each.ended.is_set() for each in self._model.engines), (
            f"{self._model.id} has two engines"
        )
        self._model.engines.append(self)

    async def load(self, *, on_progress: Callable[[Progress], None], timeout_s: float) -> Loaded:
        on_progress(Progress(phase="weights", bytes_done=1, bytes_total=2))
        try:
            async with asyncio.timeout(self._model.load_s):
                await self._lost.wait()
        except TimeoutError:
            pass
        if self._model.failures or self._lost.is_set():
            self._model.failures = max(0, self._model.failures - 1)
            raise LoadFailedError(f"model '{self._model.id}' cannot be loaded: scripted")
        self._harness.host.take(self.device, self._model.gib * GIB)
        self.is_loaded = True
        return Loaded(
            max_model_len=1000,
            vocab_size=10,
            max_num_seqs=2,
            num_kv_blocks=10,
            block_size=32,
            weight_bytes=0,
            cache_bytes=0,
            torch_version="none",
            device=f"cuda:{self.device}",
            dtype="float32",
        )

    def silent_s(self) -> float:
        return 1_000_000.0 if self._model.is_silent else 0.0

    async def stop(self, *, grace_s: float, error: CortexError | None = None) -> None:
        if not self.ended.is_set():
            self._harness.on_stop(self._model.id)
        await asyncio.sleep(STOP_S)
        self._end()

    async def kill(self) -> None:
        self._end()

    def crash(self) -> None:
        """End unasked, also in the middle of a load."""
        if self.is_loaded:
            self._end()
        else:
            self._lost.set()

    def _end(self) -> None:
        if self.ended.is_set():
            return
        if self.is_loaded:
            self._harness.host.take(self.device, -self._model.gib * GIB)
        self.ended.set()
        self._on_end()


class FakeHarness:
    """Serves the models it is given; `on_stop` is told of every engine that is ended in order."""

    name = "torch"

    def __init__(
        self, host: FakeHost, models: list[FakeModel], on_stop: Callable[[str], None]
    ) -> None:
        self.host = host
        self.models = {each.id: each for each in models}
        self.on_stop = on_stop
        self._entries = {
            name: Entry(id=name, source=ModelSource(kind="hf", path=name)) for name in self.models
        }

    @property
    def entries(self) -> Mapping[str, Entry]:
        return self._entries

    def find(self, model_id: str) -> Entry | None:
        return self._entries.get(model_id)

    async def refresh(self, limit_s: float) -> None:
        pass

    def check(self, request: LoadRequest) -> None:
        if request.model_id not in self._entries:
            raise self.missing(request.model_id)

    def missing(self, model_id: str) -> CortexError:
        return ModelNotFoundError(f"no model '{model_id}'")

    async def locate(self, request: LoadRequest, job: Job) -> Entry:
        await asyncio.sleep(0.1)
        return self._entries[request.model_id]

    def wish(self, entry: Entry, request: LoadRequest) -> Wish:
        num_bytes = self.models[entry.id].gib * GIB
        return Wish(model_id=entry.id, gpu_bytes=num_bytes, host_bytes=num_bytes)

    def make_engine(
        self,
        entry: Entry,
        request: LoadRequest,
        placement: Placement,
        on_end: Callable[[], None],
    ) -> FakeEngine:
        return FakeEngine(self, self.models[entry.id], placement.device, on_end)

    def limits(self, entry: Entry) -> EngineLimits:
        return EngineLimits(
            load_timeout_s=100.0, max_in_flight=None, max_queue_depth=4, max_wait_s=60.0
        )

    async def open_chat(self, entry: Entry) -> ChatModel | None:
        return None
