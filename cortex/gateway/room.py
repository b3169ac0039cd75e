"""Who makes room for a load, by what the neuron's own refusal says: pure functions.

The snapshot adds what a refusal cannot know: requests on their way, the catalogue's word.
"""

from collections.abc import Sequence
from dataclasses import replace

import msgspec

from cortex.core.catalogue import Catalogue
from cortex.core.config import Eviction
from cortex.core.errors import RemoteError
from cortex.core.neuron_api import ModelInfo
from cortex.gateway.evictor import Candidate, kept_because, plan_eviction
from cortex.gateway.fleet import FleetSnapshot, NodeView
from cortex.gateway.placement import priority_in, resident, residents_of
from cortex.gateway.router import LoadPlan


class Resident(msgspec.Struct, kw_only=True, frozen=True):
    """One model in a neuron's memory, as a refusal for lack of memory lists it."""

    id: str
    device: int | None = None
    num_bytes: int = msgspec.field(default=0, name="bytes")
    last_used_s: float | None = None
    in_flight: int = 0
    min_resident_left_s: float = 0.0
    pinned: bool = False
    priority: int | None = None


class DeviceShortage(msgspec.Struct, kw_only=True, frozen=True):
    """What a load would need of one device, and what it could have."""

    device: int | None = None
    needed_bytes: int = 0
    free_bytes: int = 0


class Shortage(msgspec.Struct, kw_only=True, frozen=True):
    """The extras of a neuron's `insufficient_memory`.

    The figures at the top are of the device that comes closest; `devices` has them all.
    """

    device: int | None = None
    needed_bytes: int = 0
    free_bytes: int = 0
    devices: list[DeviceShortage] = []
    residents: list[Resident] = []

    @property
    def places(self) -> Sequence[DeviceShortage]:
        """The devices that the load could go to."""
        nearest = DeviceShortage(
            device=self.device, needed_bytes=self.needed_bytes, free_bytes=self.free_bytes
        )
        return self.devices or [nearest]


def shortage_of(exc: RemoteError) -> Shortage:
    """Return what a refusal says; without figures there is no plan, and the refusal stands."""
    try:
        return msgspec.convert(exc.extras, Shortage)
    except msgspec.ValidationError:
        return Shortage()


def choose_victims(
    snapshot: FleetSnapshot,
    catalogue: Catalogue,
    policy: Eviction,
    plan: LoadPlan,
    shortage: Shortage,
    *,
    patience_s: float | None = None,
) -> list[str] | None:
    """Return who has to leave, on the device where that are the fewest; None: it does not help.

    Args:
        patience_s: as if what is at work, or protected for that long, were free to go.
    """
    view = snapshot.node(plan.node)
    if view is None:
        return None
    priority = _priority(catalogue, view, plan)
    plans = []
    for place in shortage.places:
        victims = plan_eviction(
            [
                _candidate(snapshot, catalogue, policy, view, each, patience_s)
                for each in shortage.residents
                if each.id != plan.request.model_id and each.device == place.device
            ],
            needed_bytes=place.needed_bytes,
            free_bytes=place.free_bytes,
            priority=priority,
            strategy=policy.strategy,
        )
        if victims is not None:
            plans.append(victims)
    return min(plans, key=len, default=None)


def rivals_here(
    snapshot: FleetSnapshot, catalogue: Catalogue, policy: Eviction, plan: LoadPlan
) -> dict[str, str | None]:
    """Return the residents that a group excludes beside the newcomer, each with why it stays."""
    view = snapshot.node(plan.node)
    if view is None or not plan.rivals:
        return {}
    priority = _priority(catalogue, view, plan)
    return {
        each.id: kept_because(each, priority)
        for each in residents_of(snapshot, catalogue, view, plan.request.model_id, policy)
        if each.id in plan.rivals
    }


def _priority(catalogue: Catalogue, view: NodeView, plan: LoadPlan) -> int:
    own = priority_in(catalogue, view, plan.request.model_id)
    return own if plan.displaces is None else plan.displaces


def _candidate(
    snapshot: FleetSnapshot,
    catalogue: Catalogue,
    policy: Eviction,
    view: NodeView,
    told: Resident,
    patience_s: float | None,
) -> Candidate:
    info = view.models.get(told.id) or ModelInfo(id=told.id, harness="", status="loaded")
    told_info = msgspec.structs.replace(
        info,
        in_flight=told.in_flight,
        last_used_s=told.last_used_s,
        evictable_in_s=told.min_resident_left_s,
        pinned=told.pinned or info.pinned,
        priority=told.priority if told.priority is not None else info.priority,
    )
    each = replace(
        resident(snapshot, catalogue, view, told_info, policy), memory_bytes=told.num_bytes
    )
    if patience_s is None:
        return each
    return replace(each, in_flight=0, protected_s=max(0.0, each.protected_s - patience_s))
