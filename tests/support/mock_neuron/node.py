"""The host behind a mock neuron's routes: devices, their ledger, loads, engines and faults."""

import asyncio
import os
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Literal

from cortex.core.neuron_api import (
    Device,
    DeviceHealth,
    Discovery,
    LoadProgress,
    LoadRequest,
    LoadResponse,
    ModelInfo,
    ModelLoad,
    NeuronHealth,
)
from tests.support.mock_neuron.engine import Engine, Timebase
from tests.support.mock_neuron.faults import FaultCommand, Faults
from tests.support.mock_neuron.script import GIB, MockModel, Seen

# A load reports its progress this often, and a failed one is not begun again this soon.
PROGRESS_S = 1.0
COOL_DOWN_S = 5.0
EXPIRE_CHECK_S = 0.5
MAX_SEEN = 1000


class RefusedError(Exception):
    """An answer other than 2xx."""

    def __init__(self, status: int, code: str, message: str = "the mock refuses", **extras: object):
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.extras = extras


class _Job:
    """A load under way; whoever asks for the model meanwhile waits for the same."""

    def __init__(self) -> None:
        self.done = asyncio.Event()
        self.error: RefusedError | None = None
        self.evicted: list[str] = []
        self.load_s = 0.0


class Node:
    """Models on devices. Loads outlive their callers and are one at a time per model.

    Attributes:
        status: `draining` while it takes nothing new.
        seen: the first MAX_SEEN requests.
        loads: every load asked for.
        starts: the models whose loads were begun, in order.
        recycled: the models whose engines were started again, in order.
        cycles: loads and unloads so far.
        change: notified whenever something happens.
    """

    def __init__(
        self,
        *models: MockModel,
        total_bytes: int = 64 * GIB,
        num_devices: int = 1,
        time_scale: float = 1.0,
    ) -> None:
        self.models = {model.id: model for model in models}
        self.total_bytes = total_bytes
        self.devices = [
            Device(index=index, name="Mock", vram_total_mb=total_bytes >> 20)
            for index in range(num_devices)
        ]
        self.status: Literal["ok", "draining"] = "ok"
        self.time = Timebase(time_scale)
        self.faults = Faults()
        self.seen: list[Seen] = []
        self.loads: list[LoadRequest] = []
        self.starts: list[str] = []
        self.recycled: list[str] = []
        self.cycles = 0
        self.requests = 0
        self.change = asyncio.Condition()
        self._jobs: dict[str, _Job] = {}
        self._failed_s: dict[str, float] = {}
        self._tick = 0
        self._slow = 1.0
        self._tasks: set[asyncio.Task[None]] = set()

    async def until(self, test: Callable[[], object]) -> None:
        """Wait until `test()` holds; checked whenever something happened here."""
        async with asyncio.timeout(10), self.change:
            await self.change.wait_for(test)

    async def changed(self) -> None:
        """Have those who wait look again."""
        async with self.change:
            self.change.notify_all()

    def note(self, seen: Seen) -> None:
        """Remember a request."""
        self.requests += 1
        if len(self.seen) < MAX_SEEN:
            self.seen.append(seen)

    def begin(self, model: MockModel) -> None:
        """Count a request in hand."""
        self._tick += 1
        model.used_tick = self._tick
        model.used_s = self.time.now_s()
        model.in_flight += 1

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something for as long as the node runs."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def end_tasks(self) -> None:
        """End loads and engines."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def start_engines(self) -> None:
        """Give every loaded model that has a spec its engine."""
        for model in self.models.values():
            if model.status == "loaded":
                self._start_engine(model)

    def set_status(self, model_id: str, status: str, error: str | None = None) -> None:
        """Change a model's status and tell whoever listens."""
        model = self.models[model_id]
        self.cycles += (status == "loaded") != (model.status == "loaded")
        if status == "loaded" and model.status != "loaded":
            model.cycles_at_start = self.cycles
        model.status, model.error = status, error
        if not model.holds_memory and model.running is not None:
            model.running.die()
            model.running = None

    # What is said of it.

    def discovery(self) -> Discovery:
        """Return what the host is."""
        return Discovery(hostname="mock", devices=self.devices, memory_total_mb=65536)

    def health(self) -> NeuronHealth:
        """Return the work in hand and the devices' readings."""
        loads = [self.load_of(model) for model in self.models.values() if model.status == "loaded"]
        devices = []
        for device in self.devices:
            used_mb = (self.total_bytes - self.free_on(device.index)) >> 20
            devices.append(
                DeviceHealth(
                    index=device.index,
                    vram_used_mb=used_mb,
                    vram_free_mb=device.vram_total_mb - used_mb,
                    utilization_pct=12,
                    temp_c=40,
                )
            )
        return NeuronHealth(uptime_secs=1, status=self.status, devices=devices, models=loads)

    def load_of(self, model: MockModel) -> ModelLoad:
        """Return a loaded model's work in hand."""
        engine = model.running
        if engine is None:
            return ModelLoad(
                id=model.id,
                in_flight=model.requests,
                queue_depth=model.queue_depth,
                max_in_flight=8,
                max_queue_depth=64,
                free_slots=8 - model.requests,
                rejected_queue_full=3,
                tok_s_decode=50.0,
            )
        spec = engine.spec
        return ModelLoad(
            id=model.id,
            in_flight=engine.in_flight,
            queue_depth=engine.queue_depth,
            max_in_flight=spec.max_num_seqs,
            max_queue_depth=spec.max_queue_depth,
            free_slots=spec.max_num_seqs - engine.in_flight,
            free_kv_blocks=engine.cache.free_blocks,
            total_kv_blocks=spec.num_blocks,
            rejected_queue_full=engine.rejected,
            tok_s_prefill=spec.prefill_tok_s,
            tok_s_decode=1 / (spec.step_s + spec.step_per_seq_s),
        )

    def info(self, model: MockModel) -> ModelInfo:
        """Return a model as the listing has it."""
        return ModelInfo(
            id=model.id,
            harness="torch",
            status=model.status,
            devices=[model.device] if model.holds_memory else [],
            weight_bytes=model.memory_bytes,
            capabilities=model.capabilities,
            limit=model.limit,
            servable=model.servable,
            progress=model.progress,
            error=model.error,
            in_flight=model.requests,
            last_used_s=self._idle_s(model),
            resident_s=self._resident_s(model),
            engine_cycles=self.cycles - model.cycles_at_start if model.holds_memory else None,
            ttl_s=model.wish.ttl_s,
            min_resident_s=model.wish.min_resident_s,
            pinned=model.wish.pinned,
            priority=model.wish.priority,
            prefix_match=_prefix_match(model),
        )

    def _resident_s(self, model: MockModel) -> float | None:
        if model.status != "loaded" or model.loaded_s is None:
            return None
        return self.time.now_s() - model.loaded_s

    def _may_leave(self, model: MockModel) -> bool:
        """Whether a model may be evicted: idle, not pinned, and there for long enough."""
        resident_s = self._resident_s(model)
        return (
            model.status == "loaded"
            and model.requests == 0
            and not model.wish.pinned
            and (resident_s is None or resident_s >= model.wish.min_resident_s)
        )

    def _idle_s(self, model: MockModel) -> float | None:
        return None if model.used_tick is None else float(self._tick - model.used_tick)

    # Memory.

    @property
    def free_bytes(self) -> int:
        """Memory of the emptiest device that no model holds."""
        return max(self.free_on(device.index) for device in self.devices)

    def free_on(self, device: int) -> int:
        """Memory of a device that no model holds; never negative."""
        held = sum(
            model.memory_bytes
            for model in self.models.values()
            if model.holds_memory and model.device == device
        )
        assert held <= self.total_bytes, f"device {device} is overbooked"
        return self.total_bytes - held

    async def load(self, wish: LoadRequest) -> LoadResponse:
        """Load a model or join its load.

        Raises:
            RefusedError: there is no room (nothing was evicted), or the load failed.
        """
        self.loads.append(wish)
        await self.changed()
        model = self.models.get(wish.model_id)
        if model is None:
            raise RefusedError(422, "unreadable_checkpoint", f"no checkpoint for {wish.model_id}")
        if model.load_refusal is not None:
            raise RefusedError(*model.load_refusal)
        async with self.change:
            # What is on its way out or back is asked again when it has got there.
            await self.change.wait_for(lambda: model.status not in ("draining", "recovering"))
        if model.status == "loaded":
            return LoadResponse(status="loaded", model_id=model.id, load_s=0.0)
        job = self._jobs.get(model.id)
        if job is None:
            job = self._begin_load(model, wish)
            await self.changed()
        if not wish.wait and not job.done.is_set():
            return LoadResponse(status="loading", model_id=model.id, progress=model.progress)
        await job.done.wait()
        if job.error is not None:
            raise job.error
        return LoadResponse(
            status="loaded", model_id=model.id, load_s=job.load_s, evicted=job.evicted
        )

    def _begin_load(self, model: MockModel, wish: LoadRequest) -> _Job:
        """Make room and claim it, all or nothing: there is no await between look and claim."""
        failed_s = self._failed_s.get(model.id)
        if failed_s is not None and self.time.now_s() - failed_s < COOL_DOWN_S:
            raise RefusedError(503, "load_failed", model.error or "the last load failed")
        idle = [
            self.models[name]
            for name in wish.evict
            if name in self.models and self._may_leave(self.models[name])
        ]
        indices = wish.devices or [device.index for device in self.devices]
        room = {
            index: self.free_on(index)
            + sum(each.memory_bytes for each in idle if each.device == index)
            for index in indices
        }
        best = max(room, key=lambda index: (room[index], -index))
        if room[best] < model.memory_bytes:
            raise self._shortage(model, best)
        job = self._jobs[model.id] = _Job()
        for victim in idle:
            self.set_status(victim.id, "unloaded")
            job.evicted.append(victim.id)
        model.device, model.wish = best, wish
        self.starts.append(model.id)
        self.set_status(model.id, "loading")
        self.spawn(self._run_load(model, job))
        return job

    def _shortage(self, model: MockModel, device: int) -> RefusedError:
        residents = [
            {
                "id": each.id,
                "device": each.device,
                "bytes": each.memory_bytes,
                "in_flight": each.requests,
                "last_used_s": self._idle_s(each),
            }
            for each in self.models.values()
            if each.holds_memory
        ]
        return RefusedError(
            409,
            "insufficient_memory",
            device=device,
            needed_bytes=model.memory_bytes,
            free_bytes=self.free_on(device),
            residents=residents,
        )

    async def _run_load(self, model: MockModel, job: _Job) -> None:
        begun_s = self.time.now_s()
        scripted = model.progress
        try:
            if model.load_gate is not None:
                await model.load_gate.wait()
            await self._take_time(model)
            self._failed_s.pop(model.id, None)
            model.progress = scripted
            model.loaded_s = self.time.now_s()
            self.set_status(model.id, "loaded")
            self._start_engine(model)
            if model.wish.ttl_s is not None:
                self.spawn(self._expire(model, model.wish.ttl_s))
            job.load_s = max(0.1, self.time.now_s() - begun_s)
        except RefusedError as exc:
            job.error = exc
            model.progress = scripted
            self._failed_s[model.id] = self.time.now_s()
            self.set_status(model.id, "failed", exc.message)
        finally:
            if model.status == "loading":
                model.status = "unloaded"
                job.error = RefusedError(409, "conflict", f"model '{model.id}' was unloaded")
            del self._jobs[model.id]
            job.done.set()
        await self.changed()

    async def _take_time(self, model: MockModel) -> None:
        total = model.memory_bytes
        load_s = 0.0 if model.load_bytes_s is None else total / model.load_bytes_s
        done_s = 0.0
        fault = self.faults.of_load(model.id)
        end_s = load_s if fault is None else load_s * fault[0]
        while done_s < end_s:
            model.progress = LoadProgress(
                phase="weights",
                bytes_done=int(total * done_s / load_s),
                bytes_total=total,
                seconds_left=load_s - done_s,
            )
            part_s = min(PROGRESS_S, end_s - done_s)
            await self.time.sleep(part_s)
            done_s += part_s
        if fault is not None:
            raise RefusedError(*fault[1:])

    async def unload(self, model_id: str) -> None:
        """Let the requests in hand end, then give everything back.

        Raises:
            RefusedError: it is not in memory.
        """
        model = self.models.get(model_id)
        if model is None or not model.holds_memory:
            raise RefusedError(404, "model_not_found", f"model '{model_id}' is not loaded here")
        if model.status != "loaded":
            raise RefusedError(409, "conflict", f"model '{model_id}' is {model.status}")
        self.set_status(model_id, "draining")
        async with self.change:
            self.change.notify_all()
            await self.change.wait_for(lambda: model.in_flight == 0)
        self.set_status(model_id, "unloaded")
        await self.changed()

    async def recycle(self, model_id: str) -> None:
        """Start a loaded model's engine again.

        Raises:
            RefusedError: it is not loaded, or at work.
        """
        model = self.models.get(model_id)
        if model is None or model.status != "loaded":
            raise RefusedError(404, "model_not_found", f"model '{model_id}' is not loaded here")
        if model.requests:
            raise RefusedError(409, "model_busy", f"model '{model_id}' is at work")
        self.recycled.append(model_id)
        model.cycles_at_start = self.cycles
        model.loaded_s = self.time.now_s()
        await self.changed()

    async def _expire(self, model: MockModel, ttl_s: float) -> None:
        """Unload a model once nobody has used it for its time."""
        begun_s = model.loaded_s
        assert begun_s is not None
        while model.loaded_s == begun_s and model.holds_memory:
            used_s = max(begun_s, model.used_s)
            left_s = used_s + ttl_s - self.time.now_s()
            if left_s <= 0 and model.status == "loaded" and model.requests == 0:
                await self.unload(model.id)
                return
            await self.time.sleep(max(left_s, EXPIRE_CHECK_S))

    # Engines and what goes wrong.

    def _start_engine(self, model: MockModel) -> None:
        if model.engine is None or model.running is not None:
            return
        engine = Engine(model.engine, self.time)
        engine.slow = self._slow
        model.running = engine
        self.spawn(engine.run())

    def apply(self, command: FaultCommand) -> None:
        """Put a fault in force."""
        concerned = [
            model for model in self._with_engines() if command.model_id in (None, model.id)
        ]
        match command.kind:
            case "crash":
                os._exit(137)
            case "slow":
                self._slow = command.factor
                for model in concerned:
                    assert model.running is not None
                    model.running.slow = command.factor
            case "crash_engine":
                for model in self.models.values():
                    if command.model_id in (None, model.id):
                        self.spawn(self._restart(model, 0.0))
            case "hang_engine":
                for model in concerned:
                    assert model.running is not None
                    model.running.hung.set()
                    self.spawn(self._restart(model, command.after_s))
            case _:
                self.faults.set(command)

    def _with_engines(self) -> Sequence[MockModel]:
        return [model for model in self.models.values() if model.running is not None]

    async def _restart(self, model: MockModel, after_s: float) -> None:
        """End an engine after a while and start another one, which begins with nothing cached."""
        await self.time.sleep(after_s)
        if model.status != "loaded":
            return
        if model.running is not None:
            model.running.die()
            model.running = None
        model.crashes += 1
        self.set_status(model.id, "recovering", "the engine ended unexpectedly")
        await self.changed()
        try:
            await self._take_time(model)
            self.set_status(model.id, "loaded")
            self._start_engine(model)
        except RefusedError as exc:
            self.set_status(model.id, "failed", exc.message)
        await self.changed()


def _prefix_match(model: MockModel) -> Literal["block", "snapshot"] | None:
    if model.engine is None:
        return None
    return "block" if model.engine.snapshot_tokens is None else "snapshot"
