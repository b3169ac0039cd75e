"""Where a request goes: a pure choice over a snapshot of the fleet and the catalogue.

Every candidate has one cost in seconds (`costs`); the least wins, of equals the one unused for
longest, then by name. A loaded replica
serves; where there is none, the model is placed (`placement`). What was considered and turned
down goes along with the choice, so that it can be explained.
"""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

import msgspec

from cortex.core.catalogue import Catalogue
from cortex.core.config import Eviction
from cortex.core.errors import (
    CortexError,
    ModelNotFoundError,
    ModelRecoveringError,
    ServiceUnavailableError,
    UnsupportedFieldError,
)
from cortex.core.neuron_api import VISION, LoadRequest
from cortex.gateway.costs import Cost, Demand, Knowledge, warm_cost
from cortex.gateway.fleet import FleetSnapshot, NodeView
from cortex.gateway.placement import Placement, load_request, plan_placement
from cortex.gateway.roster import (
    available,
    can_serve,
    is_feasible,
    may_see,
    not_serving,
    targets,
    unfit,
)

RECOVERING_RETRY_S = 2.0
UNHEALTHY_RETRY_S = 3.0
NO_NODES_RETRY_S = 5.0
MAX_NAMES_IN_ERROR = 20
# Where the nearest loaded replica keeps a request waiting this long, a further one is loaded,
# as long as nobody has to leave for it.
SPREAD_AFTER_S = 5.0

# A load in progress is joined; a model that is leaving or failed there last time comes late.
_STATUS_RANK = {"loading": 0, "unloaded": 1, "draining": 2, "failed": 3}
_NO_POLICY = Eviction()
_NOTHING_KNOWN = Knowledge()
_ANY = Demand()


class Option(msgspec.Struct, kw_only=True, frozen=True):
    """A node that could take the request, and at what cost.

    Attributes:
        status: of the model there, None where the node does not list it.
        victims: who would have to leave.
        doubt: why a load is unlikely to succeed there.
    """

    node: str
    model_id: str
    status: str | None
    cost: Cost
    cached_tokens: int = 0
    victims: tuple[str, ...] = ()
    doubt: str | None = None


class Rejection(msgspec.Struct, kw_only=True, frozen=True):
    """A node that could not take it, and why not."""

    node: str
    model_id: str
    reason: str


class Considered(msgspec.Struct, kw_only=True, frozen=True):
    """What a choice was made from, the chosen option first."""

    options: tuple[Option, ...] = ()
    rejected: tuple[Rejection, ...] = ()


NOTHING = Considered()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """How one node would get the model.

    Attributes:
        weight_bytes: size of the weights, None while nobody knows.
        needed_bytes: what it will take of each device it is on, 0 where nobody knows.
        rivals: models that may not stay beside it on any node.
        displaces: the highest priority that has to make room; None: up to the model's own.
        is_asked_for: a request waits for it.
    """

    node: str
    endpoint: str
    request: LoadRequest
    weight_bytes: int | None = None
    needed_bytes: int = 0
    rivals: frozenset[str] = frozenset()
    displaces: int | None = None
    is_asked_for: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdLoad:
    """Load the model first; `plans` are in order of preference and never empty."""

    model_id: str
    plans: tuple[LoadPlan, ...]
    considered: Considered = field(default=NOTHING, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Serve:
    """Send the request to this node, where the model is loaded.

    Attributes:
        spread: a further replica to load meanwhile, for which nobody has to leave.
    """

    node: str
    endpoint: str
    model_id: str
    spread: ColdLoad | None = None
    considered: Considered = field(default=NOTHING, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """Nothing can take the request; `error` says why."""

    model_id: str
    error: CortexError
    considered: Considered = field(default=NOTHING, compare=False)


Route = Serve | ColdLoad | Refuse


def choose_route(
    snapshot: FleetSnapshot,
    catalogue: Catalogue,
    name: str,
    *,
    avoid: AbstractSet[str] = frozenset(),
    demand: Demand = _ANY,
    known: Knowledge = _NOTHING_KNOWN,
    policy: Eviction = _NO_POLICY,
) -> Route:
    """Choose where a request for `name` (a model id, an alias or a virtual model) goes.

    The cheapest loaded replica serves, for a virtual model one of its first loaded member; then a
    model that is recovering somewhere is waited for by the caller; then a load is joined or begun,
    for a virtual model that of its first member which a node can take. A request with images goes
    to none that reads text only.

    Args:
        avoid: nodes that failed this request already.
    """
    case = _Case(snapshot, catalogue, avoid, demand, known, policy)
    models = targets(snapshot, catalogue, name)
    if demand.has_images:
        seeing = tuple(each for each in models if may_see(snapshot, each))
        if not seeing:
            return Refuse(model_id=models[0], error=_blind(name))
        models = seeing
    rejected: list[Rejection] = []
    for model_id in models:
        serve = case.warm(model_id, rejected)
        if serve is not None:
            return serve
    rejected.clear()
    recovering: Refuse | None = None
    doubtful: ColdLoad | None = None
    for model_id in models:
        node = case.recovering(model_id)
        if node is not None:
            recovering = recovering or _recovering(model_id, node)
            continue
        cold = case.cold(model_id, rejected)
        if cold is None:
            continue
        if cold.considered.options[0].doubt is None or len(models) == 1:
            return cold
        doubtful = doubtful or cold
    found = Considered(rejected=tuple(rejected))
    if recovering is not None:
        return replace(recovering, considered=found)
    if doubtful is not None:
        return doubtful
    error = _refusal(snapshot, catalogue, name, models)
    return Refuse(model_id=models[0], error=error, considered=found)


def _blind(name: str) -> UnsupportedFieldError:
    return UnsupportedFieldError(
        f"model '{name}' cannot take images, it reads text only; leave them out or choose a model "
        f"whose capabilities in /v1/models name '{VISION}'",
        param="messages",
    )


def further_placements(
    snapshot: FleetSnapshot,
    catalogue: Catalogue,
    model_id: str,
    *,
    known: Knowledge = _NOTHING_KNOWN,
    policy: Eviction = _NO_POLICY,
) -> Considered:
    """Return where a model could be loaded beside where it is, the cheapest node first."""
    rejected: list[Rejection] = []
    case = _Case(snapshot, catalogue, frozenset(), _ANY, known, policy)
    cold = case.cold(model_id, rejected)
    return Considered(rejected=tuple(rejected)) if cold is None else cold.considered


@dataclass(frozen=True, slots=True)
class _Case:
    """Everything that one choice is made from."""

    snapshot: FleetSnapshot
    catalogue: Catalogue
    avoid: AbstractSet[str]
    demand: Demand
    known: Knowledge
    policy: Eviction

    def warm(self, model_id: str, rejected: list[Rejection]) -> Serve | None:
        """Return the cheapest loaded replica; why other nodes are none is added to `rejected`."""
        options: list[Option] = []
        for node in self.snapshot.nodes:
            reason = unfit(node, self.avoid)
            if reason is None and not can_serve(node, model_id):
                reason = not_serving(node, model_id)
            if reason is not None:
                rejected.append(Rejection(node=node.name, model_id=model_id, reason=reason))
                continue
            options.append(
                Option(
                    node=node.name,
                    model_id=model_id,
                    status="loaded",
                    cost=warm_cost(self.snapshot, node, model_id, self.demand, self.known),
                    cached_tokens=self.demand.cached.get((node.name, model_id), 0),
                )
            )
        if not options:
            return None
        last_used = self.demand.last_used
        options.sort(
            key=lambda each: (
                round(each.cost.total_s, 4),
                last_used.get((each.node, model_id), 0),
                each.node,
            )
        )
        best = options[0]
        return Serve(
            node=best.node,
            endpoint=self._node(best.node).endpoint,
            model_id=model_id,
            spread=self.spread(model_id, best) if best.cost.queue_s >= SPREAD_AFTER_S else None,
            considered=Considered(options=tuple(options), rejected=tuple(rejected)),
        )

    def recovering(self, model_id: str) -> str | None:
        """Return a node that is restarting the model."""
        names = (
            node.name
            for node in self.snapshot.nodes
            if unfit(node, self.avoid) is None and node.status(model_id) == "recovering"
        )
        return next(names, None)

    def cold(self, model_id: str, rejected: list[Rejection]) -> ColdLoad | None:
        """Return the load of a model that nobody serves, None where no node can take it."""
        placements: list[Placement] = []
        for node in self.snapshot.nodes:
            planned = self._place(node, model_id)
            if isinstance(planned, Placement):
                placements.append(planned)
            else:
                rejected.append(Rejection(node=node.name, model_id=model_id, reason=planned))
        return self._load(model_id, placements, rejected) if placements else None

    def spread(self, model_id: str, nearest: Option) -> ColdLoad | None:
        """Return a further replica that would be up before the nearest one is free."""
        statuses = {node.status(model_id) for node in self.snapshot.nodes if node.usable}
        if statuses & {"loading", "recovering"}:
            return None
        placements = [
            planned
            for node in self.snapshot.nodes
            if isinstance(planned := self._place(node, model_id), Placement)
            and planned.status in (None, "unloaded")
            and planned.doubt is None
            and not planned.victims
            and planned.cost.total_s < nearest.cost.total_s
        ]
        return self._load(model_id, placements, []) if placements else None

    def _place(self, node: NodeView, model_id: str) -> Placement | str:
        reason = unfit(node, self.avoid)
        if reason is not None:
            return reason
        if can_serve(node, model_id):
            return "loaded there already"
        if node.status(model_id) in ("loaded", "recovering"):
            # A loaded replica that cannot serve is the neuron's to mend, not ours to load again.
            return not_serving(node, model_id)
        return plan_placement(
            self.snapshot,
            self.catalogue,
            node,
            model_id,
            demand=self.demand,
            known=self.known,
            policy=self.policy,
        )

    def _load(
        self, model_id: str, placements: list[Placement], rejected: list[Rejection]
    ) -> ColdLoad:
        placements.sort(key=_preference)
        return ColdLoad(
            model_id=model_id,
            plans=tuple(self._plan(model_id, each) for each in placements),
            considered=Considered(
                options=tuple(_option(model_id, each) for each in placements),
                rejected=tuple(rejected),
            ),
        )

    def _plan(self, model_id: str, placement: Placement) -> LoadPlan:
        node = self._node(placement.node)
        info = node.models.get(model_id)
        return LoadPlan(
            node=node.name,
            endpoint=node.endpoint,
            request=load_request(self.catalogue, model_id, placement, self.policy),
            weight_bytes=info.weight_bytes if info is not None else None,
            needed_bytes=placement.needed_bytes,
            rivals=self.catalogue.rivals(model_id),
        )

    def _node(self, name: str) -> NodeView:
        node = self.snapshot.node(name)
        assert node is not None
        return node


def _preference(each: Placement) -> tuple[bool, int, float, int, str]:
    rank = _STATUS_RANK.get(each.status or "unloaded", 1)
    # Not free memory: gateways whose readings are not quite of the same moment would send one model
    # to two nodes.
    room = -each.unclaimed_bytes
    return each.doubt is not None, rank, round(each.cost.total_s, 6), room, each.node


def _option(model_id: str, placement: Placement) -> Option:
    return Option(
        node=placement.node,
        model_id=model_id,
        status=placement.status,
        cost=placement.cost,
        victims=placement.victims,
        doubt=placement.doubt,
    )


def _recovering(model_id: str, node: str) -> Refuse:
    return Refuse(
        model_id=model_id,
        error=ModelRecoveringError(
            f"model '{model_id}' is being restarted on {node}; try again shortly",
            retry_after_s=RECOVERING_RETRY_S,
        ),
    )


def _refusal(
    snapshot: FleetSnapshot, catalogue: Catalogue, name: str, models: tuple[str, ...]
) -> CortexError:
    if not any(node.usable for node in snapshot.nodes):
        what = "every node is down, draining or failing"
        if not snapshot.nodes:
            what = "no neuron is configured"
        # Those that only fail are tried again when their breakers let a request through.
        waits = [node.retry_s for node in snapshot.nodes if node.healthy and node.retry_s]
        return ServiceUnavailableError(
            f"no healthy node for model '{name}': {what}",
            retry_after_s=min(waits, default=NO_NODES_RETRY_S),
        )
    if not any(catalogue.find(each) is not None or snapshot.lists(each) for each in models):
        return ModelNotFoundError(
            f"model '{name}' does not exist; available: {_names(snapshot, catalogue)}",
            param="model",
        )
    waiting_for = {
        node.name
        for node in snapshot.nodes
        for each in models
        if node.status(each) == "loaded"
        or (not node.usable and (not node.seen or is_feasible(node, each, catalogue)))
    }
    if waiting_for:
        return ServiceUnavailableError(
            f"model '{name}' cannot be served just now: {', '.join(sorted(waiting_for))} not ready",
            retry_after_s=UNHEALTHY_RETRY_S,
        )
    return ServiceUnavailableError(
        f"model '{name}' is in the catalogue, but no node meets its pinned_on, min_devices and "
        f"min_device_vram_mb, or a group keeps it out; `cortex plan {name}` says why for each node"
    )


def _names(snapshot: FleetSnapshot, catalogue: Catalogue) -> str:
    names = available(snapshot, catalogue)
    more = len(names) - MAX_NAMES_IN_ERROR
    shown = ", ".join(names[:MAX_NAMES_IN_ERROR]) or "none"
    return f"{shown} and {more} more" if more > 0 else shown
