"""Cold loads: one at a time per model, joined by all who want it, ended by nobody's leaving."""

import asyncio
import logging
from collections.abc import Callable

import msgspec

from cortex.core.errors import (
    CortexError,
    InternalError,
    LoadFailedError,
    RemoteError,
    ServiceUnavailableError,
    ShuttingDownError,
    UpstreamConnectionError,
)
from cortex.core.neuron_api import LoadResponse
from cortex.gateway.fleet import Fleet
from cortex.gateway.live import Live
from cortex.gateway.metrics import Metrics
from cortex.gateway.neuron_client import NeuronClient, UnreachableError
from cortex.gateway.rates import RateBook
from cortex.gateway.room import Shortage, choose_victims, rivals_here, shortage_of
from cortex.gateway.router import ColdLoad, LoadPlan

MAX_EVICTION_ROUNDS = 2
# While residents that would have to leave are busy, room is asked for again at this pace.
ROOM_RETRY_S = 2.0
ROOM_WAIT_S = 60.0
# A load may take this long plus the time its weights need at a tenth of the rate that was measured
# on the node, within bounds: what was in the page cache once may have to come from a slow disk.
LOAD_BASE_S = 300.0
LOAD_PATIENCE = 10.0
SLOWEST_LOAD_BYTES_S = 10 << 20
FASTEST_LOAD_BYTES_S = 100 << 20
UNKNOWN_SIZE_LOAD_S = 3600.0
RETRY_AFTER_S = 10.0

# What a neuron says of a victim that it does not let go.
_VICTIM_STAYS = frozenset(["victim_protected", "victim_busy", "model_busy"])
_GIB = 1 << 30
_logger = logging.getLogger(__name__)


def load_deadline_s(weight_bytes: int | None, measured_bytes_s: float | None) -> float:
    """Return how long a load of so many bytes may take where loads were measured at a rate."""
    if weight_bytes is None:
        return UNKNOWN_SIZE_LOAD_S
    expected = (measured_bytes_s or 0.0) / LOAD_PATIENCE
    rate = min(FASTEST_LOAD_BYTES_S, max(SLOWEST_LOAD_BYTES_S, expected))
    return LOAD_BASE_S + weight_bytes / rate


class _CrowdedError(LoadFailedError):
    """What would have to leave is at work, and may be done soon."""


class _Load:
    """A load under way, and how it ended."""

    def __init__(self) -> None:
        self.done = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        # What waiters get if the gateway ends before the load does.
        self.error: CortexError | None = ShuttingDownError(
            "the gateway is shutting down", retry_after_s=RETRY_AFTER_S
        )


class Loads:
    """The owner of this gateway's cold loads.

    Args:
        rates: learns how long loads take.
        poke: has a node polled at once.
        tasks: where loads live; they outlast the requests that began them.
        room_wait_s: how long a load waits for busy residents to become evictable.
    """

    def __init__(
        self,
        client: NeuronClient,
        fleet: Fleet,
        metrics: Metrics,
        live: Live,
        *,
        rates: RateBook,
        poke: Callable[[str], None],
        tasks: asyncio.TaskGroup,
        clock: Callable[[], float],
        room_wait_s: float = ROOM_WAIT_S,
        room_retry_s: float = ROOM_RETRY_S,
    ) -> None:
        self._client = client
        self._fleet = fleet
        self._metrics = metrics
        self._live = live
        self._rates = rates
        self._poke = poke
        self._tasks = tasks
        self._clock = clock
        self.room_wait_s = room_wait_s
        self.room_retry_s = room_retry_s
        self._loads: dict[str, _Load] = {}

    async def ensure_loaded(self, cold: ColdLoad) -> None:
        """Start the load, or join the one under way, and wait for its end.

        Raises:
            CortexError: no node could load the model; the cause of the preferred one.
        """
        load = self._joined(cold)
        await load.done.wait()
        if load.error is not None:
            raise load.error

    def begin(self, cold: ColdLoad) -> None:
        """Start the load, if there is none under way, and leave it to itself."""
        self._joined(cold)

    def is_loading(self, model_id: str) -> bool:
        """Whether this gateway has a load of the model under way."""
        return model_id in self._loads

    def _joined(self, cold: ColdLoad) -> _Load:
        load = self._loads.get(cold.model_id)
        if load is None:
            load = self._loads[cold.model_id] = _Load()
            load.task = self._tasks.create_task(self._run(load, cold), name=f"load {cold.model_id}")
        return load

    def cancel(self) -> None:
        """Give up waiting for the loads under way; what a neuron has begun it goes on with."""
        for load in self._loads.values():
            if load.task is not None:
                load.task.cancel()

    async def _run(self, load: _Load, cold: ColdLoad) -> None:
        try:
            await self._try_plans(cold)
            load.error = None
        except CortexError as exc:
            load.error = exc
        except Exception:  # whatever it was, its waiters must learn that the load ended
            _logger.exception("loading %s failed unexpectedly", cold.model_id)
            load.error = InternalError(f"loading model '{cold.model_id}' failed unexpectedly")
        finally:
            del self._loads[cold.model_id]
            load.done.set()

    async def _try_plans(self, cold: ColdLoad) -> None:
        """Load on the first node that can at once, else where room may come soon."""
        first: CortexError | None = None
        crowded: LoadPlan | None = None
        is_only = len(cold.plans) == 1
        for plan in cold.plans:
            error = await self._try(plan, may_wait=is_only)
            if error is None:
                return
            first = first or error
            if crowded is None and isinstance(error, _CrowdedError):
                crowded = plan
        if crowded is not None and not is_only:
            error = await self._try(crowded, may_wait=True)
            if error is None:
                return
        assert first is not None
        raise first

    async def _try(self, plan: LoadPlan, *, may_wait: bool) -> CortexError | None:
        """Load on one node; return why that failed."""
        try:
            self._check(plan)
            await self._load_on(plan, may_wait=may_wait)
        except CortexError as exc:
            name = plan.request.model_id
            _logger.warning("loading %s on %s failed: %s", name, plan.node, exc.message)
            return exc
        return None

    def _check(self, plan: LoadPlan) -> None:
        """Raise where the node takes nothing new any more, since the plan was made."""
        node = self._fleet.snapshot().node(plan.node)
        if node is None or node.draining:
            raise ServiceUnavailableError(
                f"model '{plan.request.model_id}' is not loaded on {plan.node}, which takes "
                "nothing new",
                retry_after_s=RETRY_AFTER_S,
            )

    async def _load_on(self, plan: LoadPlan, *, may_wait: bool) -> None:
        """Load on one node and record how it ended.

        Args:
            may_wait: for residents at work, which may be done soon.
        """
        model_id, node = plan.request.model_id, plan.node
        view = self._fleet.snapshot().node(node)
        before = (view.status(model_id) if view is not None else None) or "unloaded"
        if before != "loading":
            if plan.is_asked_for:
                self._metrics.record_cold_start(model_id, node)
            self._fleet.record_claim(node, model_id, plan.needed_bytes)
        begun_s = self._clock()
        limit_s = load_deadline_s(plan.weight_bytes, self._rates.load_bytes_s(node))
        is_lost = False

        def give_up() -> None:
            nonlocal is_lost
            is_lost = True
            limit.reschedule(0)

        try:
            async with asyncio.timeout(limit_s) as limit:
                # A host that is gone closes no connection: without this, all would wait on.
                with self._fleet.on_node_lost(node, give_up):
                    answer = await self._load_making_room(plan, may_wait=may_wait)
        except TimeoutError as exc:
            if is_lost:
                self._failed(plan, "unloaded")
                raise UpstreamConnectionError(
                    f"node {node} became unreachable while it loaded model '{model_id}'"
                ) from exc
            self._failed(plan, "failed")
            raise LoadFailedError(
                f"model '{model_id}' was not loaded on {node} within {limit_s:.0f} s",
                retry_after_s=RETRY_AFTER_S,
            ) from exc
        except UnreachableError:
            self._fleet.record_fault(node, at_once=True)
            self._failed(plan, "unloaded")
            raise
        except RemoteError as exc:
            self._failed(plan, "failed", exc.message)
            raise _load_failed(plan, exc) from exc
        except CortexError as exc:
            if may_wait or not isinstance(exc, _CrowdedError):
                self._failed(plan, "unloaded")
            else:
                self._fleet.record_status(node, model_id, before)
            raise
        load_s = self._clock() - begun_s
        self._fleet.record_status(node, model_id, "loaded")
        for victim in answer.evicted:
            self._fleet.record_status(node, victim, "unloaded")
        self._metrics.record_evictions(len(answer.evicted))
        self._metrics.record_load(model_id, node, loaded=True, load_s=load_s)
        if before != "loading":
            # One that was joined tells only how long its rest took.
            self._rates.learn_load(node, model_id, plan.weight_bytes, load_s)
        _logger.info("model %s loaded on %s", model_id, node, extra={"load_s": round(load_s, 2)})
        self._poke(node)

    def _failed(self, plan: LoadPlan, status: str, error: str | None = None) -> None:
        model_id = plan.request.model_id
        self._fleet.record_status(plan.node, model_id, status, error)
        self._metrics.record_load(model_id, plan.node, loaded=False, load_s=0.0)
        self._poke(plan.node)

    async def _load_making_room(self, plan: LoadPlan, *, may_wait: bool) -> LoadResponse:
        """Ask for the load, naming victims where memory is short."""
        give_up_s = self._clock() + (self.room_wait_s if may_wait else 0.0)
        rivals = await self._rivals(plan, give_up_s)
        request = msgspec.structs.replace(plan.request, evict=rivals)
        rounds = 0
        while True:
            try:
                answer = await self._client.load(plan.node, plan.endpoint, request)
            except RemoteError as exc:
                left_s = max(0.0, give_up_s - self._clock())
                if exc.code in _VICTIM_STAYS and left_s and rounds < MAX_EVICTION_ROUNDS:
                    # Something changed since the victims were named; they are chosen anew.
                    self._poke(plan.node)
                elif exc.code != "insufficient_memory":
                    raise
                else:
                    shortage = shortage_of(exc)
                    victims = self._victims(plan, shortage)
                    if victims and rounds < MAX_EVICTION_ROUNDS:
                        rounds += 1
                        request = msgspec.structs.replace(plan.request, evict=[*rivals, *victims])
                        continue
                    # Residents at work may be done soon; nothing else changes by waiting.
                    patience_s = left_s if may_wait else self.room_wait_s
                    later = self._victims(plan, shortage, patience_s=patience_s)
                    if not later or rounds >= MAX_EVICTION_ROUNDS:
                        raise _no_room(plan, shortage) from exc
                    if not left_s:
                        raise _no_room(plan, shortage, _CrowdedError) from exc
                request = msgspec.structs.replace(plan.request, evict=rivals)
                await asyncio.sleep(self.room_retry_s)
                continue
            if answer.status == "loaded":
                return answer
            # A neuron that does not wait is asked again, which joins its load.
            await asyncio.sleep(self.room_retry_s)

    async def _rivals(self, plan: LoadPlan, give_up_s: float) -> list[str]:
        """Return the residents that a group excludes beside the newcomer, once all may leave."""
        while True:
            catalogue, policy = self._live.catalogue, self._live.config.eviction
            kept = rivals_here(self._fleet.snapshot(), catalogue, policy, plan)
            if not any(kept.values()):
                return list(kept)
            if self._clock() >= give_up_s:
                why = ", ".join(f"{name} {reason}" for name, reason in kept.items() if reason)
                raise _CrowdedError(
                    f"model '{plan.request.model_id}' may not be on {plan.node} beside others of "
                    f"its group, and they cannot leave: {why}; try again later",
                    retry_after_s=RETRY_AFTER_S,
                )
            await asyncio.sleep(self.room_retry_s)

    def _victims(
        self, plan: LoadPlan, shortage: Shortage, *, patience_s: float | None = None
    ) -> list[str] | None:
        return choose_victims(
            self._fleet.snapshot(),
            self._live.catalogue,
            self._live.config.eviction,
            plan,
            shortage,
            patience_s=patience_s,
        )


def _load_failed(plan: LoadPlan, exc: RemoteError) -> CortexError:
    message = f"model '{plan.request.model_id}' could not be loaded on {plan.node}: {exc.message}"
    if exc.status >= 500:
        return LoadFailedError(message, retry_after_s=exc.retry_after_s or RETRY_AFTER_S)
    # What only a change of the checkpoint or the catalogue can mend is not worth a retry.
    return RemoteError(message, status=exc.status, code=exc.code, kind=exc.kind, extras=exc.extras)


def _no_room(
    plan: LoadPlan, shortage: Shortage, kind: type[LoadFailedError] = LoadFailedError
) -> LoadFailedError:
    return kind(
        f"model '{plan.request.model_id}' needs {shortage.needed_bytes / _GIB:.1f} GiB on "
        f"{plan.node}, {shortage.free_bytes / _GIB:.1f} free, and what is resident there is in "
        "use, pinned or of higher priority; try again later or unload one",
        retry_after_s=RETRY_AFTER_S,
    )
