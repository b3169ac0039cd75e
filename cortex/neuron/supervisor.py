"""One model from its load to its end: a task that holds its engine and everything it took."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec

from cortex.core.config import TorchHarness
from cortex.core.errors import (
    BadRequestError,
    ConflictError,
    CortexError,
    EngineDiedError,
    InsufficientMemoryError,
    LoadFailedError,
    ModelNotFoundError,
)
from cortex.core.neuron_api import LoadRequest
from cortex.neuron.admission import Admission
from cortex.neuron.engine.protocol import Progress
from cortex.neuron.engine_client import recovering_error
from cortex.neuron.eviction import BUSY_RETRY_S, Eviction
from cortex.neuron.harness import Engine, LoadedModel
from cortex.neuron.hub import HubUnreachableError
from cortex.neuron.jobs import Job
from cortex.neuron.ledger import Ledger
from cortex.neuron.library import Entry
from cortex.neuron.memory import Placement, Resident, Shortage, insufficient
from cortex.neuron.metrics import Metrics
from cortex.neuron.residency import (
    Effect,
    Ended,
    EngineLost,
    EngineReady,
    EngineRecycled,
    RecycleDropped,
)
from cortex.neuron.resident import (
    Model,
    failed_error,
    shutting_down_error,
    unloading_error,
)
from cortex.neuron.roster import Roster
from cortex.neuron.scope import task_scope

ENGINE_STOP_S = 10.0
# How often an engine that may be stuck is looked at, and how finely beside its bound.
STALL_CHECK_S = 10.0
STALL_CHECKS = 4
# Models whose last load time is remembered.
MAX_REMEMBERED = 256

_logger = logging.getLogger(__name__)


class ModelBusyError(ConflictError):
    """The model's requests did not end in time for what was asked."""

    code = "model_busy"
    retryable = True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    entry: Entry
    request: LoadRequest
    placement: Placement


class Supervisor:
    """Runs models; what is decided elsewhere is done here.

    Args:
        clock: monotonic seconds.

    Attributes:
        is_closing: everything is being unloaded; set by the lifecycle.
    """

    def __init__(
        self,
        *,
        config: TorchHarness,
        roster: Roster,
        ledger: Ledger,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self.is_closing = False
        self._config = config
        self._roster = roster
        self._ledger = ledger
        self._metrics = metrics
        self._clock = clock
        self._load_s: OrderedDict[str, float] = OrderedDict()

    def job(self, model: Model) -> Job:
        """Return a fresh job for a model."""
        return Job(model.id, clock=self._clock, last_load_s=self._load_s.get(model.id))

    async def run(self, model: Model, request: LoadRequest, tasks: asyncio.TaskGroup) -> None:
        """Load a model and keep its engine alive until it is unloaded or given up.

        Args:
            tasks: keeps what the engine needs.
        """
        try:
            plan = await self._prepare(model, request)
            while True:
                lost = await self._live(model, plan, tasks)
                pause_s = 0.0 if lost is None else self._lose(model, lost)
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
            self._ledger.release(model.id)
            model.task = None
            self._roster.apply(model, Ended(now_s=self._clock()))
            if model.admission is not None and model.state.status == "unloaded":
                model.admission.close(unloading_error(model))
            if model.job is not None:
                model.job.fail(ConflictError(f"model '{model.id}' was unloaded while it loaded"))
            if model.state.status == "unloaded":
                self._roster.forget(model)
            model.ended.set()

    async def _prepare(self, model: Model, request: LoadRequest) -> _Plan:
        """Find the checkpoint, choose the device and make room on it."""
        assert model.job is not None
        model.entry = entry = await model.harness.locate(request, model.job)
        wish = model.harness.wish(entry, request)
        assert wish is not None, "a located entry has its facts"
        eviction = Eviction(
            model.id,
            model.policy.priority,
            roster=self._roster,
            metrics=self._metrics,
            describe=self.resident,
            drain_s=self._config.drain_s,
            clock=self._clock,
        )
        reading = await self._ledger.read()
        try:
            # No await from the look at the victims to the claim: nobody else gets their memory.
            victims = eviction.check(request.evict)
            placement = self._ledger.hold(wish, reading, self.residents(), victims)
            eviction.begin()
            if victims:
                await eviction.carry_out()
                await self._ledger.settle(model.id, self.residents)
        finally:
            model.job.evicted, model.job.drained = eviction.evicted, eviction.drained
            eviction.drop()
        return _Plan(entry=entry, request=request, placement=placement)

    async def _live(self, model: Model, plan: _Plan, tasks: asyncio.TaskGroup) -> EngineLost | None:
        """Run one engine from its start to its end; None if the end was wanted."""
        engine = model.harness.make_engine(
            plan.entry, plan.request, plan.placement, on_end=model.wake.set
        )
        model.cycles_at_start = self._roster.cycles
        try:
            await self._start(model, engine, plan, tasks)
            await self._watch(model, engine)
            if model.state.status == "draining":
                if engine.ended.is_set():
                    self._roster.apply(model, self._died(model, engine))
                await self._drain(model, engine)
                return None
            if model.state.is_recycling and not engine.ended.is_set():
                await self._recycle(model, engine)
                return None
            return self._died(model, engine)
        except CortexError as exc:
            return self._lost(model, exc)
        finally:
            await engine.kill()
            model.engine = None

    async def _start(
        self, model: Model, engine: Engine, plan: _Plan, tasks: asyncio.TaskGroup
    ) -> None:
        job = model.job
        assert job is not None

        def on_progress(progress: Progress) -> None:
            job.advance(progress.phase, progress.bytes_done, progress.bytes_total)
            self._roster.touched(model)

        async with task_scope() as both:
            opening = both.create_task(model.harness.open_chat(plan.entry), name=f"chat {model.id}")
            await engine.start(tasks)
            loaded = await engine.load(
                on_progress=on_progress,
                timeout_s=model.harness.limits(plan.entry).load_timeout_s,
            )
        chat = opening.result()
        if chat is not None:
            chat = replace(chat, max_model_len=loaded.max_model_len)
            # What a later load asked of the model holds for its next engine, too.
            chat = chat.asked(plan.request) if model.chat is None else chat.like(model.chat)
        model.chat = chat
        model.loaded = loaded
        self._open(model, engine, plan, loaded, job)

    def _open(
        self, model: Model, engine: Engine, plan: _Plan, loaded: LoadedModel, job: Job
    ) -> None:
        limits = model.harness.limits(plan.entry)
        model.engine = engine
        if model.admission is None or not model.state.is_recycling:
            model.admission = Admission(
                model.id,
                max_in_flight=limits.max_in_flight or loaded.max_num_seqs,
                max_queue_depth=limits.max_queue_depth,
                max_wait_s=limits.max_wait_s,
                on_idle=model.wake.set,
            )
        self._ledger.take(
            model.id,
            weight_bytes=loaded.weight_bytes,
            cache_bytes=loaded.cache_bytes,
            pid=engine.pid,
        )
        if model.loaded_s is None:
            model.loaded_s = self._clock()
        self._roster.apply(model, EngineReady(now_s=self._clock()))
        # Whoever waited while the engine was recycled goes on.
        model.admission.resume()
        job.succeed()
        load_s = job.load_s or 0.0
        self._remember_load(model.id, load_s)
        self._metrics.load_ended(model.id, load_s)
        _logger.info(
            "loaded",
            extra={"model": model.id, "device": loaded.device, "seconds": round(load_s, 1)},
        )

    async def _watch(self, model: Model, engine: Engine) -> None:
        """Return when the engine has ended, is wanted to end and may, or has to."""
        stall_s = self._config.stall_s
        while not engine.ended.is_set():
            state = model.state
            if state.status == "draining" and not state.is_reversible:
                return
            limit_s = min(STALL_CHECK_S, stall_s / STALL_CHECKS)
            if state.is_recycling:
                if not model.in_flight:
                    return
                left_s = state.since_s + self._config.drain_s - self._clock()
                if left_s <= 0:
                    self._drop_recycle(model)
                    continue
                limit_s = min(limit_s, left_s)
            model.wake.clear()
            try:
                async with asyncio.timeout(limit_s):
                    await model.wake.wait()
            except TimeoutError:
                if engine.silent_s() > stall_s:
                    _logger.error(
                        "engine is stuck; ending it",
                        extra={"model": model.id, "silent_s": round(engine.silent_s(), 1)},
                    )
                    await engine.kill()

    async def _recycle(self, model: Model, engine: Engine) -> None:
        """End an idle engine in good order; the next one takes its place."""
        _logger.info("recycling", extra={"model": model.id})
        model.engine = None
        await engine.stop(grace_s=ENGINE_STOP_S)
        self._ledger.give_back(model.id)
        self._metrics.recycled(model.id)
        self._roster.apply(model, EngineRecycled(now_s=self._clock()))

    def _drop_recycle(self, model: Model) -> None:
        assert model.admission is not None
        assert model.job is not None
        self._roster.apply(model, RecycleDropped(now_s=self._clock()))
        model.admission.resume()
        model.job.fail(
            ModelBusyError(
                f"model '{model.id}' was not recycled: it still had {model.in_flight} requests in "
                f"hand after {self._config.drain_s:g} s",
                retry_after_s=BUSY_RETRY_S,
            )
        )

    def _lose(self, model: Model, lost: EngineLost) -> float:
        """Record a failed load or a dead engine; return the pause before the next attempt."""
        was = model.state.status
        decision = self._roster.apply(model, lost)
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
            self._ledger.give_back(model.id)
            if model.job is None or model.job.is_done:
                model.job = self.job(model)
        return decision.pause_s

    def _died(self, model: Model, engine: Engine) -> EngineLost:
        error = EngineDiedError(f"model '{model.id}': {engine.cause_of_death}")
        return self._lost(model, error)

    def _lost(self, model: Model, error: CortexError) -> EngineLost:
        blameless = isinstance(
            error,
            InsufficientMemoryError
            | HubUnreachableError
            | ModelNotFoundError
            | BadRequestError
            | ConflictError,
        )
        claim = self._ledger.claim(model.id)
        if isinstance(error, InsufficientMemoryError) and not error.extras and claim:
            # The engine found less than was promised here: only an eviction can help.
            others = [each for each in self.residents() if each.id != model.id]
            short = Shortage(device=claim.device, needed_bytes=claim.num_bytes, free_bytes=0)
            error.extras = insufficient(model.id, [short], others).extras
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
        error = shutting_down_error() if self.is_closing else unloading_error(model)
        await engine.stop(grace_s=ENGINE_STOP_S, error=error)
        _logger.info("unloaded", extra={"model": model.id})

    def resident(self, model: Model) -> Resident | None:
        """Return what a refused caller needs to know of a model; None if it holds no memory."""
        claim = self._ledger.claim(model.id)
        if claim is None:
            return None
        now_s = self._clock()
        return Resident(
            id=model.id,
            device=claim.device,
            bytes=claim.num_bytes,
            in_flight=model.in_flight,
            last_used_s=None if model.last_used_s is None else now_s - model.last_used_s,
            priority=model.policy.priority,
            pinned=model.policy.pinned,
            min_resident_left_s=model.evictable_in_s(now_s) or 0.0,
        )

    def residents(self) -> list[Resident]:
        """Return who holds memory, least recently used first; once for each of its devices."""
        found = [
            msgspec.structs.replace(resident, device=device)
            for resident in map(self.resident, self._roster.all())
            if resident is not None and (claim := self._ledger.claim(resident.id)) is not None
            for device in claim.devices
        ]
        return sorted(found, key=lambda each: -(each.last_used_s or float("inf")))

    def _remember_load(self, model_id: str, load_s: float) -> None:
        self._load_s[model_id] = load_s
        self._load_s.move_to_end(model_id)
        if len(self._load_s) > MAX_REMEMBERED:
            self._load_s.popitem(last=False)
