"""Ask every node how it is, all of them in parallel, each with its own clock and deadline."""

import asyncio
import logging

from cortex.core.errors import CortexError
from cortex.gateway.fleet import MAX_FAILURES, Fleet
from cortex.gateway.neuron_client import NeuronClient

POLL_TIMEOUT_S = 5.0
# A node that missed its last poll is asked again this soon: dead ones are noticed in seconds,
# and those that come back are used again as quickly.
RETRY_S = 1.0
# How long the start waits for the first answers, so that the first requests find a fleet.
FIRST_ROUND_S = 1.0

_logger = logging.getLogger(__name__)


class Poller:
    """Keeps the fleet's view of every node up to date."""

    def __init__(
        self,
        client: NeuronClient,
        fleet: Fleet,
        *,
        poll_s: float,
        timeout_s: float = POLL_TIMEOUT_S,
    ) -> None:
        self._client = client
        self._fleet = fleet
        self._poll_s = poll_s
        self._timeout_s = timeout_s
        nodes = fleet.snapshot().nodes
        self._endpoints = {node.name: node.endpoint for node in nodes}
        self._wake = {node.name: asyncio.Event() for node in nodes}
        self._first = {node.name: asyncio.Event() for node in nodes}

    async def run(self) -> None:
        """Poll until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for name in self._endpoints:
                tasks.create_task(self._keep_polling(name), name=f"poll {name}")

    async def first_round(self) -> None:
        """Wait until every node has answered or missed once, at most FIRST_ROUND_S."""
        try:
            async with asyncio.timeout(FIRST_ROUND_S):
                for event in self._first.values():
                    await event.wait()
        except TimeoutError:
            _logger.info("not every node has answered yet; starting without them")

    def poke(self, name: str) -> None:
        """Have a node polled now, because something just failed there."""
        self._wake[name].set()

    async def poll(self, name: str) -> None:
        """Ask one node once and record what came of it."""
        endpoint = self._endpoints[name]
        stamp = self._fleet.begin_reading()
        node = self._fleet.snapshot().node(name)
        assert node is not None
        try:
            async with asyncio.timeout(self._timeout_s):
                # A node that was away may have come back as another machine.
                if node.discovery is None or node.failures > 0:
                    self._fleet.record_discovery(name, await self._client.discovery(name, endpoint))
                models = await self._client.models(name, endpoint)
                health = await self._client.health(name, endpoint)
        except TimeoutError:
            self._missed(name, f"no answer within {self._timeout_s:g} s")
        except CortexError as exc:
            self._missed(name, exc.message)
        else:
            if self._fleet.record_reading(name, models, health, stamp=stamp):
                _logger.info("node %s is healthy", name, extra={"models": len(models)})

    def _missed(self, name: str, reason: str) -> None:
        if self._fleet.record_failure(name, reason):
            _logger.warning("node %s is unhealthy: %s", name, reason)

    async def _keep_polling(self, name: str) -> None:
        wake = self._wake[name]
        while True:
            wake.clear()
            try:
                await self.poll(name)
            except Exception:  # a task's outermost loop: it goes on, and says so
                _logger.exception("polling node %s failed unexpectedly", name)
                self._missed(name, "the poll failed unexpectedly; see the gateway's log")
            self._first[name].set()
            node = self._fleet.snapshot().node(name)
            assert node is not None
            late = not node.healthy or 0 < node.failures < MAX_FAILURES
            delay_s = min(self._poll_s, RETRY_S) if late else self._poll_s
            try:
                async with asyncio.timeout(delay_s):
                    await wake.wait()
            except TimeoutError:
                continue
