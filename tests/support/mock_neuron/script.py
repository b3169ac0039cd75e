"""What a mock neuron serves and how it behaves, and what it has seen."""

import asyncio
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from cortex.core.neuron_api import Limit, LoadProgress, LoadRequest, Servable
from tests.support.mock_neuron.engine import Engine, EngineSpec

GIB = 1 << 30

Fault = Literal[
    "hang",  # never answer
    "die",  # cut the connection after `die_after` tokens
    "no_done",  # end the stream properly framed, but without [DONE]
    "error_event",  # an error event in mid-stream, then the end
    "malformed",  # 200 and something that is not JSON
    "reset",  # cut the connection before any answer
    "late_refusal",  # keep-alive comments, then an error event as the first event
]


@dataclass
class MockModel:
    """One model and how it behaves.

    With `engine` the answers take the time that an engine would need; without, they are
    `tokens`, at once or as the gates allow.

    Attributes:
        tokens: the answer, one chunk each.
        load_gate: a load waits here.
        load_bytes_s: a load takes `memory_bytes` over this; None: no time.
        token_gate: every token after the first `free_tokens` waits here.
        first_gate: the answer's head waits here.
        refusal: (status, code) of every inference request.
        load_refusal: (status, code) of every load.
        device: where it lies while it is in memory.
        loaded_s: when it was loaded; None where it was from the start.
        used_s: when its last request came.
        crashes: how often its engine died.
        wish: what its load asked for.
        cycles_at_start: the node's count of loads and unloads when its engine started.
    """

    id: str
    status: str = "unloaded"
    memory_bytes: int = GIB
    tokens: list[str] = field(default_factory=lambda: ["Hello", " world", "!"])
    tool_call: dict[str, str] | None = None
    prompt_tokens: int = 7
    cached_tokens: int = 2
    engine: EngineSpec | None = None
    load_gate: asyncio.Event | None = None
    load_bytes_s: float | None = None
    first_gate: asyncio.Event | None = None
    token_gate: asyncio.Event | None = None
    free_tokens: int = 1
    fault: Fault | None = None
    die_after: int = 1
    refusal: tuple[int, str] | None = None
    load_refusal: tuple[int, str] | None = None
    servable: Servable | None = None
    limit: Limit | None = None
    capabilities: list[str] = field(default_factory=lambda: ["text"])
    progress: LoadProgress | None = None
    error: str | None = None
    in_flight: int = 0
    reported_in_flight: int | None = None
    queue_depth: int = 0
    used_tick: int | None = None
    device: int = 0
    running: Engine | None = None
    loaded_s: float | None = None
    used_s: float = 0.0
    crashes: int = 0
    cycles_at_start: int = 0
    wish: LoadRequest = field(default_factory=lambda: LoadRequest(model_id=""))

    @property
    def holds_memory(self) -> bool:
        """Whether some of a device is taken or promised to it."""
        return self.status in ("loaded", "loading", "recovering", "draining")

    @property
    def requests(self) -> int:
        """Requests in hand, as reported."""
        return self.in_flight if self.reported_in_flight is None else self.reported_in_flight


@dataclass
class Seen:
    """One request as it arrived."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        """The decoded body."""
        decoded: dict[str, Any] = msgspec.json.decode(self.body)
        return decoded
