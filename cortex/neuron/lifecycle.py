"""What is in this host's memory: loads, unloads, recycling, the drain at the end.

States are the roster's, memory is the ledger's, and each model on its way in, out or in service
has one task of the supervisor. What follows from what is decided in `neuron.residency`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager

from cortex.core.config import TorchHarness
from cortex.core.errors import (
    ConflictError,
    CortexError,
    ModelNotFoundError,
    UnsupportedFieldError,
)
from cortex.core.neuron_api import LoadRequest
from cortex.neuron.devices import DeviceMemory, Reading
from cortex.neuron.discovery import Monitor
from cortex.neuron.engine_client import recovering_error
from cortex.neuron.harness import Harness
from cortex.neuron.jobs import Job
from cortex.neuron.ledger import Ledger
from cortex.neuron.library import Entry
from cortex.neuron.memory import Claim, Wish
from cortex.neuron.metrics import Metrics
from cortex.neuron.peaks import Peaks
from cortex.neuron.reaper import expired, reap
from cortex.neuron.residency import Effect, LoadAsked, RecycleAsked, UnloadAsked
from cortex.neuron.resident import (
    Model,
    Policy,
    Serving,
    failed_error,
    loading_error,
    shutting_down_error,
    unloading_error,
)
from cortex.neuron.roster import Roster
from cortex.neuron.scope import task_scope
from cortex.neuron.supervisor import Supervisor

SCAN_S = 2.0
# What a load request may call a harness by besides its name.
ALIASES = {"candle": "torch"}


class Lifecycle:
    """Loads and unloads models on request and keeps the loaded ones alive. Use as a context.

    Args:
        harnesses: the engine kinds of this host; of two that know a model the first has it, and
            one that none of them knows is the last's.
        clock: monotonic seconds.
        on_change: called with a model's id whenever what is to be told of it may have changed.
    """

    def __init__(
        self,
        *,
        config: TorchHarness,
        harnesses: Sequence[Harness],
        monitor: Monitor,
        peaks: Peaks,
        metrics: Metrics,
        clock: Callable[[], float],
        on_change: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._harnesses = {each.name: each for each in harnesses}
        self._config = config
        self._clock = clock
        self._metrics = metrics
        self._roster = Roster(on_change)
        self._ledger = Ledger(monitor, peaks, clock=clock)
        self._supervisor = Supervisor(
            config=config, roster=self._roster, ledger=self._ledger, metrics=metrics, clock=clock
        )
        self._tasks: asyncio.TaskGroup | None = None

    @asynccontextmanager
    async def run(self) -> AsyncIterator["Lifecycle"]:
        """Be ready for requests inside the context; unload everything on the way out."""
        try:
            async with task_scope() as tasks:
                self._tasks = tasks
                background = [
                    tasks.create_task(self._ledger.run(), name="ledger"),
                    tasks.create_task(
                        reap(self._roster.all, self._unload_idle, self._clock, tasks),
                        name="reaper",
                    ),
                ]
                try:
                    yield self
                finally:
                    for each in background:
                        each.cancel()
                    await self._close()
        finally:
            self._ledger.close()

    # What is there.

    @property
    def is_closing(self) -> bool:
        """Whether everything is being unloaded."""
        return self._supervisor.is_closing

    @property
    def cycles(self) -> int:
        """Loads and unloads so far."""
        return self._roster.cycles

    def models(self) -> list[Model]:
        """Return the models that are not merely servable: loaded, moving or failed."""
        return self._roster.all()

    def model(self, model_id: str) -> Model | None:
        """Return one of them."""
        return self._roster.get(model_id)

    def claim(self, model_id: str) -> Claim | None:
        """Return the memory that a model holds or is promised."""
        return self._ledger.claim(model_id)

    def free_bytes(self, memory: DeviceMemory) -> int:
        """Return what a load could still take of a device as it was read."""
        return self._ledger.free_bytes(memory)

    def need_bytes(self, wish: Wish) -> int | None:
        """Return what a load would ask of the devices of this host."""
        return self._ledger.need_bytes(wish)

    def drift(self, reading: Reading) -> dict[int, int]:
        """Return, by GPU, the memory in use beyond what models hold."""
        return self._ledger.drift(reading)

    def harness_names(self) -> list[str]:
        """Return the engine kinds of this host."""
        return list(self._harnesses)

    def harness_of(self, model_id: str) -> Harness:
        """Return the first engine kind that knows a model, or else the last."""
        harnesses = list(self._harnesses.values())
        found = (each for each in harnesses if each.find(model_id) is not None)
        return next(found, harnesses[-1])

    def is_external(self, model_id: str) -> bool:
        """Whether somebody else's engine serves a model, or would."""
        model = self._roster.get(model_id)
        harness = self.harness_of(model_id) if model is None else model.harness
        return harness.name == "command"

    def listings(self) -> list[Mapping[str, Entry]]:
        """Return what could be served, by id, of each engine kind."""
        return [each.entries for each in self._harnesses.values()]

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

    async def refresh(self, limit_s: float) -> None:
        """Look again at what could be served; what takes longer goes on without the caller."""
        async with asyncio.TaskGroup() as tasks:
            for each in self._harnesses.values():
                tasks.create_task(each.refresh(limit_s), name=f"refresh {each.name}")

    # Requests.

    def serving(self, model_id: str) -> Serving:
        """Return what a request needs of a loaded model, and note its use.

        Raises:
            ModelNotFoundError: this host knows no such model.
            ModelNotLoadedError: it knows it and has not loaded it.
            ModelLoadingError, ModelRecoveringError, UnloadedError: it is on its way.
            LoadFailedError: it was loaded and could not be kept.
        """
        model = self._roster.get(model_id)
        if model is None:
            raise self.harness_of(model_id).missing(model_id)
        match model.state.status:
            case "loaded" | "recovering" if model.state.is_recycling:
                return self._serving(model)
            case "loaded":
                assert model.engine is not None
                if not model.engine.can_serve:
                    # Its end is known here before the task that owns it has seen it.
                    raise recovering_error(model.id)
                return self._serving(model)
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

    def _serving(self, model: Model) -> Serving:
        assert model.admission is not None
        model.last_used_s = self._clock()
        model.num_requests += 1
        return Serving(model=model, chat=model.chat, admission=model.admission)

    @contextmanager
    def using(self, model_id: str) -> Iterator[None]:
        """Have a model count as in use inside the context, and as used until its end."""
        model = self._roster.get(model_id)
        if model is None:
            yield
            return
        model.num_open += 1
        try:
            yield
        finally:
            model.num_open -= 1
            model.last_used_s = self._clock()

    # Loads and unloads.

    async def load(self, request: LoadRequest) -> Job:
        """Start or join the load of a model; the job tells when it is done.

        What the request sets of the model's policy (TTL, minimum residency, pinned, priority)
        holds from then on, also where the model is loaded already.

        Raises:
            ModelNotFoundError: nothing here and nothing on the hub goes by that name.
            BadRequestError: an option is not supported.
            LoadFailedError: the last attempt has just failed; the message has the cause.
            ShuttingDownError: the process is ending.
        """
        name = request.harness or (None if request.command is None else "command")
        harness = await self._harness_of(request.model_id, name)
        harness.check(request)
        while True:
            if self.is_closing:
                raise shutting_down_error()
            model = self._roster.enter(request.model_id, harness)
            effects = self._roster.apply(model, LoadAsked(now_s=self._clock())).effects
            if Effect.WAIT_FOR_END in effects:
                await model.calm.wait()
                continue
            if Effect.REFUSE in effects:
                raise failed_error(model, self._clock())
            if Effect.START in effects:
                model.harness = harness
                model.policy = Policy(ttl_s=self._config.idle_ttl_s).asked(request)
                self._start(model, request)
            else:
                model.policy = model.policy.asked(request)
                model.chat = model.chat and model.chat.asked(request)
                self._roster.touched(model)
            assert model.job is not None
            return model.job

    def _start(self, model: Model, request: LoadRequest) -> None:
        assert self._tasks is not None, "used outside run()"
        model.job = self._supervisor.job(model)
        model.loaded_s = None
        model.chat = None
        model.ended.clear()
        model.wake.clear()
        model.task = self._tasks.create_task(
            self._supervisor.run(model, request, self._tasks), name=f"model {model.id}"
        )

    async def unload(self, model_id: str) -> None:
        """Unload a model: no new requests, those in hand may end within a limit, then the engine.

        Raises:
            ModelNotFoundError: it is not in memory.
        """
        model = self._roster.get(model_id)
        if model is None:
            raise _not_loaded(model_id)
        effects = self._roster.apply(model, UnloadAsked(now_s=self._clock())).effects
        if Effect.NOT_RESIDENT in effects:
            raise _not_loaded(model_id)
        if Effect.ABORT in effects and model.task is not None:
            model.task.cancel()
        model.wake.set()
        if model.task is None:
            self._roster.forget(model)
        else:
            await model.ended.wait()

    async def _unload_idle(self, model_id: str) -> None:
        model = self._roster.get(model_id)
        # It may have been used since it was seen to be idle.
        if model is not None and expired([model], self._clock()):
            self._metrics.idle_unloaded(model_id)
            await self.unload(model_id)

    async def recycle(self, model_id: str) -> Job:
        """End a loaded model's engine, once it is idle, and start it again.

        Requests that come meanwhile wait in the model's queue. The job tells when the new engine
        serves, or that the old one did not become idle in time and goes on.

        Raises:
            ModelNotFoundError: it is not in memory.
            ConflictError: it is on its way in or out.
        """
        model = self._roster.get(model_id)
        if model is None:
            raise _not_loaded(model_id)
        effects = self._roster.apply(model, RecycleAsked(now_s=self._clock())).effects
        if Effect.NOT_RESIDENT in effects:
            raise _not_loaded(model_id)
        if Effect.REFUSE in effects:
            raise ConflictError(
                f"model '{model_id}' is {model.state.status}; only a loaded one can be recycled"
            )
        if Effect.PAUSE in effects:
            assert model.admission is not None
            model.admission.pause()
            model.job = self._supervisor.job(model)
            model.wake.set()
        assert model.job is not None
        return model.job

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

    async def _close(self) -> None:
        """Unload everything; each model has its drain and then its end."""
        self._supervisor.is_closing = True
        async with asyncio.TaskGroup() as tasks:
            for model in self._roster.all():
                tasks.create_task(self._close_one(model.id), name=f"close {model.id}")

    async def _close_one(self, model_id: str) -> None:
        try:
            await self.unload(model_id)
        except ModelNotFoundError:
            return


def _not_loaded(model_id: str) -> CortexError:
    return ModelNotFoundError(f"model '{model_id}' is not loaded here")
