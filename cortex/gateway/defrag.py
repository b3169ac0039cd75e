"""Engines that have lived through many loads and unloads beside them are started again, one by one.

Memory that a long-lived engine holds in pieces comes back with its process. The neuron counts
(`engine_cycles`), and its count begins anew with the engine, so that any number of gateways do it
once.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from cortex.core.errors import CortexError
from cortex.core.neuron_api import NeuronHealth
from cortex.gateway.fleet import Fleet, FleetSnapshot
from cortex.gateway.live import Live
from cortex.gateway.loads import load_deadline_s
from cortex.gateway.metrics import Metrics
from cortex.gateway.neuron_client import NeuronClient

# One that could not be recycled is left alone for so long.
RETRY_S = 300.0
HEALTH_S = 5.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """An engine to start again."""

    node: str
    endpoint: str
    model_id: str
    cycles: int
    weight_bytes: int | None


def due(snapshot: FleetSnapshot, after_cycles: int) -> list[Due]:
    """Return on each node the idle engine that has lived longest through enough cycles.

    A node where something is on its way in or out has none.
    """
    found = []
    for node in snapshot.nodes:
        resident = [info for info in node.models.values() if info.status != "unloaded"]
        settled = all(
            info.status in ("loaded", "failed") and not info.progress for info in resident
        )
        if after_cycles == 0 or not node.usable or not settled:
            continue
        old = [
            info
            for info in resident
            if info.status == "loaded"
            and (info.engine_cycles or 0) >= after_cycles
            and not info.in_flight
            and not snapshot.requests(node, info.id)
        ]
        if old:
            info = min(old, key=lambda each: (-(each.resident_s or 0.0), each.id))
            found.append(
                Due(
                    node=node.name,
                    endpoint=node.endpoint,
                    model_id=info.id,
                    cycles=info.engine_cycles or 0,
                    weight_bytes=info.weight_bytes,
                )
            )
    return found


class Defragmenter:
    """Has engines started again when they are due.

    Args:
        poke: has a node asked at once.
    """

    def __init__(
        self,
        client: NeuronClient,
        fleet: Fleet,
        metrics: Metrics,
        live: Live,
        *,
        poke: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self._client = client
        self._fleet = fleet
        self._metrics = metrics
        self._live = live
        self._poke = poke
        self._clock = clock
        self._not_before_s: dict[tuple[str, str], float] = {}

    async def look(self) -> None:
        """Look once, and recycle what is due, one engine after another."""
        now_s = self._clock()
        self._not_before_s = {
            key: until_s for key, until_s in self._not_before_s.items() if until_s > now_s
        }
        for each in due(self._fleet.snapshot(), self._live.config.eviction.defrag_after_cycles):
            key = (each.node, each.model_id)
            if key not in self._not_before_s:
                self._not_before_s[key] = now_s + RETRY_S
                await self._recycle(each)

    async def _recycle(self, each: Due) -> None:
        before_mb = await self._free_mb(each)
        try:
            async with asyncio.timeout(load_deadline_s(each.weight_bytes, None)):
                await self._client.recycle(each.node, each.endpoint, each.model_id)
        except TimeoutError:
            _logger.warning("%s on %s was not recycled in time", each.model_id, each.node)
            return
        except CortexError as exc:
            _logger.warning("%s on %s was not recycled: %s", each.model_id, each.node, exc.message)
            return
        finally:
            self._poke(each.node)
        self._metrics.record_recycle(each.model_id, each.node)
        _logger.info(
            "recycled %s on %s",
            each.model_id,
            each.node,
            extra={
                "cycles": each.cycles,
                "free_before_mb": before_mb,
                "free_after_mb": await self._free_mb(each),
            },
        )

    async def _free_mb(self, each: Due) -> int | None:
        """Return the free memory of the node's devices together, None if it does not say."""
        try:
            async with asyncio.timeout(HEALTH_S):
                health = await self._client.health(each.node, each.endpoint)
        except (TimeoutError, CortexError):
            return None
        return free_mb(health)


def free_mb(health: NeuronHealth) -> int | None:
    """Return the free memory of all devices, the host's where there is none, in MiB."""
    if health.devices:
        return sum(device.vram_free_mb for device in health.devices)
    return None if health.host is None else health.host.free_bytes >> 20
