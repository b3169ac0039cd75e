"""`GET /events`: what changes on this host, pushed to whoever subscribes.

One hub numbers the events, keeps the last ones for subscribers that come back, and hands each
subscriber its copy. It is told that something may have changed, and looks itself what.
"""

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress

import msgspec

from cortex.core.errors import ServiceUnavailableError
from cortex.core.neuron_api import ModelInfo
from cortex.neuron.changes import PACE_S, Change, Changes
from cortex.neuron.library import Entry
from cortex.neuron.views import Views

# Events kept for subscribers that come back.
RING_EVENTS = 512
MAX_SUBSCRIBERS = 64
# Events a subscriber may leave unread; more end its subscription.
MAX_QUEUED_EVENTS = 1024
SUBSCRIBE_RETRY_S = 5.0
PING = b": ping\n\n"
# A subscriber hears something at least this often, and the end of the server this soon.
PING_S = 1.0
END_CHECK_S = 0.25

_logger = logging.getLogger(__name__)
_json = msgspec.json.Encoder()


class TooManySubscribersError(ServiceUnavailableError):
    """The bound on subscribers is reached."""

    code = "too_many_subscribers"


class _Subscription:
    """The events one subscriber has not taken yet."""

    def __init__(self, backlog: list[bytes]) -> None:
        self.is_lagging = False
        self._events = deque(backlog)
        self._wake = asyncio.Event()

    def push(self, event: bytes) -> None:
        """Queue an event; too many unread ones end the subscription."""
        if len(self._events) >= MAX_QUEUED_EVENTS:
            self.is_lagging = True
            self._events.clear()
        else:
            self._events.append(event)
        self._wake.set()

    async def take(self, limit_s: float) -> bytes | None:
        """Return the next event, or None if none comes in time."""
        if limit_s > 0 and not self._events and not self.is_lagging:
            self._wake.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(limit_s):
                    await self._wake.wait()
        return self._events.popleft() if self._events else None


class EventHub:
    """Publishes what changes, and keeps the subscribers.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, views: Views, *, clock: Callable[[], float]) -> None:
        self._views = views
        self._clock = clock
        self._epoch = secrets.token_hex(6)
        self._count = 0
        self._ring: deque[tuple[int, bytes]] = deque(maxlen=RING_EVENTS)
        self._subscribers: set[_Subscription] = set()
        self._changes = Changes()
        self._dirty: set[str] = set()
        self._listings: list[Mapping[str, Entry]] = []
        self._wake = asyncio.Event()
        self._is_ending = False

    def changed(self, model_id: str) -> None:
        """Note that something about a model may have changed."""
        self._dirty.add(model_id)
        self._wake.set()

    async def run(self) -> None:
        """Publish as changes are noted, and look for others every PACE_S."""
        # What is there at the start is in every snapshot.
        self._look()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(PACE_S):
                    await self._wake.wait()
            self._wake.clear()
            self.publish()

    def publish(self) -> None:
        """Send what is new to all subscribers."""
        for change in self._look():
            self._count += 1
            event = self._encode(change)
            self._ring.append((self._count, event))
            for each in list(self._subscribers):
                each.push(event)
                if each.is_lagging:
                    self._subscribers.discard(each)
                    _logger.warning(
                        "a subscriber of /events reads too slowly and is closed",
                        extra={"unread": MAX_QUEUED_EVENTS},
                    )

    async def stream(
        self, last_id: str | None, ending: asyncio.Event
    ) -> AsyncGenerator[bytes, None]:
        """Yield events until the subscriber falls behind or `ending` is set.

        Args:
            last_id: of the last event the subscriber has seen.
            ending: set when the server begins to end.

        Raises:
            TooManySubscribersError: there are MAX_SUBSCRIBERS already.
        """
        subscription = self._subscribe(last_id)
        try:
            yield PING
            told_s = self._clock()
            while not subscription.is_lagging:
                is_ending = ending.is_set()
                if is_ending:
                    # Whoever routes here learns first that it should not any more.
                    self._tell_the_end()
                event = await subscription.take(0.0 if is_ending else END_CHECK_S)
                if event is None and is_ending:
                    return
                if event is not None or self._clock() - told_s >= PING_S:
                    told_s = self._clock()
                    yield event or PING
        finally:
            self._subscribers.discard(subscription)

    def _tell_the_end(self) -> None:
        if not self._is_ending:
            self._is_ending = True
            self.publish()

    def _subscribe(self, last_id: str | None) -> _Subscription:
        if len(self._subscribers) >= MAX_SUBSCRIBERS:
            raise TooManySubscribersError(
                f"{MAX_SUBSCRIBERS} subscribers are connected to /events already; poll /models "
                "and /health, or end one",
                retry_after_s=SUBSCRIBE_RETRY_S,
            )
        backlog = self._replay(last_id)
        if backlog is None:
            backlog = [self._encode(Change("snapshot", self._views.snapshot()))]
        subscription = _Subscription(backlog)
        self._subscribers.add(subscription)
        return subscription

    def _replay(self, last_id: str | None) -> list[bytes] | None:
        """Return what followed an event; None where that cannot be said."""
        epoch, _, number = (last_id or "").partition("-")
        if epoch != self._epoch or not number.isascii() or not number.isdigit():
            return None
        last = int(number)
        oldest = self._ring[0][0] if self._ring else self._count + 1
        if not oldest - 1 <= last <= self._count:
            return None
        return [event for count, event in self._ring if count > last]

    def _look(self) -> list[Change]:
        now_s = self._clock()
        changes = self._changes.of_models(self._suspects(), now_s)
        changes += self._changes.of_loads(self._views.loads(), now_s)
        health = self._views.health()
        if self._is_ending:
            health = msgspec.structs.replace(health, status="draining")
        return changes + self._changes.of_node(health)

    def _suspects(self) -> dict[str, ModelInfo | None]:
        """Return the models worth a look: residents, those noted, and all after a new listing."""
        infos: dict[str, ModelInfo | None] = {each.id: each for each in self._views.residents()}
        listings = self._views.listings()
        noted, self._dirty = self._dirty, set()
        is_same = len(listings) == len(self._listings) and all(
            new is old for new, old in zip(listings, self._listings, strict=True)
        )
        if not is_same:
            self._listings = listings
            noted = noted.union(self._changes.ids, *listings)
        for model_id in noted - infos.keys():
            infos[model_id] = self._views.model(model_id)
        return infos

    def _encode(self, change: Change) -> bytes:
        head = f"id: {self._epoch}-{self._count}\nevent: {change.name}\ndata: "
        return head.encode() + _json.encode(change.data) + b"\n\n"
