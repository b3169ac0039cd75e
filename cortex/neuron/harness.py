"""What the lifecycle asks of an engine, whatever program it is.

`EngineClient` (our own engine) and `CommandEngine` (somebody else's server) meet it. What a
request is handed to differs between them and is not part of it.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

from cortex.core.errors import CortexError
from cortex.neuron.engine.protocol import EngineStats, Progress


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
    def device(self) -> str:
        """Where it runs."""


class Engine(Protocol):
    """One engine of one model, from its start to its end."""

    @property
    def ended(self) -> asyncio.Event:
        """Set when nothing is left of it."""

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
