"""The life of one model on this host, as a pure state machine.

`decide` takes what is known of a model and what happened to it, and returns what is known now
and what its owner (`neuron.lifecycle`) has to do. No clock, no I/O.
"""

from dataclasses import dataclass, field, replace
from enum import Enum, auto

from cortex.core.errors import CortexError
from cortex.core.neuron_api import ModelStatus

# A load that failed is not tried again this soon: callers get its cause instead.
COOL_DOWN_S = 5.0
# How often a dead engine is started again before the model is given up, and the pauses between.
MAX_RESTARTS = 3
RESTART_PAUSES_S = (0.0, 2.0, 8.0)
# An engine that served this long before it died starts with a full count of restarts.
STABLE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Residency:
    """What is known of one model.

    Attributes:
        error: why the model is `failed` or `recovering`; None elsewhere.
        since_s: when the status was entered, on the owner's clock.
        restarts: restarts since the engine was last stable.
        is_reversible: `draining` to make room for another, and `loaded` again if that comes to
            nothing.
        is_recycling: its engine is being ended and started again; requests wait meanwhile.
    """

    status: ModelStatus = "unloaded"
    error: CortexError | None = None
    since_s: float = 0.0
    restarts: int = 0
    is_reversible: bool = False
    is_recycling: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadAsked:
    """A caller wants the model to be loaded."""

    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadAsked:
    """A caller, an eviction or the end of the process wants the model gone."""

    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictAsked:
    """Another model's load wants its memory, once it is idle."""

    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictDropped:
    """The load that wanted its memory will not have it: everything stays as it was."""

    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RecycleAsked:
    """A caller wants the engine to be ended, once it is idle, and started again."""

    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RecycleDropped:
    """The engine did not become idle in time, and goes on."""

    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRecycled:
    """The engine was ended and may be started again."""

    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReady:
    """The engine holds the model and can serve."""

    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLost:
    """The engine could not load, or ended without being asked to.

    `blameless` errors say nothing about the model (no memory just now, a repository that does
    not exist): the next caller may try at once.
    """

    error: CortexError
    now_s: float
    blameless: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Everything the model held is given back."""

    now_s: float


Happening = (
    LoadAsked
    | UnloadAsked
    | EvictAsked
    | EvictDropped
    | RecycleAsked
    | RecycleDropped
    | EngineReady
    | EngineRecycled
    | EngineLost
    | Ended
)


class Effect(Enum):
    """What the owner does next."""

    START = auto()  # begin a load job
    JOIN = auto()  # wait for the job in hand
    ALREADY_LOADED = auto()  # answer at once
    REFUSE = auto()  # answer with the state's error
    WAIT_FOR_END = auto()  # wait for the drain, then ask again
    OPEN = auto()  # admit requests, wake those who wait for the load
    PAUSE = auto()  # admit nothing, let requests end, keep those that wait
    RESUME = auto()  # admit requests again
    DRAIN = auto()  # admit nothing, let requests end, then end the engine
    ABORT = auto()  # end the engine at once; it serves nobody
    CLOSE = auto()  # fail the requests in hand
    RESTART = auto()  # start the engine again after `pause_s`
    FAIL = auto()  # wake those who wait for the load with the state's error
    NOT_RESIDENT = auto()  # answer that there is nothing to unload


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The next state, what to do, and how long to wait before a restart."""

    state: Residency
    effects: tuple[Effect, ...] = field(default=())
    pause_s: float = 0.0


def decide(state: Residency, event: Happening) -> Decision:
    """Return what follows from `event`; an event that cannot concern the state changes nothing."""
    match event:
        case LoadAsked():
            return _on_load(state, event.now_s)
        case UnloadAsked():
            return _on_unload(state, event.now_s)
        case EvictAsked():
            return _on_evict(state, event.now_s)
        case RecycleAsked():
            return _on_recycle(state, event.now_s)
        case EvictDropped():
            return _resume(state, event.now_s, state.is_reversible)
        case RecycleDropped():
            return _resume(state, event.now_s, state.is_recycling and state.status == "loaded")
        case EngineRecycled():
            return _on_recycled(state, event.now_s)
        case EngineReady():
            return _on_ready(state, event.now_s)
        case EngineLost():
            return _on_lost(state, event)
        case Ended():
            return _on_ended(state, event.now_s)


def retry_after_s(state: Residency, now_s: float) -> float:
    """Return how long a failed model's cool-down still lasts, at least 1 s."""
    return max(1.0, COOL_DOWN_S - (now_s - state.since_s))


def _on_load(state: Residency, now_s: float) -> Decision:
    match state.status:
        case "loading" | "recovering":
            return Decision(state=state, effects=(Effect.JOIN,))
        case "loaded":
            return Decision(state=state, effects=(Effect.ALREADY_LOADED,))
        case "draining":
            return Decision(state=state, effects=(Effect.WAIT_FOR_END,))
        case "failed" if now_s - state.since_s < COOL_DOWN_S:
            return Decision(state=state, effects=(Effect.REFUSE,))
        case "failed" | "unloaded":
            loading = Residency(status="loading", since_s=now_s)
            return Decision(state=loading, effects=(Effect.START,))


def _on_unload(state: Residency, now_s: float) -> Decision:
    draining = Residency(status="draining", since_s=now_s)
    match state.status:
        case "unloaded":
            return Decision(state=state, effects=(Effect.NOT_RESIDENT,))
        case "failed":
            return Decision(state=Residency(since_s=now_s))
        case "loading" | "recovering":
            return Decision(state=draining, effects=(Effect.ABORT,))
        case "loaded":
            return Decision(state=draining, effects=(Effect.DRAIN,))
        case "draining" if state.is_reversible:
            return Decision(state=draining, effects=(Effect.DRAIN,))
        case "draining":
            return Decision(state=state, effects=(Effect.WAIT_FOR_END,))


def _on_evict(state: Residency, now_s: float) -> Decision:
    match state.status:
        case "loaded" if not state.is_recycling:
            leaving = replace(state, status="draining", since_s=now_s, is_reversible=True)
            return Decision(state=leaving, effects=(Effect.PAUSE,))
        case "draining" if not state.is_reversible:
            return Decision(state=state, effects=(Effect.WAIT_FOR_END,))
        case "unloaded" | "failed":
            return Decision(state=state, effects=(Effect.NOT_RESIDENT,))
        case _:
            return Decision(state=state, effects=(Effect.REFUSE,))


def _on_recycle(state: Residency, now_s: float) -> Decision:
    match state.status:
        case "loaded" | "recovering" if state.is_recycling:
            return Decision(state=state, effects=(Effect.JOIN,))
        case "loaded":
            recycling = replace(state, since_s=now_s, is_recycling=True)
            return Decision(state=recycling, effects=(Effect.PAUSE,))
        case "unloaded" | "failed":
            return Decision(state=state, effects=(Effect.NOT_RESIDENT,))
        case _:
            return Decision(state=state, effects=(Effect.REFUSE,))


def _on_recycled(state: Residency, now_s: float) -> Decision:
    if state.status != "loaded" or not state.is_recycling:
        return Decision(state=state)
    restarting = replace(state, status="recovering", since_s=now_s)
    return Decision(state=restarting, effects=(Effect.RESTART,))


def _resume(state: Residency, now_s: float, is_due: bool) -> Decision:
    if not is_due:
        return Decision(state=state)
    loaded = Residency(status="loaded", since_s=now_s, restarts=state.restarts)
    return Decision(state=loaded, effects=(Effect.RESUME,))


def _on_ready(state: Residency, now_s: float) -> Decision:
    if state.status not in ("loading", "recovering"):
        return Decision(state=state)
    loaded = Residency(status="loaded", since_s=now_s, restarts=state.restarts)
    return Decision(state=loaded, effects=(Effect.OPEN,))


def _on_lost(state: Residency, event: EngineLost) -> Decision:
    match state.status:
        case "loading":
            if event.blameless:
                gone = Residency(error=event.error, since_s=event.now_s)
                return Decision(state=gone, effects=(Effect.FAIL,))
            failed = Residency(status="failed", error=event.error, since_s=event.now_s)
            return Decision(state=failed, effects=(Effect.FAIL,))
        case "loaded":
            stable = event.now_s - state.since_s >= STABLE_S
            return _restart(replace(state, restarts=0) if stable else state, event)
        case "recovering":
            return _restart(state, event)
        case "draining" if state.is_reversible:
            # There is nothing left to come back to, and somebody waits for the memory.
            leaving = replace(state, since_s=event.now_s, is_reversible=False)
            return Decision(state=leaving, effects=(Effect.DRAIN,))
        case _:
            return Decision(state=state)


def _restart(state: Residency, event: EngineLost) -> Decision:
    if state.restarts >= MAX_RESTARTS:
        failed = Residency(status="failed", error=event.error, since_s=event.now_s)
        return Decision(state=failed, effects=(Effect.CLOSE, Effect.FAIL))
    recovering = Residency(
        status="recovering",
        error=event.error,
        since_s=event.now_s,
        restarts=state.restarts + 1,
    )
    pause_s = RESTART_PAUSES_S[state.restarts]
    return Decision(state=recovering, effects=(Effect.CLOSE, Effect.RESTART), pause_s=pause_s)


def _on_ended(state: Residency, now_s: float) -> Decision:
    if state.status != "draining":
        return Decision(state=state)
    return Decision(state=Residency(since_s=now_s))
