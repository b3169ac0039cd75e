"""Ask one node how it is, once, within a deadline, and record what came of it."""

import asyncio
import logging

from cortex.core.errors import CortexError
from cortex.gateway.fleet import Fleet
from cortex.gateway.liveness import Miss
from cortex.gateway.neuron_client import NeuronClient, RefusedError

_logger = logging.getLogger(__name__)


async def poll(client: NeuronClient, fleet: Fleet, name: str, *, timeout_s: float) -> bool:
    """Ask a node for its models and health; return whether it has come back by answering."""
    stamp = fleet.begin_reading()
    node = fleet.snapshot().node(name)
    if node is None:
        return False
    endpoint = node.endpoint
    try:
        async with asyncio.timeout(timeout_s):
            # A node that was away may have come back as another machine.
            if node.discovery is None or node.failures > 0:
                fleet.record_discovery(name, await client.discovery(name, endpoint))
            models = await client.models(name, endpoint)
            health = await client.health(name, endpoint)
    except TimeoutError:
        note_miss(fleet, name, f"no answer within {timeout_s:g} s")
    except RefusedError as exc:
        # One whose events come in is on its way out, and says when it is done.
        is_there = (after := fleet.snapshot().node(name)) is not None and after.subscribed
        note_miss(fleet, name, exc.message, "late" if is_there else "refused")
    except CortexError as exc:
        note_miss(fleet, name, exc.message)
    else:
        if fleet.record_reading(name, models, health, stamp=stamp):
            note_return(fleet, name)
            return True
    return False


def note_return(fleet: Fleet, name: str) -> None:
    """Log that a node answers after having been down."""
    node = fleet.snapshot().node(name)
    if node is not None and node.healthy:
        _logger.info("node %s is healthy", name, extra={"models": len(node.models)})
    else:
        _logger.warning("node %s answers again; it comes and goes, so it is not used yet", name)


def note_miss(fleet: Fleet, name: str, reason: str, miss: Miss = "late") -> None:
    """Record a miss, and log it if it made the node count as down."""
    if fleet.record_failure(name, reason, miss):
        _logger.warning("node %s is unhealthy: %s", name, reason)
