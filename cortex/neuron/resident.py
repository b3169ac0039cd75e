"""One model in the lifecycle's hands, what a request gets of it, and what it is told instead."""

import asyncio
from dataclasses import dataclass, field

from cortex.core.errors import (
    CortexError,
    InternalError,
    LoadFailedError,
    ModelLoadingError,
    ServiceUnavailableError,
)
from cortex.neuron.admission import Admission
from cortex.neuron.chat.model import ChatModel
from cortex.neuron.engine_client import EngineClient
from cortex.neuron.harness import Engine, Harness, LoadedModel
from cortex.neuron.jobs import Job
from cortex.neuron.library import Entry
from cortex.neuron.memory import Claim
from cortex.neuron.residency import Residency, retry_after_s

LOADING_RETRY_S = 5.0


class UnloadedError(ServiceUnavailableError):
    """The model is being unloaded."""

    code = "model_unloading"


@dataclass(slots=True, kw_only=True, eq=False)
class Model:
    """One model that is, was or will be in memory; only the lifecycle changes it.

    Attributes:
        chat: what turns messages into tokens and back; set once it is loaded.
        claim: the memory it is promised, None if it holds none.
        wake: set when the supervising task has something to look at.
        ended: set while no task supervises the model.
    """

    id: str
    harness: Harness
    state: Residency = field(default_factory=Residency)
    job: Job | None = None
    entry: Entry | None = None
    chat: ChatModel | None = None
    engine: Engine | None = None
    loaded: LoadedModel | None = None
    admission: Admission | None = None
    claim: Claim | None = None
    last_used_s: float | None = None
    num_requests: int = 0
    task: asyncio.Task[None] | None = None
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def in_flight(self) -> int:
        """Sequences in the engine."""
        return 0 if self.admission is None else self.admission.in_flight


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What a request needs of a loaded model."""

    model_id: str
    chat: ChatModel
    engine: EngineClient
    admission: Admission


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
