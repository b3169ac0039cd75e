"""Keep the fleet's view of every node up to date: by its events, by polling where none come.

Each node has two tasks. One holds its events and comes back to them when they end. The other
polls: at its own pace while there are no events, now and then as a check while there are, and at
once when something just failed there.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence

from cortex.core.config import NeuronAddress
from cortex.core.errors import CortexError
from cortex.gateway.fleet import Fleet, NodeView
from cortex.gateway.live import Live
from cortex.gateway.neuron_client import NeuronClient
from cortex.gateway.poller import note_miss, poll
from cortex.gateway.subscription import (
    LINK_SILENCE_S,
    EventsUnsupportedError,
    SilentLinkError,
    Subscription,
)

POLL_TIMEOUT_S = 5.0
# With events a question is only a check, and decides quickly when they have ceased.
PROBE_TIMEOUT_S = 1.5
CHECK_S = 10.0
# A node that missed its last poll is asked again this soon: dead ones are noticed in seconds,
# and those that come back are used again as quickly.
RETRY_S = 1.0
# How long the start waits for the first answers, so that the first requests find a fleet.
FIRST_ROUND_S = 1.0
# How soon events are asked for again when they end, doubled while they never last.
RESUME_S = 0.1
MAX_RESUME_S = 10.0
LASTING_S = 10.0
# A node without events may have been upgraded; one that was away is asked at once.
UNSUPPORTED_RETRY_S = 60.0

_logger = logging.getLogger(__name__)


class _Watched:
    """The tasks of one node, and how they are woken."""

    def __init__(self, name: str, endpoint: str) -> None:
        self.name = name
        self.endpoint = endpoint
        self.ask = asyncio.Event()
        self.resume = asyncio.Event()
        self.first = asyncio.Event()
        # The next question decides whether the node is still there.
        self.in_doubt = False
        self.tasks: list[asyncio.Task[None]] = []

    def cancel(self) -> None:
        for task in self.tasks:
            task.cancel()


class Watch:
    """Watches the nodes that the fleet has.

    Args:
        tasks: where the watching happens.
        silence_s: how long a link may carry nothing.
    """

    def __init__(
        self,
        client: NeuronClient,
        fleet: Fleet,
        live: Live,
        *,
        tasks: asyncio.TaskGroup,
        clock: Callable[[], float],
        poll_timeout_s: float = POLL_TIMEOUT_S,
        silence_s: float = LINK_SILENCE_S,
        probe_timeout_s: float = PROBE_TIMEOUT_S,
    ) -> None:
        self._client = client
        self._fleet = fleet
        self._live = live
        self._tasks = tasks
        self._clock = clock
        self._poll_timeout_s = poll_timeout_s
        self._silence_s = silence_s
        self._probe_timeout_s = probe_timeout_s
        self._watched: dict[str, _Watched] = {}
        self._drained: set[str] = set()

    def use(self, neurons: Sequence[NeuronAddress]) -> None:
        """Have exactly these nodes in the fleet; requests in hand at others are not touched.

        Where the entry of a node says, or has just ceased to say, that it drains, that goes over
        what was asked for by `cortex drain`.
        """
        self._fleet.set_nodes((each.name, each.endpoint) for each in neurons)
        drained = {each.name for each in neurons if each.drain}
        for name in drained ^ self._drained:
            self._fleet.record_drained(name, name in drained)
        self._drained = drained
        self.sync()

    def sync(self) -> None:
        """Begin to watch the nodes that are new in the fleet, and leave those that went."""
        nodes = {node.name: node.endpoint for node in self._fleet.snapshot().nodes}
        for name, watched in list(self._watched.items()):
            if nodes.get(name) != watched.endpoint:
                del self._watched[name]
                watched.cancel()
        for name, endpoint in nodes.items():
            if name not in self._watched:
                watched = self._watched[name] = _Watched(name, endpoint)
                watched.tasks = [
                    self._tasks.create_task(self._keep_asking(watched), name=f"poll {name}"),
                    self._tasks.create_task(self._keep_following(watched), name=f"events {name}"),
                ]

    def cancel(self) -> None:
        """Watch nothing any more."""
        for watched in self._watched.values():
            watched.cancel()

    async def first_round(self) -> None:
        """Wait until every node has answered or missed once, at most FIRST_ROUND_S."""
        try:
            async with asyncio.timeout(FIRST_ROUND_S):
                for watched in list(self._watched.values()):
                    await watched.first.wait()
        except TimeoutError:
            _logger.info("not every node has answered yet; starting without them")

    def poke(self, name: str) -> None:
        """Have a node asked now, because something just happened there."""
        watched = self._watched.get(name)
        if watched is not None:
            watched.ask.set()

    async def _keep_asking(self, watched: _Watched) -> None:
        while True:
            watched.ask.clear()
            node = self._fleet.snapshot().node(watched.name)
            follows = node is not None and node.subscribed
            quick, watched.in_doubt = follows or watched.in_doubt, False
            limit_s = self._probe_timeout_s if quick else self._poll_timeout_s
            try:
                if await poll(self._client, self._fleet, watched.name, timeout_s=limit_s):
                    watched.resume.set()
            except Exception:  # a task's outermost loop: it goes on, and says so
                _logger.exception("polling node %s failed unexpectedly", watched.name)
                reason = "the poll failed unexpectedly; see the gateway's log"
                note_miss(self._fleet, watched.name, reason)
            watched.first.set()
            await _woken(watched.ask, self._pause_s(self._fleet.snapshot().node(watched.name)))

    def _pause_s(self, node: NodeView | None) -> float:
        poll_s = self._live.settings.poll_s
        if node is None:
            return poll_s
        if not node.liveness.up or node.failures:
            return min(poll_s, RETRY_S)
        return max(poll_s, CHECK_S) if node.subscribed else poll_s

    async def _keep_following(self, watched: _Watched) -> None:
        subscription = Subscription(
            self._client,
            self._fleet,
            watched.name,
            watched.endpoint,
            on_moved=watched.ask.set,
            silence_s=self._silence_s,
        )
        short = 0
        while True:
            watched.resume.clear()
            begun_s = self._clock()
            pause_s: float | None = None
            try:
                await subscription.follow()
            except EventsUnsupportedError:
                pause_s = UNSUPPORTED_RETRY_S
            except SilentLinkError as exc:
                note_miss(self._fleet, watched.name, exc.message, "silent")
                watched.in_doubt = True
                watched.ask.set()
            except CortexError as exc:
                _logger.debug("the events of node %s ended: %s", watched.name, exc.message)
                watched.ask.set()
            except Exception:  # a task's outermost loop: it goes on, and says so
                _logger.exception("the events of node %s failed unexpectedly", watched.name)
                watched.ask.set()
            short = 0 if self._clock() - begun_s >= LASTING_S else short + 1
            if pause_s is None:
                pause_s = min(MAX_RESUME_S, RESUME_S * 2 ** min(short, 16))
            await _woken(watched.resume, pause_s)


async def _woken(event: asyncio.Event, limit_s: float) -> None:
    """Wait for an event, or until the time is up."""
    try:
        async with asyncio.timeout(limit_s):
            await event.wait()
    except TimeoutError:
        return
