"""One model in the lifecycle's hands, what a request gets of it, and what it is told instead."""

import asyncio
from dataclasses import dataclass, field

from cortex.core.catalogue import DEFAULT_PRIORITY
from cortex.core.errors import (
    CortexError,
    InternalError,
    LoadFailedError,
    ModelLoadingError,
    ServiceUnavailableError,
    ShuttingDownError,
)
from cortex.core.neuron_api import LoadRequest
from cortex.neuron.admission import Admission
from cortex.neuron.chat.model import ChatModel
from cortex.neuron.engine_client import recovering_error
from cortex.neuron.harness import Engine, Harness, LoadedModel
from cortex.neuron.jobs import Job
from cortex.neuron.library import Entry
from cortex.neuron.residency import Residency, retry_after_s

LOADING_RETRY_S = 5.0


class UnloadedError(ServiceUnavailableError):
    """The model is being unloaded."""

    code = "model_unloading"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How long a model stays.

    Attributes:
        ttl_s: unloaded after so long without a request; None keeps it.
        min_resident_s: not evicted before it was loaded for so long.
        pinned: never evicted and never unloaded for idleness.
        priority: evicted only for one of at least the same.
    """

    ttl_s: float | None = None
    min_resident_s: float = 0.0
    pinned: bool = False
    priority: int = DEFAULT_PRIORITY

    def asked(self, request: LoadRequest) -> "Policy":
        """Return the policy with what a load request sets; what it leaves out stays."""
        return Policy(
            ttl_s=self.ttl_s if request.ttl_s is None else request.ttl_s or None,
            min_resident_s=request.min_resident_s or self.min_resident_s,
            pinned=request.pinned or self.pinned,
            priority=self.priority if request.priority is None else request.priority,
        )


@dataclass(slots=True, kw_only=True, eq=False)
class Model:
    """One model that is, was or will be in memory.

    The roster changes its state, the ledger its memory, the supervisor the rest.

    Attributes:
        chat: what turns messages into tokens and back; set once it is loaded.
        loaded_s: when it was loaded; a new engine for it changes nothing.
        cycles_at_start: the roster's count of loads and unloads when its engine started.
        num_open: requests that are being worked on, from their first word to their last.
        wake: set when the supervising task has something to look at.
        calm: set while the model is not draining.
        ended: set while no task supervises the model.
    """

    id: str
    harness: Harness
    state: Residency = field(default_factory=Residency)
    policy: Policy = field(default_factory=Policy)
    job: Job | None = None
    entry: Entry | None = None
    chat: ChatModel | None = None
    engine: Engine | None = None
    loaded: LoadedModel | None = None
    admission: Admission | None = None
    loaded_s: float | None = None
    cycles_at_start: int = 0
    last_used_s: float | None = None
    num_requests: int = 0
    num_open: int = 0
    task: asyncio.Task[None] | None = None
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    calm: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def in_flight(self) -> int:
        """Sequences in the engine."""
        return 0 if self.admission is None else self.admission.in_flight

    @property
    def is_idle(self) -> bool:
        """Whether nothing is asked of it just now."""
        waiting = 0 if self.admission is None else self.admission.queue_depth
        return not (self.num_open or self.in_flight or waiting)

    def idle_s(self, now_s: float) -> float:
        """Return how long a loaded model has had nothing to do."""
        since_s = max(self.loaded_s or now_s, self.last_used_s or 0.0)
        return now_s - since_s if self.is_idle else 0.0

    def unload_in_s(self, now_s: float) -> float | None:
        """Return when idleness unloads the model, 0 if it is due, None if it does not."""
        ttl_s = self.policy.ttl_s
        if ttl_s is None or self.policy.pinned or self.state.is_recycling:
            return None
        if self.state.status != "loaded" or not self.is_idle:
            return None
        return max(0.0, ttl_s - self.idle_s(now_s))

    def evictable_in_s(self, now_s: float) -> float | None:
        """Return when the minimum residency ends, 0 if it is over, None before it begins."""
        if self.loaded_s is None:
            return None
        return max(0.0, self.policy.min_resident_s - (now_s - self.loaded_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What a request needs of a loaded model; `chat` is None where the engine does that itself."""

    model: Model
    chat: ChatModel | None
    admission: Admission

    @property
    def model_id(self) -> str:
        """The model's name."""
        return self.model.id

    @property
    def engine(self) -> Engine:
        """The engine of this moment; another one may have been started while a request waited.

        Raises:
            ModelRecoveringError: there is none just now.
        """
        engine = self.model.engine
        if engine is None or not engine.can_serve:
            raise recovering_error(self.model.id)
        return engine


def loading_error(model: Model) -> ModelLoadingError:
    """Return what a request for a loading model is told."""
    progress = None if model.job is None else model.job.progress
    left_s = LOADING_RETRY_S if progress is None else progress.seconds_left or LOADING_RETRY_S
    extras: dict[str, object] = {}
    if progress is not None:
        extras["progress"] = {
            "phase": progress.phase,
            "bytes_done": progress.bytes_done,
            "bytes_total": progress.bytes_total,
            "seconds_left": progress.seconds_left,
        }
    return ModelLoadingError(
        f"model '{model.id}' is still loading",
        param="model",
        retry_after_s=min(max(left_s, 1.0), 60.0),
        extras=extras,
    )


def unloading_error(model: Model) -> UnloadedError:
    """Return what a request for a draining model is told."""
    return UnloadedError(
        f"model '{model.id}' is being unloaded", param="model", retry_after_s=LOADING_RETRY_S
    )


def failed_error(model: Model, now_s: float) -> CortexError:
    """Return what a request for a failed model is told; the cause keeps its own 4xx status."""
    error = model.state.error or InternalError("unknown cause")
    wait_s = retry_after_s(model.state, now_s)
    if error.status < 500:
        # The caller's or the operator's to mend: it keeps its own status.
        error.retry_after_s = None
        return error
    return LoadFailedError(error.message, param="model", retry_after_s=wait_s)


def shutting_down_error() -> ShuttingDownError:
    """Return what everybody is told once the process ends."""
    return ShuttingDownError("this neuron is shutting down", retry_after_s=15)
