"""Who is who: the models a name stands for, and the nodes that list, hold or could hold them."""

from collections.abc import Set as AbstractSet

from cortex.core.catalogue import Catalogue
from cortex.core.neuron_api import VISION
from cortex.gateway.fleet import FleetSnapshot, NodeView

# By its name and by the one that older configurations have for it.
_OWN_ENGINES = ("torch", "candle")


def can_serve(node: NodeView, model_id: str) -> bool:
    """Whether the model is loaded there and takes requests."""
    if node.status(model_id) != "loaded":
        return False
    servable = node.models[model_id].servable
    return servable is None or servable.ok


def unfit(node: NodeView, avoid: AbstractSet[str]) -> str | None:
    """Return why no request at all may go to a node, None if one may."""
    if node.name in avoid:
        return "failed this request already"
    if not node.healthy:
        return f"does not answer ({node.failure or 'not heard of yet'})"
    if node.draining:
        return "is draining"
    return None if node.usable else "has failed too often lately (its breaker is open)"


def not_serving(node: NodeView, model_id: str) -> str:
    """Return why a node that cannot serve a model just now cannot."""
    status = node.status(model_id)
    if status != "loaded":
        return "does not list it" if status is None else status
    servable = node.models[model_id].servable
    reason = servable.reason if servable is not None else None
    return f"loaded but cannot serve ({reason or 'no reason given'})"


def is_feasible(node: NodeView, model_id: str, catalogue: Catalogue) -> bool:
    """Whether the node could ever hold the model: it lists it, or the catalogue places it there."""
    entry = catalogue.find(model_id)
    if entry is None:
        return model_id in node.models
    return entry.feasible_on(node.name, node.devices)


def targets(snapshot: FleetSnapshot, catalogue: Catalogue, name: str) -> tuple[str, ...]:
    """Return the models that a name stands for; a listed model's own name is no pattern's."""
    return catalogue.targets(name, is_listed=snapshot.lists(name))


def may_see(snapshot: FleetSnapshot, model_id: str) -> bool:
    """Whether a model may take images: False where all that list it know that it reads text only.

    Of an external engine's model only the engine knows.
    """
    infos = [node.models[model_id] for node in snapshot.nodes if model_id in node.models]
    return not infos or any(
        VISION in info.capabilities or not info.capabilities or info.harness not in _OWN_ENGINES
        for info in infos
    )


def primary(
    snapshot: FleetSnapshot, catalogue: Catalogue, name: str, *, has_images: bool = False
) -> str:
    """Return the model that would serve a name now: of a virtual model the first loaded one."""
    models = targets(snapshot, catalogue, name)
    if has_images:
        models = tuple(each for each in models if may_see(snapshot, each)) or models
    if len(models) == 1:
        return models[0]
    for model_id in models:
        if any(node.usable and can_serve(node, model_id) for node in snapshot.nodes):
            return model_id
    return models[0]


def nodes_serving(
    snapshot: FleetSnapshot, model_id: str, *, avoid: AbstractSet[str] = frozenset()
) -> list[NodeView]:
    """Return the nodes that a request for a loaded model may go to."""
    return [
        node
        for node in snapshot.nodes
        if node.usable and node.name not in avoid and can_serve(node, model_id)
    ]


def nodes_listing(
    snapshot: FleetSnapshot, model_id: str, *, avoid: AbstractSet[str] = frozenset()
) -> list[NodeView]:
    """Return the usable nodes that list a model in any status, those that hold it first."""
    nodes = [
        node
        for node in snapshot.nodes
        if node.usable and node.name not in avoid and model_id in node.models
    ]
    return sorted(nodes, key=lambda node: (not can_serve(node, model_id), node.name))


def available(snapshot: FleetSnapshot, catalogue: Catalogue) -> list[str]:
    """Return every name a caller may use: listed and catalogue models, aliases, virtual models."""
    names = {model_id for node in snapshot.nodes for model_id in node.models}
    names.update(model.id for model in catalogue.models)
    names.update(
        name for name in catalogue.names if any(each in names for each in catalogue.targets(name))
    )
    return sorted(names)


def feasible_nodes(snapshot: FleetSnapshot, catalogue: Catalogue, model_id: str) -> list[str]:
    """Return the names of the usable nodes that have the model or could load it."""
    return [
        node.name
        for node in snapshot.nodes
        if node.usable and is_feasible(node, model_id, catalogue)
    ]
