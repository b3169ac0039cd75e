"""Models that are kept loaded (`preload`): which are missing, and who brings them back when.

Any number of gateways may keep the same models. Each waits a while of its own choosing before it
loads what is missing and looks again then, so that one of them begins and the others see it. What
is kept displaces only models of lower priority, so that it never takes turns with another.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from cortex.core.catalogue import Catalogue
from cortex.gateway.fleet import Fleet, FleetSnapshot
from cortex.gateway.live import Live
from cortex.gateway.loads import Loads
from cortex.gateway.placement import priority_in
from cortex.gateway.router import ColdLoad
from cortex.gateway.routing import Routing, Trip

# How long a model is missed before it is loaded, times a random share, so that gateways do not
# begin together.
SETTLE_S = 3.0
FIRST_RETRY_S = 5.0
MAX_RETRY_S = 300.0
# After so many loads in a row that did not last, only a change of the fleet is reason for more.
MAX_TRIES = 8

_THERE = frozenset(["loaded", "loading", "recovering"])
_logger = logging.getLogger(__name__)


def missing(snapshot: FleetSnapshot, catalogue: Catalogue) -> list[str]:
    """Return the models to keep that no node has or is loading."""
    return [
        model.id
        for model in catalogue.models
        if model.preload
        and not any(node.usable and node.status(model.id) in _THERE for node in snapshot.nodes)
    ]


def gentle(snapshot: FleetSnapshot, catalogue: Catalogue, cold: ColdLoad) -> ColdLoad | None:
    """Return a load with the plans that displace nobody of the model's own priority or above."""
    plans = []
    for plan, option in zip(cold.plans, cold.considered.options, strict=True):
        node = snapshot.node(plan.node)
        if node is None or option.doubt is not None:
            continue
        own = priority_in(catalogue, node, cold.model_id)
        if all(priority_in(catalogue, node, each) < own for each in option.victims):
            plans.append(replace(plan, displaces=own - 1, is_asked_for=False))
    return replace(cold, plans=tuple(plans)) if plans else None


@dataclass(slots=True)
class _Missed:
    """One missing model.

    Attributes:
        tries: loads begun since it was last there.
        next_s: no earlier than this, on the owner's clock.
    """

    next_s: float
    tries: int = 0


class Keeper:
    """Loads what is to be kept and is missing.

    Args:
        jitter: a random number from 0 to 1.
    """

    def __init__(
        self,
        live: Live,
        fleet: Fleet,
        routing: Routing,
        loads: Loads,
        *,
        clock: Callable[[], float],
        jitter: Callable[[], float],
    ) -> None:
        self._live = live
        self._fleet = fleet
        self._routing = routing
        self._loads = loads
        self._clock = clock
        self._jitter = jitter
        self._missed: dict[str, _Missed] = {}
        self._usable: frozenset[str] = frozenset()

    def start_over(self) -> None:
        """Forget what did not last: the configuration has changed."""
        self._missed.clear()

    async def look(self) -> None:
        """Look once, and begin the loads that are due."""
        snapshot, now_s = self._fleet.snapshot(), self._clock()
        usable = frozenset(node.name for node in snapshot.nodes if node.usable)
        if usable - self._usable:
            # A node has come, or come back: what failed may succeed there.
            self._missed.clear()
        self._usable = usable
        absent = missing(snapshot, self._live.catalogue)
        for model_id in [each for each in self._missed if each not in absent]:
            del self._missed[model_id]
        for model_id in absent:
            known = self._missed.get(model_id)
            if known is None:
                self._missed[model_id] = _Missed(next_s=now_s + SETTLE_S * self._jitter())
            elif now_s >= known.next_s and not self._loads.is_loading(model_id):
                self._bring_back(snapshot, model_id, known, now_s)

    def _bring_back(
        self, snapshot: FleetSnapshot, model_id: str, known: _Missed, now_s: float
    ) -> None:
        route = self._routing.choose(Trip(model_id, b""))
        cold = None
        if isinstance(route, ColdLoad):
            cold = gentle(snapshot, self._live.catalogue, route)
        if cold is None:
            # No node has room just now; that is looked at again and again, and costs nobody.
            known.next_s = now_s + FIRST_RETRY_S
            return
        known.tries += 1
        pause_s = min(MAX_RETRY_S, FIRST_RETRY_S * 2 ** (known.tries - 1))
        known.next_s = now_s + pause_s * (1 + self._jitter())
        if known.tries > MAX_TRIES:
            _logger.error(
                "model %s is to be kept loaded, but %d loads in a row did not last; giving up "
                "until a node joins, the configuration changes or a request loads it",
                model_id,
                MAX_TRIES,
            )
            known.next_s = float("inf")
            return
        _logger.info("loading %s, which is to be kept", model_id, extra={"tries": known.tries})
        self._loads.begin(cold)
