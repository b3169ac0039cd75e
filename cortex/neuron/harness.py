"""What the lifecycle asks of an engine and of its kind, whatever program it is.

`EngineClient` is our own engine, `NativeHarness` makes it. What a request is handed to differs
between engines and is not part of this.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from cortex.core.errors import CortexError, ServiceUnavailableError
from cortex.core.neuron_api import LoadRequest
from cortex.neuron.chat.model import ChatModel
from cortex.neuron.engine.protocol import EngineStats, Progress
from cortex.neuron.jobs import Job
from cortex.neuron.library import Entry
from cortex.neuron.memory import Placement, Wish


class ModelNotLoadedError(ServiceUnavailableError):
    """The model could be served here but is not in memory."""

    code = "model_not_loaded"


class LoadedModel(Protocol):
    """What an engine says of the model it holds; 0 where it cannot say."""

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence."""

    @property
    def max_num_seqs(self) -> int:
        """Sequences it works on at once."""

    @property
    def num_kv_blocks(self) -> int:
        """Blocks of its KV cache."""

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights."""

    @property
    def cache_bytes(self) -> int:
        """Memory of the caches."""

    @property
    def prefix_match(self) -> Literal["block", "snapshot"] | None:
        """Where a prefix that it has cached may end; None where it has no such cache."""

    @property
    def device(self) -> str:
        """Where it runs."""


class Engine(Protocol):
    """One engine of one model, from its start to its end."""

    @property
    def ended(self) -> asyncio.Event:
        """Set when nothing is left of it."""

    @property
    def pid(self) -> int | None:
        """The process whose memory is the model's; None where none is that can be measured."""

    @property
    def stats(self) -> EngineStats:
        """What it last reported of its work."""

    @property
    def can_serve(self) -> bool:
        """Whether it holds its model and takes requests."""

    @property
    def cause_of_death(self) -> str:
        """How it ended, in words."""

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Start the process; `tasks` keeps the task that owns it."""

    async def load(
        self, *, on_progress: Callable[[Progress], None], timeout_s: float
    ) -> LoadedModel:
        """Wait until it can serve; raises CortexError with the cause if it will not."""

    def silent_s(self) -> float:
        """Return how long it has had work in hand and reported nothing."""

    async def stop(self, *, grace_s: float, error: CortexError | None = None) -> None:
        """End it in good order; open requests end with `error`. Returns when it is gone."""

    async def kill(self) -> None:
        """End it now; returns when it is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What one model may take: the time of a load, and the requests that it works on or queues.

    Attributes:
        max_in_flight: None for as many as the engine works on at once.
    """

    load_timeout_s: float
    max_in_flight: int | None
    max_queue_depth: int
    max_wait_s: float


class Harness(Protocol):
    """One kind of engine on this host: what it can serve, and how an engine of it is made."""

    @property
    def name(self) -> str:
        """What a load request calls it."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What it could serve, by id, without looking anew."""

    def find(self, model_id: str) -> Entry | None:
        """Return the entry of an id."""

    async def refresh(self, limit_s: float) -> None:
        """Look again at what could be served, unless that was done a moment ago."""

    def check(self, request: LoadRequest) -> None:
        """Raise CortexError for an option that cannot be met or a model that is not known."""

    def missing(self, model_id: str) -> CortexError:
        """Return what a request for a model that is not resident is told."""

    async def locate(self, request: LoadRequest, job: Job) -> Entry:
        """Return what is to be loaded, with its facts, fetching it if need be."""

    def wish(self, entry: Entry, request: LoadRequest) -> Wish | None:
        """Return what the load asks of memory; None where that is not known yet."""

    def make_engine(
        self,
        entry: Entry,
        request: LoadRequest,
        placement: Placement,
        on_end: Callable[[], None],
    ) -> Engine:
        """Return an engine that is not started yet."""

    def limits(self, entry: Entry) -> EngineLimits:
        """Return what a model of this kind may take."""

    async def open_chat(self, entry: Entry) -> ChatModel | None:
        """Return what turns messages into tokens; None where the engine does that itself."""
