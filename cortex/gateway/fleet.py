"""What this gateway knows of its nodes: one owner of the state, snapshots for everyone else.

Readings come in whole (a poll, the first event of a subscription) or piece by piece (a load that
ended, an event); each is recorded without an await, so a snapshot is never half of one. A model
that was recorded on its own after a reading began keeps that record: the reading may be older.
What is recorded of a node that was removed meanwhile is dropped.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
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
from cortex.gateway import breaker as breakers
from cortex.gateway import liveness
from cortex.gateway.breaker import CLOSED, Breaker
from cortex.gateway.liveness import UNHEARD, Liveness, Miss

# A model in another status has no engine, so what was said of its work in hand is void.
_RESIDENT = frozenset(["loaded", "recovering", "draining"])


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """One node as last heard of.

    Attributes:
        healthy: it answered lately and does not flap; false until its first answer.
        seen: it has answered at least once.
        failure: what the last miss was.
        subscribed: its events come in; otherwise it is polled.
        drained: the operator wants nothing new to go there.
        admitting: its breaker lets a request pass.
        retry_s: how long its breaker certainly lets nothing pass.
        models: by model id; kept while the node is unhealthy, so that its models stay known.
        loads: work in hand by model id, as reported.
        claims: bytes that loads asked of it will take, by model id, until it tells of them itself.
        foreign: requests in hand by model id that are not this gateway's.
    """

    name: str
    endpoint: str
    healthy: bool = False
    seen: bool = False
    failure: str | None = None
    subscribed: bool = False
    drained: bool = False
    admitting: bool = True
    retry_s: float = 0.0
    liveness: Liveness = UNHEARD
    breaker: Breaker = CLOSED
    discovery: Discovery | None = None
    health: NeuronHealth | None = None
    models: Mapping[str, ModelInfo] = field(default_factory=dict)
    loads: Mapping[str, ModelLoad] = field(default_factory=dict)
    foreign: Mapping[str, int] = field(default_factory=dict)
    claims: Mapping[str, int] = field(default_factory=dict)

    @property
    def failures(self) -> int:
        """Misses in a row since its last answer."""
        return self.liveness.misses

    @property
    def draining(self) -> bool:
        """Whether it takes nothing new, by its own word or the operator's."""
        return self.drained or (self.health is not None and self.health.status == "draining")

    @property
    def usable(self) -> bool:
        """Whether new requests may go to it."""
        return self.healthy and self.admitting and not self.draining

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
    """One request in hand at one node, counted from its creation to its first release.

    Its holder tells how it went (`succeeded` or `failed`), for the node's breaker; saying
    nothing means that nobody knows.
    """

    __slots__ = ("_call", "_fleet", "_open", "_trial", "lost", "model_id", "node")

    def __init__(self, fleet: "Fleet", node: str, model_id: str, *, trial: bool) -> None:
        self.node = node
        self.model_id = model_id
        self._fleet = fleet
        self._open = True
        self._trial = trial
        self._call: Callable[[], None] | None = None
        # The node has counted as down since the request began.
        self.lost = False

    def on_node_lost(self, call: Callable[[], None]) -> None:
        """Have `call` called once if the node counts as down before the release."""
        self._call = call

    def node_lost(self) -> None:
        """Tell the holder that the node is gone."""
        self.lost = True
        call, self._call = self._call, None
        if call is not None:
            call()

    def succeeded(self) -> None:
        """Say that the node did its part, if only by refusing in proper words."""
        self._trial = False
        self._fleet.record_success(self.node)

    def failed(self, *, at_once: bool = False) -> None:
        """Say that the node failed; `at_once` where one such failure proves it unable."""
        trial, self._trial = self._trial, False
        self._fleet.record_fault(self.node, trial=trial, at_once=at_once)

    def release(self) -> None:
        """Give the seat back; later calls do nothing."""
        if self._open:
            self._open = False
            self._fleet.end_lease(self, trial=self._trial)


class Fleet:
    """The owner of the gateway's view of its nodes."""

    def __init__(
        self,
        addresses: Iterable[tuple[str, str]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with nodes (name, endpoint) of which nothing is known yet."""
        self._clock = clock
        self._nodes: dict[str, NodeView] = {}
        self._leases: dict[tuple[str, str], int] = {}
        self._holders: set[Lease] = set()
        self._loss_calls: dict[object, tuple[str, Callable[[], None]]] = {}
        self._stamp = 0
        self._touched: dict[tuple[str, str], int] = {}
        # Nodes whose view changes by mere waiting.
        self._waiting: set[str] = set()
        self._view: tuple[NodeView, ...] | None = None
        self.set_nodes(addresses)

    def set_nodes(self, addresses: Iterable[tuple[str, str]]) -> None:
        """Have exactly these nodes (name, endpoint); one with a new endpoint is a new node.

        Requests in hand at nodes that go are not touched.
        """
        wanted = {name: endpoint.rstrip("/") for name, endpoint in sorted(addresses)}
        nodes = {}
        for name, endpoint in wanted.items():
            known = self._nodes.get(name)
            if known is None or known.endpoint != endpoint:
                self._forget(name)
                known = NodeView(name=name, endpoint=endpoint)
            nodes[name] = known
        for name in self._nodes.keys() - nodes.keys():
            self._forget(name)
        self._nodes = nodes
        self._view = None

    def snapshot(self) -> FleetSnapshot:
        """Return an immutable copy of the present state."""
        for name in tuple(self._waiting):
            self._replace(name)
        if self._view is None:
            self._view = tuple(self._nodes.values())
        return FleetSnapshot(nodes=self._view, leases=MappingProxyType(self._leases.copy()))

    def begin_reading(self) -> int:
        """Return a stamp to be taken before a node is asked its first question."""
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
            Whether the node was down before.
        """
        node = self._nodes.get(name)
        if node is None:
            return False
        read = {info.id: info for info in models}
        for (owner, model_id), touched in list(self._touched.items()):
            if owner != name:
                continue
            if touched <= stamp:
                del self._touched[owner, model_id]
            elif model_id in node.models:
                read[model_id] = node.models[model_id]
            else:
                read.pop(model_id, None)
        claims = {key: size for key, size in node.claims.items() if (name, key) in self._touched}
        health = health or node.health
        self._replace(
            name, health=health, models=MappingProxyType(read), claims=MappingProxyType(claims)
        )
        self._set_loads(name, health.models if health is not None else ())
        return self.record_alive(name)

    def record_alive(self, name: str) -> bool:
        """Record a sign of life; return whether the node was down before."""
        node = self._nodes.get(name)
        if node is None:
            return False
        heard = liveness.heard(node.liveness, self._clock())
        if heard is node.liveness and node.failure is None:
            return False
        back = not node.liveness.up
        breaker = breakers.returned(node.breaker) if back else node.breaker
        self._replace(name, seen=True, failure=None, liveness=heard, breaker=breaker)
        return back

    def record_failure(self, name: str, reason: str, miss: Miss = "late") -> bool:
        """Record a miss; return whether it has just made the node count as down."""
        node = self._nodes.get(name)
        if node is None:
            return False
        now = liveness.missed(node.liveness, self._clock(), miss)
        lost = node.liveness.up and not now.up
        self._replace(name, failure=reason, liveness=now)
        # Where a connection is refused, those of a process that ended are reset as well, and one
        # that only stopped listening still answers what it has in hand.
        if lost and miss != "refused":
            for lease in [lease for lease in self._holders if lease.node == name]:
                lease.node_lost()
        if lost:
            for call in [call for node, call in self._loss_calls.values() if node == name]:
                call()
        return lost

    @contextmanager
    def on_node_lost(self, name: str, call: Callable[[], None]) -> Iterator[None]:
        """Have `call` called whenever the node begins to count as down inside the context."""
        owner = object()
        self._loss_calls[owner] = (name, call)
        try:
            yield
        finally:
            del self._loss_calls[owner]

    def record_subscribed(self, name: str, subscribed: bool) -> None:
        """Record whether a node's events come in."""
        self._replace(name, subscribed=subscribed)

    def record_health(self, name: str, health: NeuronHealth) -> None:
        """Record a node's own state, with its models' work in hand."""
        self._replace(name, health=health)
        self._set_loads(name, health.models)

    def record_loads(self, name: str, loads: Iterable[ModelLoad]) -> None:
        """Record the work in hand of some of a node's models."""
        node = self._nodes.get(name)
        if node is not None:
            self._set_loads(name, {**node.loads, **{load.id: load for load in loads}}.values())

    def record_model(self, name: str, info: ModelInfo) -> None:
        """Record one model of a node, newer than any reading that is under way."""
        node = self._nodes.get(name)
        if node is None:
            return
        self._touch(name, info.id)
        claims = {key: size for key, size in node.claims.items() if key != info.id}
        self._replace(
            name,
            models=MappingProxyType({**node.models, info.id: info}),
            claims=MappingProxyType(claims),
        )
        if info.status not in _RESIDENT and info.id in node.loads:
            self._set_loads(name, [load for load in node.loads.values() if load.id != info.id])

    def record_model_gone(self, name: str, model_id: str) -> None:
        """Record that a node no longer knows a model."""
        node = self._nodes.get(name)
        if node is None:
            return
        self._touch(name, model_id)
        kept = {key: info for key, info in node.models.items() if key != model_id}
        self._replace(name, models=MappingProxyType(kept))
        self._set_loads(name, [load for load in node.loads.values() if load.id != model_id])

    def record_status(
        self, name: str, model_id: str, status: str, error: str | None = None
    ) -> None:
        """Record a model's new status, keeping the rest of what is known of it."""
        node = self._nodes.get(name)
        if node is None:
            return
        known = node.models.get(model_id)
        if known is None:
            known = ModelInfo(id=model_id, harness="torch", status=status)
        # Whether it could serve was said of its old status.
        changed = msgspec.structs.replace(
            known, status=status, error=error, progress=None, servable=None
        )
        self.record_model(name, changed)

    def record_claim(self, name: str, model_id: str, num_bytes: int) -> None:
        """Record that a load was asked of a node, which has not told of it yet."""
        self.record_status(name, model_id, "loading")
        node = self._nodes.get(name)
        if node is not None:
            self._replace(name, claims=MappingProxyType({**node.claims, model_id: num_bytes}))

    def record_drained(self, name: str, drained: bool) -> None:
        """Record whether the operator wants nothing new to go to a node."""
        self._replace(name, drained=drained)

    def record_success(self, name: str) -> None:
        """Record that a node did its part in a request."""
        node = self._nodes.get(name)
        if node is not None and node.breaker != CLOSED:
            self._replace(name, breaker=CLOSED)

    def record_fault(self, name: str, *, trial: bool = False, at_once: bool = False) -> None:
        """Record that a request failed through a node's fault."""
        node = self._nodes.get(name)
        if node is not None:
            now = breakers.failed(node.breaker, self._clock(), trial=trial, at_once=at_once)
            self._replace(name, breaker=now)

    def lease(self, name: str, model_id: str) -> Lease:
        """Count a request at a node until the lease is released."""
        node = self._nodes.get(name)
        trial = False
        if node is not None and node.breaker.state != "closed":
            now_s = self._clock()
            trial = node.breaker.admits(now_s)
            if trial:
                self._replace(name, breaker=breakers.tried(node.breaker, now_s))
        lease = Lease(self, name, model_id, trial=trial)
        key = (name, model_id)
        self._leases[key] = self._leases.get(key, 0) + 1
        self._holders.add(lease)
        return lease

    def end_lease(self, lease: Lease, *, trial: bool) -> None:
        """Take a lease back; called once by the lease itself.

        Args:
            trial: the node's breaker waits for the outcome, and nobody can tell it any more.
        """
        self._holders.remove(lease)
        key = (lease.node, lease.model_id)
        left = self._leases[key] - 1
        if left:
            self._leases[key] = left
        else:
            del self._leases[key]
        node = self._nodes.get(lease.node)
        if node is not None and trial:
            self._replace(lease.node, breaker=breakers.abandoned(node.breaker))

    def _touch(self, name: str, model_id: str) -> None:
        self._stamp += 1
        self._touched[name, model_id] = self._stamp

    def _forget(self, name: str) -> None:
        self._waiting.discard(name)
        for key in [key for key in self._touched if key[0] == name]:
            del self._touched[key]

    def _set_loads(self, name: str, loads: Iterable[ModelLoad]) -> None:
        by_id = {load.id: load for load in loads}
        foreign = {
            load.id: max(
                0, load.in_flight + load.queue_depth - self._leases.get((name, load.id), 0)
            )
            for load in by_id.values()
        }
        self._replace(name, loads=MappingProxyType(by_id), foreign=MappingProxyType(foreign))

    def _replace(self, name: str, **changes: object) -> None:
        """Change a node's view, with what follows from the change and from the time."""
        node = self._nodes.get(name)
        if node is None:
            return
        node = replace(node, **changes) if changes else node  # type: ignore[arg-type]
        now_s = self._clock()
        healthy = node.liveness.usable(now_s)
        admitting = node.breaker.admits(now_s)
        retry_s = node.breaker.wait_s(now_s)
        if (node.liveness.up and not healthy) or retry_s:
            self._waiting.add(name)
        else:
            self._waiting.discard(name)
        self._nodes[name] = replace(node, healthy=healthy, admitting=admitting, retry_s=retry_s)
        self._view = None
