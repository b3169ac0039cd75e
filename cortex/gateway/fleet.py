"""What this gateway knows of its nodes: one owner of the state, snapshots for everyone else.

Readings come in whole (a poll) or model by model (a load that ended, an event); each is recorded
without an await, so a snapshot is never half of one. A model that was recorded on its own after
a poll began keeps that record: the poll's answer may be older.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import msgspec

from cortex.core.neuron_api import (
    MODEL_STATUSES,
    Device,
    Discovery,
    ModelInfo,
    ModelLoad,
    NeuronHealth,
)

MAX_FAILURES = 3  # so many misses in a row make a node unhealthy


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """One node as last heard of.

    Attributes:
        healthy: it answered lately; false until its first answer.
        seen: it has answered at least once.
        failures: misses in a row since its last answer.
        models: by model id; kept while the node is unhealthy, so that its models stay known.
        loads: work in hand by model id, as reported.
        foreign: requests in hand by model id that are not this gateway's.
    """

    name: str
    endpoint: str
    healthy: bool = False
    seen: bool = False
    failures: int = 0
    failure: str | None = None
    discovery: Discovery | None = None
    health: NeuronHealth | None = None
    models: Mapping[str, ModelInfo] = field(default_factory=dict)
    loads: Mapping[str, ModelLoad] = field(default_factory=dict)
    foreign: Mapping[str, int] = field(default_factory=dict)

    @property
    def usable(self) -> bool:
        """Whether new requests may go to it."""
        return self.healthy and (self.health is None or self.health.status != "draining")

    @property
    def devices(self) -> list[Device]:
        """Its accelerators; empty when it has none or has not said."""
        return self.discovery.devices if self.discovery is not None else []

    def status(self, model_id: str) -> str | None:
        """Return a model's status here, None where the node does not list it."""
        info = self.models.get(model_id)
        if info is None:
            return None
        return info.status if info.status in MODEL_STATUSES else "unloaded"


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSnapshot:
    """All nodes, by name, and this gateway's requests in hand by (node, model id)."""

    nodes: tuple[NodeView, ...]
    leases: Mapping[tuple[str, str], int]

    def node(self, name: str) -> NodeView | None:
        """Return the node of that name."""
        return next((node for node in self.nodes if node.name == name), None)

    def requests(self, node: NodeView, model_id: str) -> int:
        """Return how many requests a node has for a model: ours and those of others."""
        return self.leases.get((node.name, model_id), 0) + node.foreign.get(model_id, 0)

    def lists(self, model_id: str) -> bool:
        """Whether any node, healthy or not, lists the model."""
        return any(model_id in node.models for node in self.nodes)


class Lease:
    """One request in hand at one node, counted from its creation to its first release."""

    __slots__ = ("_fleet", "_lost", "_open", "model_id", "node")

    def __init__(self, fleet: "Fleet", node: str, model_id: str) -> None:
        self.node = node
        self.model_id = model_id
        self._fleet = fleet
        self._open = True
        self._lost: Callable[[], None] | None = None

    def on_node_lost(self, call: Callable[[], None]) -> None:
        """Have `call` called once if the node becomes unhealthy before the release."""
        self._lost = call

    def node_lost(self) -> None:
        """Tell the holder that the node is gone."""
        call, self._lost = self._lost, None
        if call is not None:
            call()

    def release(self) -> None:
        """Give the seat back; later calls do nothing."""
        if self._open:
            self._open = False
            self._fleet.end_lease(self)


class Fleet:
    """The owner of the gateway's view of its nodes."""

    def __init__(self, addresses: Iterable[tuple[str, str]]) -> None:
        """Start with nodes (name, endpoint) of which nothing is known yet."""
        self._nodes = {
            name: NodeView(name=name, endpoint=endpoint.rstrip("/"))
            for name, endpoint in sorted(addresses)
        }
        self._leases: dict[tuple[str, str], int] = {}
        self._holders: set[Lease] = set()
        self._stamp = 0
        self._touched: dict[tuple[str, str], int] = {}
        self._view: tuple[NodeView, ...] | None = None

    def snapshot(self) -> FleetSnapshot:
        """Return an immutable copy of the present state."""
        if self._view is None:
            self._view = tuple(self._nodes.values())
        return FleetSnapshot(nodes=self._view, leases=MappingProxyType(self._leases.copy()))

    def begin_reading(self) -> int:
        """Return a stamp to be taken before a poll asks its first question."""
        return self._stamp

    def record_discovery(self, name: str, discovery: Discovery) -> None:
        """Record what a node's host is."""
        self._replace(name, discovery=discovery)

    def record_reading(
        self, name: str, models: Iterable[ModelInfo], health: NeuronHealth | None, *, stamp: int
    ) -> bool:
        """Record a node's complete answer; models it does not report vanish.

        Args:
            health: None where the node did not answer that question; the old one stays.
            stamp: from `begin_reading`, taken before asking.

        Returns:
            Whether the node was not healthy before.
        """
        node = self._nodes[name]
        read = {info.id: info for info in models}
        for (owner, model_id), touched in list(self._touched.items()):
            if owner != name:
                continue
            if touched <= stamp:
                del self._touched[owner, model_id]
            elif model_id in node.models:
                read[model_id] = node.models[model_id]
        health = health or node.health
        loads = {load.id: load for load in health.models} if health is not None else {}
        foreign = {
            load.id: max(
                0, load.in_flight + load.queue_depth - self._leases.get((name, load.id), 0)
            )
            for load in loads.values()
        }
        self._replace(
            name,
            healthy=True,
            seen=True,
            failures=0,
            failure=None,
            health=health,
            models=MappingProxyType(read),
            loads=MappingProxyType(loads),
            foreign=MappingProxyType(foreign),
        )
        return not node.healthy

    def record_failure(self, name: str, reason: str) -> bool:
        """Count a miss; return whether it has just made the node unhealthy."""
        node = self._nodes[name]
        failures = node.failures + 1
        lost = node.healthy and failures >= MAX_FAILURES
        self._replace(name, failures=failures, failure=reason, healthy=node.healthy and not lost)
        if lost:
            for lease in [lease for lease in self._holders if lease.node == name]:
                lease.node_lost()
        return lost

    def record_model(self, name: str, info: ModelInfo) -> None:
        """Record one model of a node, newer than any poll that is under way."""
        self._stamp += 1
        self._touched[name, info.id] = self._stamp
        models = {**self._nodes[name].models, info.id: info}
        self._replace(name, models=MappingProxyType(models))

    def record_status(
        self, name: str, model_id: str, status: str, error: str | None = None
    ) -> None:
        """Record a model's new status, keeping the rest of what is known of it."""
        known = self._nodes[name].models.get(model_id)
        if known is None:
            known = ModelInfo(id=model_id, harness="torch", status=status)
        # Whether it could serve was said of its old status.
        changed = msgspec.structs.replace(
            known, status=status, error=error, progress=None, servable=None
        )
        self.record_model(name, changed)

    def lease(self, name: str, model_id: str) -> Lease:
        """Count a request at a node until the lease is released."""
        lease = Lease(self, name, model_id)
        key = (name, model_id)
        self._leases[key] = self._leases.get(key, 0) + 1
        self._holders.add(lease)
        return lease

    def end_lease(self, lease: Lease) -> None:
        """Take a lease back; called once by the lease itself."""
        self._holders.remove(lease)
        key = (lease.node, lease.model_id)
        left = self._leases[key] - 1
        if left:
            self._leases[key] = left
        else:
            del self._leases[key]

    def _replace(self, name: str, **changes: object) -> None:
        self._nodes[name] = replace(self._nodes[name], **changes)  # type: ignore[arg-type]
        self._view = None
