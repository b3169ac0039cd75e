"""What callers see of the fleet: the model listing and the health report, from a snapshot."""

from collections.abc import Iterable
from typing import Literal

import msgspec

from cortex.core.catalogue import Catalogue, CatalogueModel
from cortex.core.neuron_api import Limit, LoadProgress, ModelInfo
from cortex.core.openai import ModelCard, ModelLocation
from cortex.gateway.breaker import State as BreakerState
from cortex.gateway.fleet import FleetSnapshot, NodeView
from cortex.gateway.live import ConfigState
from cortex.gateway.roster import available, feasible_nodes, primary

# 2026-01-01: nobody knows when a model was made, and all gateways must say the same.
CREATED = 1767225600

# The first of these that a replica is in is the model's status.
_STATUS_ORDER = ("loaded", "loading", "recovering", "draining", "failed", "unloaded")

_AS_IS = ConfigState()

# Why a node that answers is not used.
FLAPS = "it comes and goes, and is used again once it has stayed for a while"

HealthStatus = Literal["ok", "impaired", "degraded"]


class NodeCount(msgspec.Struct, kw_only=True, frozen=True):
    """How many nodes answer, and how many there are."""

    healthy: int
    total: int


class Unservable(msgspec.Struct, kw_only=True, frozen=True):
    """A resident model that cannot take requests."""

    node: str
    model: str
    reason: str
    detail: str | None = None


class ModelState(msgspec.Struct, kw_only=True, frozen=True):
    """One model on one node."""

    id: str
    state: str
    in_flight: int = 0
    queue_depth: int = 0
    free_slots: int = 0
    progress: LoadProgress | None = None
    error: str | None = None


class NodeReport(msgspec.Struct, kw_only=True, frozen=True):
    """One node; the counts are sums over its models, as last reported.

    Attributes:
        draining: it takes nothing new, by its own word or the operator's.
        subscribed: its events come in; otherwise it is polled.
        relayed: requests of this gateway in hand there.
        breaker: `open` keeps requests away from it, `half_open` lets one through as a trial.
    """

    name: str
    endpoint: str
    healthy: bool
    draining: bool = False
    subscribed: bool = False
    breaker: BreakerState = "closed"
    error: str | None = None
    in_flight: int = 0
    queue_depth: int = 0
    relayed: int = 0
    free_slots: int = 0
    models: list[ModelState] = []


class ConfigReport(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """Whether the configuration files are in use as they are.

    Attributes:
        error: why not; an earlier state of them is in use.
        restart_for: keys that take effect only when the gateway is started again.
    """

    error: str | None = None
    restart_for: list[str] = []


class HealthReport(msgspec.Struct, kw_only=True, frozen=True):
    """`GET /health`.

    `degraded`: no node answers. `impaired`: a node does not answer, or a resident model cannot
    serve. `ok` otherwise.
    """

    status: HealthStatus
    nodes: NodeCount
    unservable: list[Unservable] = []
    details: list[NodeReport] = []
    config: ConfigReport = ConfigReport()


def health_report(snapshot: FleetSnapshot, state: ConfigState = _AS_IS) -> HealthReport:
    """Return the state of the fleet."""
    healthy = sum(node.healthy for node in snapshot.nodes)
    total = len(snapshot.nodes)
    unservable = [each for node in snapshot.nodes for each in _unservable(node)]
    status: HealthStatus = "ok"
    if healthy == 0:
        status = "degraded"
    elif unservable or healthy < total:
        status = "impaired"
    return HealthReport(
        status=status,
        nodes=NodeCount(healthy=healthy, total=total),
        unservable=unservable,
        details=[node_report(snapshot, node) for node in snapshot.nodes],
        config=ConfigReport(error=state.error, restart_for=list(state.restart_for)),
    )


def _unservable(node: NodeView) -> list[Unservable]:
    """Return the models a node holds, or held when it was last heard of, that cannot serve."""
    found = []
    for model_id, info in sorted(node.models.items()):
        status = node.status(model_id)
        if status not in ("loaded", "recovering"):
            continue
        reason, detail = None, None
        if not node.healthy:
            reason, detail = "node_unreachable", node.failure
        elif status == "recovering":
            reason, detail = "recovering", info.error
        elif info.servable is not None and not info.servable.ok:
            reason, detail = info.servable.reason or "not_servable", info.servable.detail
        if reason is not None:
            found.append(Unservable(node=node.name, model=model_id, reason=reason, detail=detail))
    return found


def node_report(snapshot: FleetSnapshot, node: NodeView) -> NodeReport:
    """Return the state of one node."""
    states = [_model_state(node, info) for _, info in sorted(node.models.items())]
    return NodeReport(
        name=node.name,
        endpoint=node.endpoint,
        healthy=node.healthy,
        draining=node.draining,
        subscribed=node.subscribed,
        breaker=node.breaker.state,
        error=FLAPS if node.liveness.up and not node.healthy else node.failure,
        relayed=sum(count for (owner, _), count in snapshot.leases.items() if owner == node.name),
        in_flight=sum(state.in_flight for state in states),
        queue_depth=sum(state.queue_depth for state in states),
        free_slots=sum(state.free_slots for state in states),
        models=states,
    )


def _model_state(node: NodeView, info: ModelInfo) -> ModelState:
    load = node.loads.get(info.id)
    return ModelState(
        id=info.id,
        state=node.status(info.id) or "unloaded",
        in_flight=load.in_flight if load is not None else info.in_flight,
        queue_depth=load.queue_depth if load is not None else 0,
        free_slots=load.free_slots if load is not None else 0,
        progress=info.progress,
        error=info.error,
    )


def model_cards(snapshot: FleetSnapshot, catalogue: Catalogue) -> list[ModelCard]:
    """Return every model on offer by id; aliases and virtual models are entries of their own."""
    return [_card(snapshot, catalogue, name) for name in available(snapshot, catalogue)]


def model_card(snapshot: FleetSnapshot, catalogue: Catalogue, name: str) -> ModelCard | None:
    """Return one entry of the listing, None if there is no such model or alias."""
    model_id = primary(snapshot, catalogue, name)
    if catalogue.find(model_id) is None and not snapshot.lists(model_id):
        return None
    return _card(snapshot, catalogue, name)


def _card(snapshot: FleetSnapshot, catalogue: Catalogue, name: str) -> ModelCard:
    model_id = primary(snapshot, catalogue, name)
    entry = catalogue.find(model_id)
    holders = [node for node in snapshot.nodes if node.healthy and model_id in node.models]
    infos = [node.models[model_id] for node in holders]
    statuses = {node.status(model_id) for node in holders}
    limit = _tightest(infos, entry)
    cost = entry.cost if entry is not None else None
    return ModelCard(
        id=name,
        created=CREATED,
        loaded="loaded" in statuses,
        status=next((each for each in _STATUS_ORDER if each in statuses), "unloaded"),
        feasible_on=feasible_nodes(snapshot, catalogue, model_id),
        locations=[
            _location(node, node.models[model_id], entry)
            for node in holders
            if node.status(model_id) not in ("unloaded", "failed")
        ],
        capabilities=_capabilities(infos, entry),
        limit=limit,
        cost=cost or next((info.cost for info in infos if info.cost is not None), None),
        tool_call=_any_known(info.tool_call for info in infos),
        reasoning=_any_known(info.reasoning for info in infos),
        max_model_len=limit.context if limit is not None else None,
        max_input_tokens=limit.input if limit is not None else None,
        max_output_tokens=limit.output if limit is not None else None,
    )


def _location(node: NodeView, info: ModelInfo, entry: CatalogueModel | None) -> ModelLocation:
    declared = entry.vram_mb if entry is not None else None
    weights = info.weight_bytes >> 20 if info.weight_bytes is not None else None
    return ModelLocation(
        node=node.name,
        status=node.status(info.id) or "unloaded",
        vram_estimate_mb=info.vram_used_mb or declared or weights,
    )


def _capabilities(infos: Iterable[ModelInfo], entry: CatalogueModel | None) -> list[str]:
    found = set(entry.capabilities if entry is not None else [])
    for info in infos:
        found.update(info.capabilities)
    return sorted(found)


def _tightest(infos: Iterable[ModelInfo], entry: CatalogueModel | None) -> Limit | None:
    """Return limits that every replica keeps; the catalogue's where no replica has said."""
    limits = [info.limit for info in infos if info.limit is not None]
    if not limits:
        return entry.limit if entry is not None else None
    return Limit(
        context=_least(limit.context for limit in limits),
        input=_least(limit.input for limit in limits),
        output=_least(limit.output for limit in limits),
    )


def _least(values: Iterable[int | None]) -> int | None:
    return min((value for value in values if value is not None), default=None)


def _any_known(values: Iterable[bool | None]) -> bool | None:
    known = [value for value in values if value is not None]
    return any(known) if known else None
