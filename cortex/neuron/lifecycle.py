"""The one owner of what is in this host's memory: loads, unloads, restarts, the drain at the end.

What follows from what is decided in `neuron.residency`; here it is done. Each model on its way
in, out or in service has one task, `_supervise`, which holds its engine and everything it took.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar, TypeVarTuple

from cortex.core.config import TorchHarness
from cortex.core.errors import (
    BadRequestError,
    ConflictError,
    CortexError,
    EngineDiedError,
    InsufficientMemoryError,
    LoadFailedError,
    ModelNotFoundError,
    ShuttingDownError,
    UnsupportedFieldError,
)
from cortex.core.neuron_api import LoadRequest
from cortex.neuron.admission import Admission
from cortex.neuron.devices import DeviceMemory
from cortex.neuron.discovery import Monitor
from cortex.neuron.engine.protocol import Progress
from cortex.neuron.engine_client import EngineClient, recovering_error
from cortex.neuron.harness import Engine, Harness, LoadedModel
from cortex.neuron.hub import HubUnreachableError
from cortex.neuron.jobs import Job
from cortex.neuron.library import Entry
from cortex.neuron.memory import Claim, Placement, Resident, free_bytes, insufficient, place
from cortex.neuron.metrics import Metrics
from cortex.neuron.residency import (
    Effect,
    Ended,
    EngineLost,
    EngineReady,
    Happening,
    LoadAsked,
    Residency,
    UnloadAsked,
    decide,
)
from cortex.neuron.resident import (
    Model,
    Serving,
    failed_error,
    loading_error,
    unloading_error,
)
from cortex.neuron.scope import task_scope

ENGINE_STOP_S = 10.0
# A device gives a dead process's memory back a moment later.
MEMORY_RETURN_S = 3.0
MEMORY_RETRY_S = 0.2
MEMORY_READ_S = 2.0
SCAN_S = 2.0
# An engine with work that reports nothing for this long is stuck.
STALL_S = 300.0
STALL_CHECK_S = 10.0
# Failed models and load times that are remembered.
MAX_REMEMBERED = 256

# What a load request may call a harness by besides its name.
ALIASES = {"candle": "torch"}

T = TypeVar("T")
Args = TypeVarTuple("Args")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    entry: Entry
    request: LoadRequest
    placement: Placement


class Lifecycle:
    """Loads and unloads models on request and keeps the loaded ones alive. Use as a context.

    Args:
        harnesses: the engine kinds of this host; a model that none of them knows is the first's.
        clock: monotonic seconds.
        on_change: called with a model's id whenever what is to be told of it may have changed.
    """

    def __init__(
        self,
        *,
        config: TorchHarness,
        harnesses: Sequence[Harness],
        monitor: Monitor,
        metrics: Metrics,
        clock: Callable[[], float],
        on_change: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._harnesses = {each.name: each for each in harnesses}
        self._config = config
        self._monitor = monitor
        self._metrics = metrics
        self._clock = clock
        self._on_change = on_change
        self._models: dict[str, Model] = {}
        self._load_s: dict[str, float] = {}
        self._is_closing = False
        self._tasks: asyncio.TaskGroup | None = None
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="lifecycle")

    @asynccontextmanager
    async def run(self) -> AsyncIterator["Lifecycle"]:
        """Be ready for requests inside the context; unload everything on the way out."""
        try:
            async with task_scope() as tasks:
                self._tasks = tasks
                try:
                    yield self
                finally:
                    await self._close()
        finally:
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def find(self, model_id: str) -> Entry:
        """Return a checkpoint that lies on this host, loaded or not.

        Raises:
            ModelNotFoundError: none goes by that name.
        """
        harness = await self._harness_of(model_id)
        entry = harness.find(model_id)
        if entry is not None:
            return entry
        raise harness.missing(model_id)

    def harness_names(self) -> list[str]:
        """Return the engine kinds of this host."""
        return list(self._harnesses)

    def harness_of(self, model_id: str) -> Harness:
        """Return the engine kind that knows a model, or the first."""
        found = (each for each in self._harnesses.values() if each.find(model_id) is not None)
        return next(found, next(iter(self._harnesses.values())))

    def listings(self) -> list[Mapping[str, Entry]]:
        """Return what could be served, by id, of each engine kind."""
        return [each.entries for each in self._harnesses.values()]

    def models(self) -> list[Model]:
        """Return the models that are not merely servable: loaded, moving or failed."""
        return list(self._models.values())

    def model(self, model_id: str) -> Model | None:
        """Return one of them."""
        return self._models.get(model_id)

    def serving(self, model_id: str) -> Serving:
        """Return what a request needs of a loaded model, and note its use.

        Raises:
            ModelNotFoundError: this host knows no such model.
            ModelNotLoadedError: it knows it and has not loaded it.
            ModelLoadingError, ModelRecoveringError, UnloadedError: it is on its way.
            LoadFailedError: it was loaded and could not be kept.
        """
        model = self._models.get(model_id)
        if model is None:
            raise self.harness_of(model_id).missing(model_id)
        match model.state.status:
            case "loaded":
                assert model.chat is not None
                assert isinstance(model.engine, EngineClient)
                assert model.admission is not None
                if not model.engine.can_serve:
                    # Its end is known here before the task that owns it has seen it.
                    raise recovering_error(model.id)
                model.last_used_s = self._clock()
                model.num_requests += 1
                return Serving(
                    model_id=model_id,
                    chat=model.chat,
                    engine=model.engine,
                    admission=model.admission,
                )
            case "loading":
                raise loading_error(model)
            case "recovering":
                raise recovering_error(model.id)
            case "draining":
                raise unloading_error(model)
            case "failed":
                raise failed_error(model, self._clock())
            case "unloaded":
                raise model.harness.missing(model_id)

    async def load(self, request: LoadRequest) -> Job:
        """Start or join the load of a model; the job tells when it is done.

        Raises:
            ModelNotFoundError: nothing here and nothing on the hub goes by that name.
            BadRequestError: an option is not supported.
            LoadFailedError: the last attempt has just failed; the message has the cause.
            ShuttingDownError: the process is ending.
        """
        harness = await self._harness_of(request.model_id, request.harness)
        harness.check(request)
        while True:
            if self._is_closing:
                raise _shutting_down()
            new = Model(id=request.model_id, harness=harness)
            model = self._models.setdefault(request.model_id, new)
            effects = self._apply(model, LoadAsked(now_s=self._clock()))
            if Effect.WAIT_FOR_END in effects:
                await model.ended.wait()
                continue
            if Effect.REFUSE in effects:
                raise failed_error(model, self._clock())
            if Effect.START in effects:
                self._start(model, harness, request)
            assert model.job is not None
            return model.job

    async def unload(self, model_id: str) -> None:
        """Unload a model: no new requests, those in hand may end within a limit, then the engine.

        Raises:
            ModelNotFoundError: it is not in memory.
        """
        model = self._models.get(model_id)
        effects = self._apply(model, UnloadAsked(now_s=self._clock())) if model else ()
        if model is None or Effect.NOT_RESIDENT in effects:
            raise ModelNotFoundError(f"model '{model_id}' is not loaded here")
        if Effect.ABORT in effects and model.task is not None:
            model.task.cancel()
        model.wake.set()
        if model.task is None:
            self._forget(model)
        else:
            await model.ended.wait()

    def touch(self, model_id: str) -> None:
        """Note that a model was in use until now."""
        model = self._models.get(model_id)
        if model is not None:
            model.last_used_s = self._clock()

    @property
    def is_closing(self) -> bool:
        """Whether everything is being unloaded."""
        return self._is_closing

    def free_bytes(self, memory: DeviceMemory) -> int:
        """Return what a load could still take of a device as it was read."""
        return free_bytes(memory, self._claims())

    def residents(self) -> list[Resident]:
        """Return who holds memory, least recently used first."""
        now_s = self._clock()
        found = [
            Resident(
                id=model.id,
                device=model.claim.device,
                bytes=model.claim.num_bytes,
                in_flight=model.in_flight,
                last_used_s=None if model.last_used_s is None else now_s - model.last_used_s,
            )
            for model in self._models.values()
            if model.claim is not None
        ]
        return sorted(found, key=lambda each: -(each.last_used_s or float("inf")))

    def _start(self, model: Model, harness: Harness, request: LoadRequest) -> None:
        model.harness = harness
        model.job = self._job(model)
        model.ended.clear()
        model.wake.clear()
        model.task = self._spawn(self._supervise(model, request), name=f"model {model.id}")
        _logger.info("loading", extra={"model": model.id})

    def _spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        assert self._tasks is not None, "used outside run()"
        return self._tasks.create_task(work, name=name)

    async def _supervise(self, model: Model, request: LoadRequest) -> None:
        """Load a model and keep its engine alive until it is unloaded or given up."""
        try:
            plan = await self._prepare(model, request)
            while True:
                lost = await self._live(model, plan)
                if lost is None:
                    break
                pause_s = self._lose(model, lost)
                if model.state.status != "recovering":
                    break
                await asyncio.sleep(pause_s)
        except CortexError as exc:
            self._lose(model, self._lost(model, exc))
        except Exception:  # a load: the traceback goes to the log, the state tells clients
            _logger.exception("load failed", extra={"model": model.id})
            error = LoadFailedError(f"model '{model.id}' cannot be loaded: internal error, see log")
            self._lose(model, self._lost(model, error))
        finally:
            model.claim = None
            model.task = None
            self._apply(model, Ended(now_s=self._clock()))
            if model.job is not None:
                model.job.fail(ConflictError(f"model '{model.id}' was unloaded while it loaded"))
            if model.state.status == "unloaded":
                self._forget(model)
            model.ended.set()

    def _claims(self) -> list[Claim]:
        return [each.claim for each in self._models.values() if each.claim is not None]

    def _job(self, model: Model) -> Job:
        return Job(model.id, clock=self._clock, last_load_s=self._load_s.get(model.id))

    async def _prepare(self, model: Model, request: LoadRequest) -> _Plan:
        """Find the checkpoint, make room and choose the device."""
        assert model.job is not None
        model.entry = await model.harness.locate(request, model.job)
        await self._evict(model.id, request.evict, model.job)
        placement = await self._place(model, model.entry, request)
        return _Plan(entry=model.entry, request=request, placement=placement)

    async def _live(self, model: Model, plan: _Plan) -> EngineLost | None:
        """Run one engine from its start to its end; None if the end was wanted."""
        assert model.job is not None
        assert self._tasks is not None
        job = model.job
        engine = model.harness.make_engine(
            plan.entry, plan.request, plan.placement, on_end=model.wake.set
        )

        def on_progress(progress: Progress) -> None:
            job.advance(progress.phase, progress.bytes_done, progress.bytes_total)
            self._on_change(model.id)

        try:
            async with task_scope() as tasks:
                opening = tasks.create_task(
                    model.harness.open_chat(plan.entry), name=f"chat {model.id}"
                )
                await engine.start(self._tasks)
                model.loaded = await engine.load(
                    on_progress=on_progress, timeout_s=model.harness.load_timeout_s
                )
            model.chat = opening.result()
            if model.chat is not None:
                model.chat = replace(model.chat, max_model_len=model.loaded.max_model_len)
            self._open(model, engine, plan, model.loaded)
            await self._watch(model, engine)
            if model.state.status == "draining":
                await self._drain(model, engine)
                return None
            error = EngineDiedError(f"model '{model.id}': {engine.cause_of_death}")
            return self._lost(model, error)
        except CortexError as exc:
            return self._lost(model, exc)
        finally:
            await engine.kill()
            model.engine = None

    async def _watch(self, model: Model, engine: Engine) -> None:
        """Return when the engine has ended, is wanted to end, or has to."""
        while not (engine.ended.is_set() or model.state.status == "draining"):
            model.wake.clear()
            try:
                async with asyncio.timeout(STALL_CHECK_S):
                    await model.wake.wait()
            except TimeoutError:
                if engine.silent_s() > STALL_S:
                    _logger.error("engine is stuck; ending it", extra={"model": model.id})
                    await engine.kill()

    def _open(self, model: Model, engine: Engine, plan: _Plan, loaded: LoadedModel) -> None:
        limits = self._config.admission
        model.engine = engine
        model.admission = Admission(
            model.id,
            max_in_flight=limits.max_in_flight or loaded.max_num_seqs,
            max_queue_depth=limits.max_queue_depth,
            max_wait_s=limits.max_wait_secs,
        )
        model.claim = Claim(
            model_id=model.id,
            device=plan.placement.device,
            num_bytes=max(plan.placement.num_bytes, loaded.weight_bytes + loaded.cache_bytes),
            is_taken=True,
        )
        assert model.job is not None
        self._apply(model, EngineReady(now_s=self._clock()))
        model.job.succeed()
        load_s = model.job.load_s or 0.0
        self._remember_load(model.id, load_s)
        self._metrics.load_ended(model.id, load_s)
        _logger.info(
            "loaded",
            extra={"model": model.id, "device": loaded.device, "seconds": round(load_s, 1)},
        )

    def _lose(self, model: Model, lost: EngineLost) -> float:
        """Record a failed load or a dead engine; return the pause before the next attempt."""
        was = model.state.status
        decision = decide(model.state, lost)
        self._enter(model, decision.state)
        self._metrics.engine_lost(model.id, was)
        _logger.warning(
            "model lost",
            extra={
                "model": model.id,
                "was": was,
                "becomes": model.state.status,
                "cause": lost.error.message,
            },
        )
        if Effect.CLOSE in decision.effects and model.admission is not None:
            if model.state.status == "recovering":
                model.admission.close(recovering_error(model.id))
            else:
                model.admission.close(failed_error(model, self._clock()))
        if Effect.FAIL in decision.effects and model.job is not None:
            model.job.fail(lost.error)
        if Effect.RESTART in decision.effects:
            # What the dead engine held is free again and promised to its successor.
            if model.claim is not None:
                model.claim = replace(model.claim, is_taken=False)
            if model.job is None or model.job.is_done:
                model.job = self._job(model)
        if model.state.status == "failed":
            self._bound_failures()
        return decision.pause_s

    def _lost(self, model: Model, error: CortexError) -> EngineLost:
        blameless = isinstance(
            error,
            InsufficientMemoryError | HubUnreachableError | ModelNotFoundError | BadRequestError,
        )
        if isinstance(error, InsufficientMemoryError) and not error.extras and model.claim:
            # The engine found less than was promised here: only an eviction can help.
            claim = model.claim
            others = [each for each in self.residents() if each.id != model.id]
            error.extras = insufficient(model.id, claim.device, claim.num_bytes, 0, others).extras
        return EngineLost(error=error, now_s=self._clock(), blameless=blameless)

    async def _drain(self, model: Model, engine: Engine) -> None:
        assert model.admission is not None
        _logger.info("draining", extra={"model": model.id, "in_flight": model.in_flight})
        model.admission.close(unloading_error(model))
        try:
            async with asyncio.timeout(self._config.drain_s):
                await model.admission.wait_idle()
        except TimeoutError:
            _logger.warning(
                "drain took too long; ending the engine",
                extra={"model": model.id, "in_flight": model.in_flight},
            )
        error = _shutting_down() if self._is_closing else unloading_error(model)
        await engine.stop(grace_s=ENGINE_STOP_S, error=error)
        _logger.info("unloaded", extra={"model": model.id})

    async def _evict(self, model_id: str, victims: Sequence[str], job: Job) -> None:
        """End the victims, all at once; who is not here any more needs no end."""
        async with asyncio.TaskGroup() as tasks:
            for victim in dict.fromkeys(victims):
                if victim != model_id and victim in self._models:
                    tasks.create_task(self._evict_one(victim, job), name=f"evict {victim}")

    async def _evict_one(self, victim: str, job: Job) -> None:
        try:
            await self.unload(victim)
        except ModelNotFoundError:
            return
        job.evicted.append(victim)
        self._metrics.evicted(victim)

    async def _place(self, model: Model, entry: Entry, request: LoadRequest) -> Placement:
        """Choose a device and claim the memory there."""
        assert model.job is not None
        wish = model.harness.wish(entry, request)
        assert wish is not None, "a located entry has its facts"
        deadline_s = self._clock() + (MEMORY_RETURN_S if model.job.evicted else 0.0)
        while True:
            reading = await self._in_thread(self._monitor.refresh, MEMORY_READ_S)
            try:
                # No await between the look and the claim.
                placement = place(wish, reading.memory, self._claims(), self.residents())
            except InsufficientMemoryError:
                if self._clock() >= deadline_s:
                    raise
                await asyncio.sleep(MEMORY_RETRY_S)
                continue
            model.claim = Claim(
                model_id=model.id, device=placement.device, num_bytes=placement.num_bytes
            )
            return placement

    async def refresh(self, limit_s: float) -> None:
        """Look again at what could be served; what takes longer goes on without the caller."""
        async with asyncio.TaskGroup() as tasks:
            for each in self._harnesses.values():
                tasks.create_task(each.refresh(limit_s), name=f"refresh {each.name}")

    async def _harness_of(self, model_id: str, name: str | None = None) -> Harness:
        if name is not None:
            harness = self._harnesses.get(ALIASES.get(name, name))
            if harness is None:
                known = " or ".join(self._harnesses)
                raise UnsupportedFieldError(
                    f"harness '{name}' is not known here; use {known}", param="harness"
                )
        else:
            harness = self.harness_of(model_id)
        if harness.find(model_id) is None:
            await self.refresh(SCAN_S)
            harness = harness if name is not None else self.harness_of(model_id)
        return harness

    async def _in_thread(self, work: Callable[[*Args], T], *args: *Args) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    def _apply(self, model: Model, event: Happening) -> tuple[Effect, ...]:
        decision = decide(model.state, event)
        self._enter(model, decision.state)
        return decision.effects

    def _enter(self, model: Model, state: Residency) -> None:
        model.state = state
        self._on_change(model.id)

    def _remember_load(self, model_id: str, load_s: float) -> None:
        self._load_s.pop(model_id, None)
        self._load_s[model_id] = load_s
        if len(self._load_s) > MAX_REMEMBERED:
            del self._load_s[next(iter(self._load_s))]

    def _forget(self, model: Model) -> None:
        if self._models.get(model.id) is model:
            del self._models[model.id]
            self._on_change(model.id)

    def _bound_failures(self) -> None:
        failed = [each for each in self._models.values() if each.state.status == "failed"]
        for each in failed[: max(0, len(failed) - MAX_REMEMBERED)]:
            self._forget(each)

    async def _close(self) -> None:
        """Unload everything; each model has its drain and then its end."""
        self._is_closing = True
        async with asyncio.TaskGroup() as tasks:
            for model_id in list(self._models):
                tasks.create_task(self._close_one(model_id), name=f"close {model_id}")

    async def _close_one(self, model_id: str) -> None:
        try:
            await self.unload(model_id)
        except ModelNotFoundError:
            return


def _shutting_down() -> ShuttingDownError:
    return ShuttingDownError("this neuron is shutting down", retry_after_s=15)
