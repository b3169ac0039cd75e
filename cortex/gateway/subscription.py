"""One node's events: read as they come, applied to the fleet's view, ended by silence."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

import msgspec

from cortex.core.errors import RemoteError, UpstreamConnectionError, UpstreamMalformedError
from cortex.core.neuron_api import (
    ModelInfo,
    ModelLoad,
    ModelRemoved,
    NeuronHealth,
    NeuronSnapshot,
)
from cortex.core.sse import SseEvent, SseSplitter
from cortex.gateway.fleet import Fleet
from cortex.gateway.neuron_client import NeuronClient, Reply
from cortex.gateway.poller import note_return

# A neuron sends something, if only a ping, at least every two seconds. A cable that was cut is
# noticed after this long plus one unanswered question, within five seconds in all.
LINK_SILENCE_S = 3.0

_NO_EVENTS = frozenset([404, 405])
_T = TypeVar("_T")

_snapshot = msgspec.json.Decoder(NeuronSnapshot)
_model = msgspec.json.Decoder(ModelInfo)
_removed = msgspec.json.Decoder(ModelRemoved)
_loads = msgspec.json.Decoder(list[ModelLoad])
_health = msgspec.json.Decoder(NeuronHealth)


class EventsUnsupportedError(UpstreamMalformedError):
    """The node is of a version without `/events`."""


class SilentLinkError(UpstreamConnectionError):
    """The link carried nothing for longer than a neuron is ever silent."""


class Subscription:
    """The events of one node, from one connection to the next.

    Args:
        on_moved: called when a model came or went, so that the node's memory is another.
        silence_s: how long the link may carry nothing.
    """

    def __init__(
        self,
        client: NeuronClient,
        fleet: Fleet,
        name: str,
        endpoint: str,
        *,
        on_moved: Callable[[], None],
        silence_s: float = LINK_SILENCE_S,
    ) -> None:
        self._client = client
        self._fleet = fleet
        self._name = name
        self._endpoint = endpoint
        self._on_moved = on_moved
        self._silence_s = silence_s
        self._last_id = ""
        self._stamp = 0

    async def follow(self) -> None:
        """Connect and apply events until the stream ends, which is told by what is raised.

        Raises:
            EventsUnsupportedError: the node knows no events; it has to be polled.
            SilentLinkError: nothing came for too long.
            CortexError: the node could not be reached, refused, or ended the stream.
        """
        self._stamp = self._fleet.begin_reading()
        try:
            async with asyncio.timeout(self._silence_s):
                reply = await self._connect()
        except TimeoutError as exc:
            raise self._silent() from exc
        try:
            await self._read(reply)
        finally:
            reply.close()
            self._fleet.record_subscribed(self._name, False)

    async def _connect(self) -> Reply:
        try:
            return await self._client.events(self._name, self._endpoint, self._last_id)
        except RemoteError as exc:
            if exc.status in _NO_EVENTS:
                raise EventsUnsupportedError(
                    f"node {self._name} has no /events; it is polled"
                ) from exc
            raise

    async def _read(self, reply: Reply) -> None:
        splitter = SseSplitter()
        while True:
            try:
                async with asyncio.timeout(self._silence_s):
                    chunk = await reply.read_chunk()
            except TimeoutError as exc:
                raise self._silent() from exc
            if not chunk:
                raise UpstreamConnectionError(f"node {self._name} ended its events")
            for event in splitter.feed(chunk):
                if not event.is_comment:
                    self._apply(event)
            if self._last_id:
                self._fleet.record_subscribed(self._name, True)
                if self._fleet.record_alive(self._name):
                    note_return(self._fleet, self._name)

    def _apply(self, event: SseEvent) -> None:
        name, fleet = self._name, self._fleet
        if event.name == b"snapshot":
            snapshot = self._decoded(_snapshot, event)
            fleet.record_discovery(name, snapshot.discovery)
            if fleet.record_reading(name, snapshot.models, snapshot.health, stamp=self._stamp):
                note_return(fleet, name)
        elif not self._last_id:
            raise UpstreamMalformedError(f"the events of node {name} do not begin with a snapshot")
        elif event.name == b"model":
            self._apply_model(self._decoded(_model, event))
        elif event.name == b"model_removed":
            fleet.record_model_gone(name, self._decoded(_removed, event).id)
        elif event.name == b"load":
            loads = self._decoded(_loads, event)
            fleet.record_loads(name, loads)
        elif event.name == b"node":
            fleet.record_health(name, self._decoded(_health, event))
        # Events of a later version mean nothing here, and are counted all the same.
        self._last_id = event.event_id.decode("utf-8", "replace") or self._last_id
        # A snapshot in mid-stream is newer than all that came before it.
        self._stamp = fleet.begin_reading()

    def _apply_model(self, info: ModelInfo) -> None:
        node = self._fleet.snapshot().node(self._name)
        before = node.status(info.id) if node is not None else None
        self._fleet.record_model(self._name, info)
        if before != info.status:
            self._on_moved()

    def _decoded(self, decoder: "msgspec.json.Decoder[_T]", event: SseEvent) -> _T:
        try:
            return decoder.decode(event.data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise UpstreamMalformedError(
                f"node {self._name} sent an event that is not the neuron API: {exc}"
            ) from exc

    def _silent(self) -> SilentLinkError:
        return SilentLinkError(f"node {self._name} sent nothing for {self._silence_s:g} s")
