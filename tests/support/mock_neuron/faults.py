"""What goes wrong in a mock neuron, on command."""

import asyncio
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

FaultKind = Literal[
    "crash",  # the process ends at once, its connections are cut
    "silent",  # connections are accepted and nothing is ever said again, open ones included
    "crash_engine",  # a model's engine dies and is started again
    "hang_engine",  # a model's engine stops between two steps; noticed after `after_s`
    "slow",  # every step takes `factor` times as long
    "errors",  # the next `count` requests get 500
    "reset",  # the next `count` streams are cut after `after_tokens` tokens
    "refuse_loads",  # loads get 503
    "disk_full",  # loads fail for want of room on the disk
    "corrupt_checkpoint",  # loads fail, the files cannot be read
    "hub_unreachable",  # loads fail, the files cannot be fetched
    "out_of_memory",  # loads fail half way for want of device memory
]

# What a real neuron answers to each.
LOAD_FAULTS = {
    "refuse_loads": (503, "load_failed", "the mock refuses to load"),
    "disk_full": (503, "load_failed", "'{id}' cannot be stored: No space left on device"),
    "corrupt_checkpoint": (422, "unreadable_checkpoint", "'{id}': model.safetensors is cut short"),
    "hub_unreachable": (502, "hub_unreachable", "the hub cannot be reached for '{id}'"),
    "out_of_memory": (503, "load_failed", "'{id}': out of memory while weights were loaded"),
}


class FaultCommand(msgspec.Struct, kw_only=True, frozen=True):
    """Body of `POST /mock/fault`.

    Attributes:
        model_id: the model concerned; None: all of them.
        after_share: how much of a load is done when it fails.
    """

    kind: FaultKind
    model_id: str | None = None
    factor: Annotated[float, Meta(gt=0)] = 1.0
    count: Annotated[int, Meta(ge=0)] = 1
    after_tokens: Annotated[int, Meta(ge=0)] = 1
    after_s: float = 1.0
    after_share: Annotated[float, Meta(ge=0, le=1)] = 0.5


class Faults:
    """The faults that are in force.

    Attributes:
        is_silent: nothing is said any more.
        after_tokens: after how many tokens a stream is cut.
    """

    def __init__(self) -> None:
        self.is_silent = False
        self._loads: dict[str | None, FaultCommand] = {}
        self._counts: dict[FaultKind, int] = {}
        self.after_tokens = 0

    def set(self, command: FaultCommand) -> None:
        """Put a fault in force that needs no more than to be remembered."""
        match command.kind:
            case "silent":
                self.is_silent = True
            case "errors" | "reset":
                self._counts[command.kind] = command.count
                self.after_tokens = command.after_tokens
            case kind if kind in LOAD_FAULTS:
                self._loads[command.model_id] = command

    def clear(self) -> None:
        """End them all; what silence has swallowed is not given back."""
        self.is_silent = False
        self._loads.clear()
        self._counts.clear()

    async def speak(self) -> None:
        """Return, or never where the node is silent."""
        if self.is_silent:
            await asyncio.Event().wait()

    def takes(self, kind: Literal["errors", "reset"]) -> bool:
        """Whether this request is one of those that a fault is to hit."""
        left = self._counts.get(kind, 0)
        self._counts[kind] = max(0, left - 1)
        return left > 0

    def of_load(self, model_id: str) -> tuple[float, int, str, str] | None:
        """Return (share done, status, code, message) of a load that is to fail."""
        command = self._loads.get(model_id) or self._loads.get(None)
        if command is None:
            return None
        status, code, message = LOAD_FAULTS[command.kind]
        return command.after_share, status, code, message.format(id=model_id)
