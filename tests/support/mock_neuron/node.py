"""What happens on a mock node: loads, evictions, engines and faults."""

import asyncio
import os
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from cortex.core.neuron_api import (
    LoadProgress,
    LoadRequest,
    LoadResponse,
)
from tests.support.mock_neuron.engine import Engine
from tests.support.mock_neuron.faults import FaultCommand, Faults
from tests.support.mock_neuron.host import Host
from tests.support.mock_neuron.script import MockModel, Seen

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


class Node(Host):
    """A host at work. Loads outlive their callers and are one at a time per model.

    Attributes:
        seen: the first MAX_SEEN requests.
        loads: every load asked for.
        starts: the models whose loads were begun, in order.
        recycled: the models whose engines were started again, in order.
        change: notified whenever something happens.
    """

    def __init__(self, *models: MockModel, **host: Any) -> None:
        super().__init__(*models, **host)
        self.faults = Faults()
        self.seen: list[Seen] = []
        self.loads: list[LoadRequest] = []
        self.starts: list[str] = []
        self.recycled: list[str] = []
        self.requests = 0
        self.change = asyncio.Condition()
        self._jobs: dict[str, _Job] = {}
        self._failed_s: dict[str, float] = {}
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
        self.tick += 1
        model.used_tick = self.tick
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
            if name in self.models and self.may_leave(self.models[name])
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
                "last_used_s": self.idle_s(each),
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
