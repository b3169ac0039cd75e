"""Where a request goes: a pure choice over a snapshot of the fleet and the catalogue."""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from cortex.core.catalogue import DEFAULT_PRIORITY, Catalogue, CatalogueModel
from cortex.core.errors import (
    CortexError,
    ModelNotFoundError,
    ModelRecoveringError,
    ServiceUnavailableError,
)
from cortex.core.neuron_api import LoadRequest
from cortex.gateway.fleet import FleetSnapshot, NodeView

RECOVERING_RETRY_S = 2.0
UNHEALTHY_RETRY_S = 3.0
NO_NODES_RETRY_S = 5.0
MAX_NAMES_IN_ERROR = 20

_MIB = 1 << 20
# A load in progress is joined; a model that is leaving or failed there last time comes late.
_STATUS_RANK = {"loading": 0, "unloaded": 1, "draining": 2, "failed": 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Serve:
    """Send the request to this node, where the model is loaded."""

    node: str
    endpoint: str
    model_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """How one node would get the model.

    Attributes:
        weight_bytes: size of the weights, None while nobody knows.
    """

    node: str
    endpoint: str
    request: LoadRequest
    weight_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdLoad:
    """Load the model first; `plans` are in order of preference and never empty."""

    model_id: str
    plans: tuple[LoadPlan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """Nothing can take the request; `error` says why."""

    model_id: str
    error: CortexError


Route = Serve | ColdLoad | Refuse


def choose_route(
    snapshot: FleetSnapshot,
    catalogue: Catalogue,
    name: str,
    *,
    avoid: AbstractSet[str] = frozenset(),
) -> Route:
    """Choose where a request for `name` (a model id or an alias) goes.

    Least requests in hand wins among loaded replicas, ties by node name; then a model that is
    recovering somewhere is waited for by the caller; then a load is joined or begun.

    Args:
        avoid: nodes that failed this request already.
    """
    model_id = catalogue.resolve(name)
    usable = [node for node in snapshot.nodes if node.usable and node.name not in avoid]
    serving = [node for node in usable if _can_serve(node, model_id)]
    if serving:
        best = min(serving, key=lambda node: (snapshot.requests(node, model_id), node.name))
        return Serve(node=best.name, endpoint=best.endpoint, model_id=model_id)
    recovering = [node.name for node in usable if node.status(model_id) == "recovering"]
    if recovering:
        return Refuse(
            model_id=model_id,
            error=ModelRecoveringError(
                f"model '{model_id}' is being restarted on {recovering[0]}; try again shortly",
                retry_after_s=RECOVERING_RETRY_S,
            ),
        )
    entry = catalogue.find(model_id)
    ready = [node for node in usable if _could_load(node, model_id, entry)]
    if ready:
        ready.sort(key=lambda node: _rank(node, model_id, entry, catalogue))
        plans = tuple(_plan(node, model_id, entry) for node in ready)
        return ColdLoad(model_id=model_id, plans=plans)
    return Refuse(model_id=model_id, error=_refusal(snapshot, catalogue, name, model_id, entry))


def nodes_listing(
    snapshot: FleetSnapshot, model_id: str, *, avoid: AbstractSet[str] = frozenset()
) -> list[NodeView]:
    """Return the usable nodes that list a model in any status, those that hold it first."""
    nodes = [
        node
        for node in snapshot.nodes
        if node.usable and node.name not in avoid and model_id in node.models
    ]
    return sorted(nodes, key=lambda node: (not _can_serve(node, model_id), node.name))


def available(snapshot: FleetSnapshot, catalogue: Catalogue) -> list[str]:
    """Return every name a caller may use: listed models, catalogue models, aliases; sorted."""
    names = {model_id for node in snapshot.nodes for model_id in node.models}
    names.update(model.id for model in catalogue.models)
    names.update(alias for alias, target in catalogue.aliases.items() if target in names)
    return sorted(names)


def feasible_nodes(snapshot: FleetSnapshot, catalogue: Catalogue, model_id: str) -> list[str]:
    """Return the names of the usable nodes that have the model or could load it."""
    entry = catalogue.find(model_id)
    return [
        node.name for node in snapshot.nodes if node.usable and _feasible(node, model_id, entry)
    ]


def _can_serve(node: NodeView, model_id: str) -> bool:
    if node.status(model_id) != "loaded":
        return False
    servable = node.models[model_id].servable
    return servable is None or servable.ok


def _feasible(node: NodeView, model_id: str, entry: CatalogueModel | None) -> bool:
    """Whether the node could ever hold the model: it lists it, or the catalogue places it there."""
    if entry is None:
        return model_id in node.models
    return entry.feasible_on(node.name, node.devices)


def _could_load(node: NodeView, model_id: str, entry: CatalogueModel | None) -> bool:
    # A loaded replica that cannot serve is the neuron's to mend, not ours to load again.
    return node.status(model_id) != "loaded" and _feasible(node, model_id, entry)


def _rank(
    node: NodeView, model_id: str, entry: CatalogueModel | None, catalogue: Catalogue
) -> tuple[int, bool, bool, bool, int, str]:
    """Order candidates: joinable, files at hand, fits now, fits after evictions, most free."""
    status = node.status(model_id)
    need_mb = _need_mb(node, model_id, entry)
    free_mb = _free_mb(node)
    fits = need_mb <= free_mb
    priority = entry.priority if entry is not None else DEFAULT_PRIORITY
    displaceable_mb = sum(
        _held_mb(node, other, catalogue)
        for other in node.models
        if node.status(other) == "loaded" and _priority(catalogue, other) <= priority
    )
    return (
        _STATUS_RANK.get(status or "unloaded", 1),
        status is None,
        not fits,
        need_mb > free_mb + displaceable_mb,
        -free_mb,
        node.name,
    )


def _need_mb(node: NodeView, model_id: str, entry: CatalogueModel | None) -> int:
    info = node.models.get(model_id)
    if info is not None and info.weight_bytes is not None:
        return info.weight_bytes // _MIB
    return (entry.vram_mb or 0) if entry is not None else 0


def _free_mb(node: NodeView) -> int:
    """Free memory of the emptiest device; a host without one offers its main memory."""
    if node.health is not None and node.health.devices:
        return max(device.vram_free_mb for device in node.health.devices)
    if node.devices or node.discovery is None:
        return 0
    return node.discovery.memory_total_mb


def _held_mb(node: NodeView, model_id: str, catalogue: Catalogue) -> int:
    info = node.models[model_id]
    return info.vram_used_mb or _need_mb(node, model_id, catalogue.find(model_id))


def _priority(catalogue: Catalogue, model_id: str) -> int:
    entry = catalogue.find(model_id)
    return entry.priority if entry is not None else DEFAULT_PRIORITY


def _plan(node: NodeView, model_id: str, entry: CatalogueModel | None) -> LoadPlan:
    info = node.models.get(model_id)
    return LoadPlan(
        node=node.name,
        endpoint=node.endpoint,
        request=LoadRequest(
            model_id=model_id,
            harness=entry.harness if entry is not None else None,
            source=entry.source if entry is not None else None,
        ),
        weight_bytes=info.weight_bytes if info is not None else None,
    )


def _refusal(
    snapshot: FleetSnapshot,
    catalogue: Catalogue,
    name: str,
    model_id: str,
    entry: CatalogueModel | None,
) -> CortexError:
    if not any(node.usable for node in snapshot.nodes):
        what = "every node is down or draining" if snapshot.nodes else "no neuron is configured"
        return ServiceUnavailableError(
            f"no healthy node for model '{name}': {what}", retry_after_s=NO_NODES_RETRY_S
        )
    if entry is None and not snapshot.lists(model_id):
        return ModelNotFoundError(
            f"model '{name}' does not exist; available: {_names(snapshot, catalogue)}",
            param="model",
        )
    stuck = [node.name for node in snapshot.nodes if node.status(model_id) == "loaded"]
    down = [
        node.name
        for node in snapshot.nodes
        if not node.usable and (not node.seen or _feasible(node, model_id, entry))
    ]
    if stuck or down:
        waiting_for = ", ".join(sorted({*stuck, *down}))
        return ServiceUnavailableError(
            f"model '{name}' cannot be served just now: {waiting_for} not ready",
            retry_after_s=UNHEALTHY_RETRY_S,
        )
    return ServiceUnavailableError(
        f"model '{name}' is in the catalogue, but no node meets its pinned_on and "
        "min_device_vram_mb; change models.toml or add a node"
    )


def _names(snapshot: FleetSnapshot, catalogue: Catalogue) -> str:
    names = available(snapshot, catalogue)
    more = len(names) - MAX_NAMES_IN_ERROR
    shown = ", ".join(names[:MAX_NAMES_IN_ERROR]) or "none"
    return f"{shown} and {more} more" if more > 0 else shown
